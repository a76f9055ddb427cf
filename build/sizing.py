"""Does a model fit on GPUs? Bytes per rank, what is left for the KV cache, and the fewest GPUs that do.

One rank is one GPU. Of its memory the driver keeps a part; weights, activations and the runtime's buffers take theirs;
the KV cache gets KV_CACHE_FRACTION of what is then free. Weights and KV cache are arithmetic on shapes. The rest is
estimated, and `BASIS` says from what. Bytes are bytes, lengths are tokens.

The estimates are compared with the log of a Llama 2 7B engine, FP8, on an H100, in TensorRT-LLM's own documentation
("Memory Usage of TensorRT-LLM", FAQ 1, https://nvidia.github.io/TensorRT-LLM/reference/memory.html; called log A below)
and in its benchmark's README of July 2024 (benchmarks/README.md, the same model with 4096 sequences; log B).
tests/unit/test_sizing.py holds both. No engine was run for this.

What is not covered: LoRA, speculative decoding, expert and context parallelism, several nodes, logits of whole prompts,
the memory that building an engine takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from errors import UsageError
from gpu_products import GpuProduct, refusal
from model_shape import ModelShape, Tensor
from plan import EngineLimits

MIB = 1 << 20
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
KV_BYTES = DTYPE_BYTES | {"fp8": 1, "int8": 1}

# KvCacheConfig.free_gpu_memory_fraction of TensorRT-LLM 1.2.1. Log A: 63.44 of 70.48 GiB.
KV_CACHE_FRACTION = 0.9
# KvCacheConfig.tokens_per_block and PluginConfig.tokens_per_block of 1.2.1: a sequence takes whole blocks.
TOKENS_PER_BLOCK = 32
# BuildConfig.max_num_tokens of 1.2.1: tokens of one step, for which the activations are laid out.
MAX_NUM_TOKENS = 8192
# What nvidia-smi counts and CUDA cannot have. They say 81559 and 80998 MiB on an H100 (log A); in other public logs
# 81920 and 81152 on an A100, 143771 and 143155 on an H200, 183359 and 182642 on a B200, 23028 and 22559 on an A10G.
DRIVER_FRACTION, DRIVER_MOST_BYTES = 0.021, 768 * MIB
# CUDA context and libraries: log A without engine, activations, buffers and decoder: 8827 - 6695 - 1134 - 43 - 180 MiB.
CONTEXT_BYTES = 775 * MIB
# Logits, sampling and stop words of each sequence. Log B: 1.14 + 4.35 GiB for 4096 sequences and 32000 tokens.
BUFFER_BYTES_PER_SEQUENCE_AND_TOKEN_ID = 45
# Between ranks: 32 channels, each with a sending and a receiving buffer of NCCL_BUFFSIZE, 4 MiB by default.
COMMUNICATION_BYTES = 2 * 32 * 4 * MIB
# Fusion and workspaces. The widths of model_shape.py give 964 MiB where log B has 929 and log A 1134.
ACTIVATION_MARGIN = 1.2
# Mapping(gpus_per_node=8) of 1.2.1, and the most that one node has (p4d, p5, DGX).
MOST_GPUS = 8

BASIS = (
    "parameters, weights and KV cache: arithmetic on the shapes in config.json",
    f"activations: the widest layer at {MAX_NUM_TOKENS} tokens, and a fifth more; checked against NVIDIA's published "
    "logs of one engine (Llama 2 7B, FP8, H100)",
    "reserve: the driver's part, CUDA context and buffers as in those logs; 256 MiB for NCCL between GPUs",
    f"KV cache: {KV_CACHE_FRACTION:.0%} of what is free, TensorRT-LLM's default; blocks of {TOKENS_PER_BLOCK} tokens",
)


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How weights are stored: `bits` of a linear layer's numbers, `table_bits` of embeddings and head; 0: the dtype's.

    A scale of two bytes, and with `zero_bits` a zero point, belongs to each `group` of numbers, or to each output
    channel where `group` is 0. FP8 has one scale per tensor, which is nothing.
    """

    bits: int = 0
    table_bits: int = 0
    group: int = 0
    has_scales: bool = False
    zero_bits: int = 0


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    "none": WeightFormat(),
    "int8": WeightFormat(bits=8, has_scales=True),  # W8A16
    "int4": WeightFormat(bits=4, has_scales=True),  # W4A16
    "int8_sq": WeightFormat(bits=8, has_scales=True),  # W8A8_SQ_PER_CHANNEL
    "fp8": WeightFormat(bits=8),
    "int4_awq": WeightFormat(bits=4, has_scales=True, group=128),  # W4A16_AWQ; QuantConfig.group_size 128
    "int4_gptq": WeightFormat(bits=4, has_scales=True, group=128, zero_bits=4),  # of a checkpoint quantized already
    "nvfp4": WeightFormat(bits=4, has_scales=True, group=32),  # one byte per 16 numbers
}
# What NNCF makes (compilers/openvino_compiler.py): tables in 8 bits too, zero points beside the scales.
OPENVINO_FORMATS: dict[str, WeightFormat] = {
    "none": WeightFormat(),
    "int8": WeightFormat(bits=8, table_bits=8, has_scales=True, zero_bits=8),
    "int4": WeightFormat(bits=4, table_bits=8, has_scales=True, group=128, zero_bits=4),
}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`dtype` of what is not quantized, a name in WEIGHT_FORMATS, and a name in KV_BYTES."""

    dtype: str
    weights: str = "none"
    kv_cache: str

    @property
    def kv_bytes_per_number(self) -> int:
        return KV_BYTES[self.kv_cache]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Tensor parallel by pipeline parallel: `tp` GPUs share each layer, `pp` stages of layers follow one another."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.tp}x{self.pp}"


@dataclass(frozen=True, kw_only=True)
class RankSize:
    """What one GPU of a pipeline stage holds, whatever GPU it is. All ranks of a stage hold the same."""

    stage: int
    num_layers: int
    weight_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    buffer_bytes: int  # context, buffers of sequences, communication


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One layout on one product. The numbers are those of the rank that has room for the fewest tokens."""

    layout: Layout
    weight_bytes: int
    activation_bytes: int
    reserve_bytes: int  # driver, context, buffers, communication
    kv_bytes: int  # what is left for the KV cache; 0 where nothing is
    kv_bytes_per_token: int
    tokens: int
    sequences: int  # of max_seq_len tokens each
    fits: bool  # at least one sequence
    holds_all: bool  # max_batch_size sequences


@dataclass(frozen=True, kw_only=True)
class GpuSizing:
    """All layouts on one product, or why there is none."""

    gpu: GpuProduct
    refusal: str | None
    asked: Fit | None  # the --tp and --pp of the command line
    recommended: Fit | None  # fewest GPUs that fit; of those the most tensor parallel, which answers soonest
    recommended_for_all: Fit | None  # fewest GPUs that hold max_batch_size sequences at their longest
    fits: tuple[Fit, ...]


# --- bytes


def weight_bytes(tensor: Tensor, precision: Precision, formats: Mapping[str, WeightFormat] = WEIGHT_FORMATS) -> int:
    """Of a whole tensor, scales included."""
    form = formats[precision.weights]
    bits = {"linear": form.bits, "embedding": form.table_bits, "head": form.table_bits}.get(tensor.kind, 0)
    if not bits:
        return tensor.numbers * DTYPE_BYTES[precision.dtype]
    num_groups = ceil(tensor.numbers / form.group) if form.group and bits == form.bits else tensor.rows
    scale_bytes = num_groups * (16 + form.zero_bits) / 8 if form.has_scales else 0
    return ceil(tensor.numbers * bits / 8 + scale_bytes)


def model_bytes(shape: ModelShape, precision: Precision, formats: Mapping[str, WeightFormat] = WEIGHT_FORMATS) -> int:
    """Of all weights, a tied table once."""
    tensors = [*shape.before, *(tensor for layer in shape.layers for tensor in layer), *shape.after]
    tensors += [] if shape.is_tied else [shape.head]
    return sum(weight_bytes(tensor, precision, formats) for tensor in tensors)


def kv_bytes_per_token(shape: ModelShape, precision: Precision) -> int:
    """Of all layers, each counted in full, also those with a window."""
    return shape.num_layers * shape.kv_numbers_per_token_and_layer * precision.kv_bytes_per_number


def kv_heads_per_rank(shape: ModelShape, tp: int) -> int:
    """More ranks than KV heads: each has a copy of one (tensorrt_llm/layers/attention.py, dup_kv_weight)."""
    return ceil(shape.num_kv_heads / tp)


def stages(num_layers: int, pp: int) -> list[int]:
    """Layers of each pipeline stage; what does not divide goes to the first ones (Mapping.pp_layers of 1.2.1)."""
    return [num_layers // pp + (1 if stage < num_layers % pp else 0) for stage in range(pp)]


def rank_sizes(
    shape: ModelShape, precision: Precision, limits: EngineLimits, layout: Layout, *, is_table_divided: bool
) -> list[RankSize]:
    """One entry per pipeline stage. `is_table_divided`: the embedding over the ranks, as the pytorch kind does it.

    On one GPU a tied table counts once: the builder lets embedding and head share it. A whole embedding and a divided
    head cannot, nor can those of two stages, so it then counts twice.
    """

    def of_rank(tensor: Tensor) -> int:
        whole = weight_bytes(tensor, precision)
        if tensor.split == "none" or (tensor.kind == "embedding" and not is_table_divided):
            return whole
        if tensor.split == "kv":
            return _share(whole, kv_heads_per_rank(shape, layout.tp), shape.num_kv_heads)
        if tensor.split == "vocab":
            return _share(whole, ceil(shape.vocab_size / layout.tp), shape.vocab_size)
        return _share(whole, 1, layout.tp)

    shares_table = shape.is_tied and layout.pp == 1 and (layout.tp == 1 or is_table_divided)
    whole_width, divided_width = shape.activation_widths
    states = whole_width + divided_width / layout.tp
    activation_bytes = ceil(ACTIVATION_MARGIN * MAX_NUM_TOKENS * states * DTYPE_BYTES[precision.dtype])
    num_sequences = limits.max_batch_size * limits.max_beam_width
    buffer_bytes = CONTEXT_BYTES + num_sequences * shape.vocab_size * BUFFER_BYTES_PER_SEQUENCE_AND_TOKEN_ID
    buffer_bytes += COMMUNICATION_BYTES if layout.gpus > 1 else 0
    kv_per_layer = 2 * kv_heads_per_rank(shape, layout.tp) * shape.head_dim * precision.kv_bytes_per_number
    sizes, first_layer = [], 0
    for stage, num_layers in enumerate(stages(shape.num_layers, layout.pp)):
        tensors = [tensor for layer in shape.layers[first_layer : first_layer + num_layers] for tensor in layer]
        first_layer += num_layers
        tensors += shape.before if stage == 0 else ()
        if stage == layout.pp - 1:
            tensors += (*shape.after, *(() if shares_table else (shape.head,)))
        sizes.append(
            RankSize(
                stage=stage,
                num_layers=num_layers,
                weight_bytes=sum(of_rank(tensor) for tensor in tensors),
                kv_bytes_per_token=num_layers * kv_per_layer,
                activation_bytes=activation_bytes,
                buffer_bytes=buffer_bytes,
            )
        )
    return sizes


def _share(whole: int, numerator: int, denominator: int) -> int:
    """Rounded up, in integers: a float would round a third of a gigabyte up by one."""
    return -(-whole * numerator // denominator)


# --- which layouts there are


def legal_tensor_parallel(shape: ModelShape, weights: str = "none") -> list[int]:
    """Divides the attention heads and the MLPs' widths; and the KV heads, or is a multiple of them.

    With AWQ each rank's columns are whole groups too. Empty where not even one rank has that.
    """
    return [tp for tp in range(1, shape.num_attention_heads + 1) if _not_dividing(shape, tp, weights) is None]


def _not_dividing(shape: ModelShape, tp: int, weights: str) -> str | None:
    """Ends the sentence "--tp N ...", for a number of ranks that cannot be."""
    if shape.num_attention_heads % tp:
        return f"does not divide the {shape.num_attention_heads} attention heads"
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        return f"neither divides the {shape.num_kv_heads} KV heads nor is a multiple of them, in the attention"
    group = WEIGHT_FORMATS[weights].group if weights == "int4_awq" else 1
    for name, width in (shape.tensor_parallel_widths | {"width of attention": shape.attention_width}).items():
        if width % tp:
            return f"does not divide the {name}, {width},"
        if width // tp % group:
            return f"gives each rank {width // tp} of the {name}, no whole groups of {group} for {weights},"
    return None


def even_pipeline_parallel(shape: ModelShape) -> list[int]:
    return [pp for pp in range(1, shape.num_layers + 1) if shape.num_layers % pp == 0]


def check_layout(shape: ModelShape, layout: Layout, model: str, weights: str = "none") -> list[str]:
    """Raises UsageError for what cannot be divided; returns notes about what can, but not evenly."""
    problem = _not_dividing(shape, layout.tp, weights)
    if problem is not None:
        legal = legal_tensor_parallel(shape, weights)
        remedy = f"use {_or(legal)}" if legal else "use --quantization int4, which has no groups"
        raise UsageError(f"--tp {layout.tp} {problem} of '{model}'; {remedy}")
    if layout.pp > shape.num_layers:
        raise UsageError(
            f"--pp {layout.pp} is more than the {shape.num_layers} layers of '{model}'; use at most {shape.num_layers}"
        )
    notes = []
    if shape.num_layers % layout.pp:
        counts = ", ".join(map(str, stages(shape.num_layers, layout.pp)))
        notes.append(
            f"--pp {layout.pp} does not divide the {shape.num_layers} layers, so its stages have {counts}; "
            f"{_or(even_pipeline_parallel(shape))} would"
        )
    if shape.vocab_size % layout.tp:
        padded = ceil(shape.vocab_size / layout.tp) * layout.tp
        notes.append(
            f"--tp {layout.tp} does not divide the vocabulary of {shape.vocab_size}, so the head is padded to {padded}"
        )
    if layout.tp > shape.num_kv_heads:
        notes.append(
            f"--tp {layout.tp} is more than the {shape.num_kv_heads} KV heads, so "
            f"{layout.tp // shape.num_kv_heads} ranks hold the KV cache of the same head"
        )
    return notes


def _or(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def layouts(shape: ModelShape, weights: str = "none", most_gpus: int = MOST_GPUS) -> Iterator[Layout]:
    """Even ones on one node, fewest GPUs first, of those the most tensor parallel first."""
    tp_values = [tp for tp in legal_tensor_parallel(shape, weights) if tp <= most_gpus]
    found = [Layout(tp=tp, pp=pp) for tp in tp_values for pp in even_pipeline_parallel(shape)]
    yield from sorted(
        (layout for layout in found if layout.gpus <= most_gpus), key=lambda layout: (layout.gpus, -layout.tp)
    )


# --- does it fit


def fit(gpu: GpuProduct, layout: Layout, sizes: Sequence[RankSize], limits: EngineLimits) -> Fit:
    """The tightest rank decides: a token needs its place on every rank."""
    total = gpu.memory_mib * MIB
    driver_bytes = min(int(total * DRIVER_FRACTION), DRIVER_MOST_BYTES)
    blocks_per_sequence = ceil(limits.max_seq_len / TOKENS_PER_BLOCK)

    def kv_bytes(size: RankSize) -> int:
        free = total - driver_bytes - size.buffer_bytes - size.activation_bytes - size.weight_bytes
        return max(0, int(free * KV_CACHE_FRACTION))

    def blocks(size: RankSize) -> int:
        return kv_bytes(size) // (size.kv_bytes_per_token * TOKENS_PER_BLOCK)

    tightest = min(sizes, key=lambda size: (blocks(size), -size.weight_bytes))
    sequences = blocks(tightest) // blocks_per_sequence
    return Fit(
        layout=layout,
        weight_bytes=tightest.weight_bytes,
        activation_bytes=tightest.activation_bytes,
        reserve_bytes=driver_bytes + tightest.buffer_bytes,
        kv_bytes=kv_bytes(tightest),
        kv_bytes_per_token=tightest.kv_bytes_per_token,
        tokens=blocks(tightest) * TOKENS_PER_BLOCK,
        sequences=sequences,
        fits=sequences >= 1,
        holds_all=sequences >= limits.max_batch_size,
    )


def size_gpu(
    gpu: GpuProduct,
    shape: ModelShape,
    precision: Precision,
    limits: EngineLimits,
    asked: Layout,
    *,
    engine: Literal["tensorrt", "pytorch"],
) -> GpuSizing:
    refused = refusal(gpu, engine=engine, weights=precision.weights, kv_cache=precision.kv_cache)
    if refused is not None:
        return GpuSizing(gpu=gpu, refusal=refused, asked=None, recommended=None, recommended_for_all=None, fits=())

    def fit_of(layout: Layout) -> Fit:
        sizes = rank_sizes(shape, precision, limits, layout, is_table_divided=engine == "pytorch")
        return fit(gpu, layout, sizes, limits)

    found = tuple(fit_of(layout) for layout in layouts(shape, precision.weights))
    return GpuSizing(
        gpu=gpu,
        refusal=None,
        asked=fit_of(asked),
        recommended=next((each for each in found if each.fits), None),
        recommended_for_all=next((each for each in found if each.holds_all), None),
        fits=found,
    )


# --- what the checkpoint says about its precision


def checkpoint_format(config: Mapping[str, Any]) -> str | None:
    """The name in WEIGHT_FORMATS of a checkpoint that is quantized already.

    None where it is not; "unknown" where config.json says so in a way that is not known here.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    method, bits = str(quantization.get("quant_method", "")).lower(), quantization.get("bits")
    algorithm = str(quantization.get("quant_algo", "")).lower()
    if method in ("awq", "gptq") and bits == 4:
        return f"int4_{method}"
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8"
    if method == "modelopt" and algorithm in ("fp8", "nvfp4"):
        return algorithm
    return "unknown"


def checkpoint_kv_cache(config: Mapping[str, Any]) -> str | None:
    """The type that a quantized checkpoint has scales for, which TensorRT-LLM then takes; None: the dtype's own."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    algorithm = str(quantization.get("kv_cache_quant_algo") or "").lower()
    if algorithm in ("fp8", "int8"):
        return algorithm
    scheme = quantization.get("kv_cache_scheme")  # ModelOpt's own way to say it in config.json
    if isinstance(scheme, dict) and scheme.get("num_bits") == 8:
        return "fp8" if scheme.get("type") == "float" else "int8"
    return None
