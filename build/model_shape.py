"""A checkpoint's config.json becomes the shape of its model: every tensor, and how parallelism divides it.

    shape = model_shape(config, "gpt2")
    shape.num_parameters        124,439,808, as transformers counts them: tied tables once

No weights are read and no library is imported. Names, defaults and layers are those of transformers 4.57
(`models/*/configuration_*.py`, `models/*/modeling_*.py`), and tests/unit/test_model_shape.py compares every
architecture with models that transformers makes on the meta device.

What is not covered: layers of vision and audio, adapters, encoders. `ARCHITECTURES` lists what is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from errors import CheckpointError, UnsupportedError

# What a rank of tensor parallelism holds of a tensor: all of it; its share; the rows of its KV heads, which are copied
# where there are more ranks than heads; its rows of the vocabulary, which is padded to a multiple of the ranks.
Split = Literal["none", "tp", "kv", "vocab"]
# Quantization takes the linear layers. NVIDIA's leaves embeddings, norms, biases, routers and the head as they are.
Kind = Literal["linear", "head", "embedding", "router", "vector"]


@dataclass(frozen=True)
class Tensor:
    """`copies` tensors of one shape, (outputs, inputs) for a matrix."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    split: Split = "none"
    copies: int = 1

    @property
    def numbers(self) -> int:
        return prod(self.shape) * self.copies

    @property
    def rows(self) -> int:
        """Output channels of all copies."""
        return self.shape[0] * self.copies


Layer = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes in numbers, not bytes. `before` belongs to the first pipeline stage, `after` and `head` to the last."""

    architecture: str
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None
    tensor_parallel_widths: dict[str, int]  # what tensor parallelism must divide, beside the heads: name -> size
    activation_widths: tuple[int, int]  # widest layer: numbers per token that every rank has, that ranks divide
    before: Layer
    layers: tuple[Layer, ...]
    after: Layer
    head: Tensor
    is_tied: bool  # the head is the embedding table
    sliding_layers: int = 0  # layers whose attention looks back no further than `window`
    window: int | None = None  # tokens

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_width(self) -> int:
        """Of all heads' queries, which is not always the hidden size."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_numbers_per_token_and_layer(self) -> int:
        """A key and a value of every KV head."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def parameters(self) -> dict[str, int]:
        """By component. A tied head is no parameter of its own."""
        count: Counter[str] = Counter()
        for tensor in (*self.before, *(tensor for layer in self.layers for tensor in layer), *self.after):
            count[tensor.name] += tensor.numbers
        count["head"] = 0 if self.is_tied else self.head.numbers
        return dict(count)


def model_shape(config: Mapping[str, Any], model: str) -> ModelShape:
    """The shape that `config`, the content of config.json, describes. `model` is its name, for messages.

    Raises UnsupportedError for an architecture that is not in the table, CheckpointError for a value that no model has.
    """
    architectures = config.get("architectures") or ["no architecture"]
    architecture = architectures[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"'{model}' is a {architecture}, whose tensors are not known here; sizes can be planned for "
            f"{', '.join(ARCHITECTURES)}"
        )
    family = ARCHITECTURES[architecture]
    values = _Values(architecture, model, family.defaults | _without_aliases(config, family.aliases))
    return family.shape(values)


def _without_aliases(config: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """transformers takes `hidden_size` for GPT-2's `n_embd`, and lets it win where both are there."""
    named = {key: value for key, value in config.items() if key not in aliases}
    return named | {aliases[key]: value for key, value in config.items() if key in aliases}


@dataclass(frozen=True)
class _Values:
    """A configuration with its defaults filled in, read with checks."""

    architecture: str
    model: str
    content: Mapping[str, Any]

    def number(self, key: str, *, least: int = 1) -> int:
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CheckpointError(
                f"config.json of '{self.model}' has {key} {value!r}; a {self.architecture} needs a whole number of "
                f"{least} or more there"
            )
        return value

    def number_or(self, key: str, default: int) -> int:
        return default if self.content.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        return bool(self.content.get(key))

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"config.json of '{self.model}' {problem}; choose an undamaged checkpoint")


# --- tensors that several families share


@dataclass(frozen=True, kw_only=True)
class _Attention:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def tensors(self, *, qkv_bias: bool, output_bias: bool, norms: bool = False) -> Layer:
        """Query, key, value and output projection; with `norms`, RMS norms of the heads of queries and of keys."""
        found = [
            Tensor("attention", (self.q_width, self.hidden), "linear", "tp"),
            Tensor("attention", (self.kv_width, self.hidden), "linear", "kv", copies=2),
            Tensor("attention", (self.hidden, self.q_width), "linear", "tp"),
        ]
        if qkv_bias:
            found += [
                Tensor("attention", (self.q_width,), "vector", "tp"),
                Tensor("attention", (self.kv_width,), "vector", "kv", copies=2),
            ]
        if output_bias:  # added once after the ranks' sums, so it is not divided
            found.append(Tensor("attention", (self.hidden,), "vector"))
        if norms:
            found.append(Tensor("norms", (self.head_dim,), "vector", copies=2))
        return tuple(found)


def _attention(values: _Values) -> _Attention:
    hidden, heads = values.number("hidden_size"), values.number("num_attention_heads")
    kv_heads = values.number_or("num_key_value_heads", heads)
    if heads % kv_heads:
        raise values.error(f"has {heads} attention heads for {kv_heads} KV heads, which does not divide")
    head_dim = values.number_or("head_dim", max(1, hidden // heads))
    return _Attention(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _mlp(name: str, hidden: int, width: int, *, gated: bool, bias: bool, copies: int = 1) -> Layer:
    """Up (and gate) divided by columns, down divided by rows."""
    num_up = 2 if gated else 1
    found = [
        Tensor(name, (width, hidden), "linear", "tp", copies=num_up * copies),
        Tensor(name, (hidden, width), "linear", "tp", copies=copies),
    ]
    if bias:
        found += [
            Tensor(name, (width,), "vector", "tp", copies=num_up * copies),
            Tensor(name, (hidden,), "vector", copies=copies),
        ]
    return tuple(found)


def _norms(width: int, copies: int, *, bias: bool = False) -> Layer:
    return (Tensor("norms", (width,), "vector", copies=copies * (2 if bias else 1)),) if copies else ()


def _dense_activations(attention: _Attention, width: int, *, gated: bool) -> tuple[int, int]:
    """Numbers per token that live at once in a layer, as far as they are not in the KV cache.

    Four hidden states (residual, normed, attention's and the MLP's result); queries, keys and values; the MLP's inner
    states. sizing.py says how this compares with an engine that NVIDIA measured.
    """
    return 4 * attention.hidden, attention.q_width + 2 * attention.kv_width + (3 if gated else 2) * width


# --- the families


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture's config.json is read. `defaults` are transformers', for what config.json leaves out."""

    defaults: dict[str, Any]
    shape: Callable[[_Values], ModelShape]
    aliases: dict[str, str] = field(default_factory=dict)


def _plain_attention(values: _Values, hidden_name: str, heads_name: str) -> _Attention:
    """Every head has keys and values of its own, and they divide the width among them. Raises as `values` does."""
    hidden, heads = values.number(hidden_name), values.number(heads_name)
    if hidden % heads:
        raise values.error(f"has {hidden_name} {hidden} for {heads} heads, which does not divide")
    return _Attention(hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads)


def _gpt2(values: _Values) -> ModelShape:
    attention = _plain_attention(values, "n_embd", "n_head")
    hidden = attention.hidden
    width = values.number_or("n_inner", 4 * hidden)
    if values.flag("add_cross_attention"):
        raise UnsupportedError(
            f"'{values.model}' has cross-attention, which belongs to an encoder; choose a model that is only a decoder"
        )
    vocab_size, positions = values.number("vocab_size"), values.number("n_positions")
    layer = (
        *attention.tensors(qkv_bias=True, output_bias=True),
        *_mlp("mlp", hidden, width, gated=False, bias=True),
        *_norms(hidden, 2, bias=True),
    )
    return ModelShape(
        architecture=values.architecture,
        hidden_size=hidden,
        num_attention_heads=attention.heads,
        num_kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        vocab_size=vocab_size,
        max_positions=positions,
        tensor_parallel_widths={"MLP width": width},
        activation_widths=_dense_activations(attention, width, gated=False),
        before=(
            Tensor("embedding", (vocab_size, hidden), "embedding", "vocab"),
            Tensor("positions", (positions, hidden), "embedding"),
        ),
        layers=(layer,) * values.number("n_layer"),
        after=_norms(hidden, 1, bias=True),
        head=Tensor("head", (vocab_size, hidden), "head", "vocab"),
        is_tied=values.flag("tie_word_embeddings"),
    )


_OPT_POSITION_OFFSET = 2  # OPTLearnedPositionalEmbedding: its table has two rows before the first position


def _opt(values: _Values) -> ModelShape:
    attention = _plain_attention(values, "hidden_size", "num_attention_heads")
    hidden = attention.hidden
    width, bias = values.number("ffn_dim"), values.flag("enable_bias")
    norm_copies = 1 if values.flag("layer_norm_elementwise_affine") else 0
    vocab_size, positions = values.number("vocab_size"), values.number("max_position_embeddings")
    embedding_width = values.number_or("word_embed_proj_dim", hidden)
    is_projected = embedding_width != hidden
    layer = (
        *attention.tensors(qkv_bias=bias, output_bias=bias),
        *_mlp("mlp", hidden, width, gated=False, bias=bias),
        *_norms(hidden, 2 * norm_copies, bias=True),
    )
    has_last_norm = values.flag("do_layer_norm_before") and not values.flag("_remove_final_layer_norm")
    project_in = (Tensor("projections", (hidden, embedding_width), "linear"),) if is_projected else ()
    project_out = (Tensor("projections", (embedding_width, hidden), "linear"),) if is_projected else ()
    return ModelShape(
        architecture=values.architecture,
        hidden_size=hidden,
        num_attention_heads=attention.heads,
        num_kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        vocab_size=vocab_size,
        max_positions=positions,
        tensor_parallel_widths={"MLP width": width},
        activation_widths=_dense_activations(attention, width, gated=False),
        before=(
            Tensor("embedding", (vocab_size, embedding_width), "embedding", "vocab"),
            Tensor("positions", (positions + _OPT_POSITION_OFFSET, hidden), "embedding"),
            *project_in,
        ),
        layers=(layer,) * values.number("num_hidden_layers"),
        after=(*_norms(hidden, norm_copies if has_last_norm else 0, bias=True), *project_out),
        head=Tensor("head", (vocab_size, embedding_width), "head", "vocab"),
        is_tied=values.flag("tie_word_embeddings"),
    )


@dataclass(frozen=True, kw_only=True)
class _FeedForward:
    """What follows the attention of a layer, and the numbers per token that live in it: on every rank, or divided."""

    tensors: Layer
    widths: dict[str, int]  # that tensor parallelism must divide
    whole_states: int = 0
    divided_states: int = 0


def _llama_like(
    *,
    qkv_bias: str | bool = False,
    output_bias: str | bool = False,
    mlp_bias: str | bool = False,
    qk_norms: bool = False,
    norms_per_layer: int = 2,
    feed_forward: Callable[[_Values, int, int], _FeedForward] | None = None,
    sliding: Callable[[_Values], int] = lambda values: 0,
) -> Callable[[_Values], ModelShape]:
    """Rotary positions, RMS norms, a gated MLP. A bias is there always, never, or as the named flag says.

    `feed_forward(values, layer, hidden)` describes what follows the attention of a layer, unless it is the gated MLP.
    `sliding(values)` is the number of layers with a window.
    """

    def has(values: _Values, bias: str | bool) -> bool:
        return values.flag(bias) if isinstance(bias, str) else bias

    def shape(values: _Values) -> ModelShape:
        attention = _attention(values)
        hidden, vocab_size = attention.hidden, values.number("vocab_size")
        layers: list[Layer] = []
        widths: dict[str, int] = {}
        whole_states = divided_states = 0
        attended = attention.tensors(
            qkv_bias=has(values, qkv_bias), output_bias=has(values, output_bias), norms=qk_norms
        )
        for index in range(values.number("num_hidden_layers")):
            if feed_forward is None:
                following = _gated_mlp(values, hidden, bias=has(values, mlp_bias))
            else:
                following = feed_forward(values, index, hidden)
            widths |= following.widths
            whole_states = max(whole_states, following.whole_states)
            divided_states = max(divided_states, following.divided_states)
            layers.append((*attended, *following.tensors, *_norms(hidden, norms_per_layer)))
        sliding_layers = sliding(values)
        return ModelShape(
            architecture=values.architecture,
            hidden_size=hidden,
            num_attention_heads=attention.heads,
            num_kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            vocab_size=vocab_size,
            max_positions=values.content.get("max_position_embeddings"),
            tensor_parallel_widths=widths,
            activation_widths=(
                4 * hidden + whole_states,
                attention.q_width + 2 * attention.kv_width + divided_states,
            ),
            before=(Tensor("embedding", (vocab_size, hidden), "embedding", "vocab"),),
            layers=tuple(layers),
            after=_norms(hidden, 1),
            head=Tensor("head", (vocab_size, hidden), "head", "vocab"),
            is_tied=values.flag("tie_word_embeddings"),
            sliding_layers=sliding_layers,
            window=values.number("sliding_window") if sliding_layers else None,
        )

    return shape


def _gated_mlp(values: _Values, hidden: int, *, bias: bool = False) -> _FeedForward:
    width = values.number("intermediate_size")
    return _FeedForward(
        tensors=_mlp("mlp", hidden, width, gated=True, bias=bias),
        widths={"MLP width": width},
        divided_states=3 * width,
    )


def _experts(values: _Values, hidden: int, *, number: str, width: str) -> _FeedForward:
    """Every token is copied to its experts: their inputs and results, and their inner states."""
    num_experts, expert_width = values.number(number), values.number(width)
    experts_per_token = values.number("num_experts_per_tok")
    return _FeedForward(
        tensors=(
            Tensor("router", (num_experts, hidden), "router"),
            *_mlp("experts", hidden, expert_width, gated=True, bias=False, copies=num_experts),
        ),
        widths={"expert width": expert_width},
        whole_states=experts_per_token * 2 * hidden,
        divided_states=experts_per_token * 3 * expert_width,
    )


def _mixtral_feed_forward(values: _Values, layer: int, hidden: int) -> _FeedForward:
    return _experts(values, hidden, number="num_local_experts", width="intermediate_size")


def _qwen3_moe_feed_forward(values: _Values, layer: int, hidden: int) -> _FeedForward:
    """Dense layers between sparse ones, as `mlp_only_layers` and `decoder_sparse_step` say."""
    is_sparse = layer not in (values.content.get("mlp_only_layers") or []) and values.number("num_experts", least=0)
    if not is_sparse or (layer + 1) % values.number("decoder_sparse_step"):
        return _gated_mlp(values, hidden)
    return _experts(values, hidden, number="num_experts", width="moe_intermediate_size")


def _qwen2_moe_feed_forward(values: _Values, layer: int, hidden: int) -> _FeedForward:
    """The same, with an expert that every token goes to, and a gate for it."""
    found = _qwen3_moe_feed_forward(values, layer, hidden)
    if "expert width" not in found.widths:
        return found
    width = values.number("shared_expert_intermediate_size")
    shared = _mlp("shared expert", hidden, width, gated=True, bias=False)
    return _FeedForward(
        tensors=(*found.tensors, *shared, Tensor("router", (1, hidden), "router")),
        widths=found.widths | {"shared expert width": width},
        whole_states=found.whole_states,
        divided_states=found.divided_states + 3 * width,
    )


def _listed_sliding(values: _Values) -> int | None:
    """Layers that `layer_types` of config.json calls sliding; None where it has no such list."""
    types = values.content.get("layer_types")
    return None if types is None else sum(kind == "sliding_attention" for kind in types)


def _always_sliding(values: _Values) -> int:
    """Mistral, Mixtral, Phi-3: every layer, unless there is no window."""
    return values.number("num_hidden_layers") if values.content.get("sliding_window") is not None else 0


def _qwen_sliding(values: _Values) -> int:
    """Layers from `max_window_layers` on, if the window is used at all."""
    if not values.flag("use_sliding_window") or values.content.get("sliding_window") is None:
        return 0
    listed = _listed_sliding(values)
    above = max(0, values.number("num_hidden_layers") - values.number("max_window_layers", least=0))
    return above if listed is None else listed


def _qwen3_moe_sliding(values: _Values) -> int:
    return _always_sliding(values) if values.flag("use_sliding_window") else 0


def _alternating(values: _Values, every: int) -> int:
    """All layers but each `every`-th have a window."""
    num_layers, listed = values.number("num_hidden_layers"), _listed_sliding(values)
    return num_layers - num_layers // every if listed is None else listed


def _gemma2_sliding(values: _Values) -> int:
    return _alternating(values, 2)


def _gemma3_sliding(values: _Values) -> int:
    return _alternating(values, values.number_or("sliding_window_pattern", 6))


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
}
_MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}
_QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN2_MOE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "qkv_bias": True,
}
_QWEN3_MOE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}
_GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}
_PHI3 = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "sliding_window": None,
}

ARCHITECTURES: dict[str, Family] = {
    "GPT2LMHeadModel": Family(
        defaults={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        shape=_gpt2,
    ),
    "OPTForCausalLM": Family(
        defaults={
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "ffn_dim": 3072,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": None,
            "num_attention_heads": 12,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "tie_word_embeddings": True,
        },
        shape=_opt,
    ),
    "LlamaForCausalLM": Family(
        defaults=_LLAMA,
        shape=_llama_like(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    ),
    "MistralForCausalLM": Family(defaults=_MISTRAL, shape=_llama_like(sliding=_always_sliding)),
    "MixtralForCausalLM": Family(
        defaults=_MISTRAL | {"sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8},
        shape=_llama_like(feed_forward=_mixtral_feed_forward, sliding=_always_sliding),
    ),
    "Qwen2ForCausalLM": Family(defaults=_QWEN2, shape=_llama_like(qkv_bias=True, sliding=_qwen_sliding)),
    "Qwen2MoeForCausalLM": Family(
        defaults=_QWEN2_MOE,
        shape=_llama_like(qkv_bias="qkv_bias", feed_forward=_qwen2_moe_feed_forward, sliding=_qwen_sliding),
    ),
    "Qwen3ForCausalLM": Family(
        defaults=_QWEN2 | {"head_dim": 128, "attention_bias": False},
        shape=_llama_like(
            qkv_bias="attention_bias", output_bias="attention_bias", qk_norms=True, sliding=_qwen_sliding
        ),
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults=_QWEN3_MOE,
        shape=_llama_like(
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            qk_norms=True,
            feed_forward=_qwen3_moe_feed_forward,
            sliding=_qwen3_moe_sliding,
        ),
    ),
    "GemmaForCausalLM": Family(
        defaults=_GEMMA, shape=_llama_like(qkv_bias="attention_bias", output_bias="attention_bias")
    ),
    "Gemma2ForCausalLM": Family(
        defaults=_GEMMA2,
        shape=_llama_like(
            qkv_bias="attention_bias", output_bias="attention_bias", norms_per_layer=4, sliding=_gemma2_sliding
        ),
    ),
    "Gemma3ForCausalLM": Family(
        defaults=_GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072},
        shape=_llama_like(
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            qk_norms=True,
            norms_per_layer=4,
            sliding=_gemma3_sliding,
        ),
    ),
    "Phi3ForCausalLM": Family(defaults=_PHI3, shape=_llama_like(sliding=_always_sliding)),
}
