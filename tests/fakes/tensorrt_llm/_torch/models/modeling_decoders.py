"""Language models that the documentation of 1.2.1 lists (models/supported-models.md). None is computed here."""

from .modeling_utils import register_auto_model


@register_auto_model("LlamaForCausalLM")
@register_auto_model("MistralForCausalLM")
@register_auto_model("MixtralForCausalLM")
@register_auto_model("Qwen2ForCausalLM")
@register_auto_model("Qwen3ForCausalLM")
@register_auto_model("Qwen3MoeForCausalLM")
@register_auto_model("Gemma3ForCausalLM")
@register_auto_model("Phi3ForCausalLM")
@register_auto_model("DeepseekV3ForCausalLM")
@register_auto_model("Exaone4ForCausalLM")
@register_auto_model("GptOssForCausalLM")
@register_auto_model("NemotronForCausalLM")
class Decoder:
    pass
