"""What --plan says about sizes: one JSON object for programs, tables for people.

    sizes = size_plan(plan, config, machine_gpus)      {"parameters": ..., "weights": ..., "gpus": [...], ...}
    print("\\n".join(in_words(sizes)))

Bytes and tokens in JSON, GB (1e9 bytes) and GiB in the tables, as nvidia-smi counts memory in MiB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errors import UnsupportedError, UsageError
from gpu_products import GPU_PRODUCTS, find_product, product_of
from gpus import Gpu
from model_shape import ModelShape, model_shape
from plan import GPU_ENGINES, EnginePlan
from sizing import (
    BASIS,
    DTYPE_BYTES,
    MOST_GPUS,
    OPENVINO_FORMATS,
    Fit,
    GpuSizing,
    Layout,
    Precision,
    check_layout,
    checkpoint_format,
    checkpoint_kv_cache,
    even_pipeline_parallel,
    kv_bytes_per_token,
    legal_tensor_parallel,
    model_bytes,
    size_gpu,
)

GIB = 1 << 30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, cgroup v2; "max" where it has none


def size_plan(plan: EnginePlan, config: Mapping[str, Any], machine_gpus: Sequence[Gpu] = ()) -> dict[str, Any]:
    """The sizes of `plan` for the checkpoint that `config` describes, as plain JSON data.

    `machine_gpus` are those of this machine, if they were looked for. For a CPU engine of an architecture that is not
    in the table, `unknown` is the sentence, and there is nothing else. Raises UnsupportedError for such an architecture
    on GPUs and for a `plan.gpu` that cannot hold such weights, UsageError for a layout or a product that cannot be.
    """
    try:
        shape = model_shape(config, plan.model)
    except UnsupportedError as error:
        if plan.engine in GPU_ENGINES:
            raise
        return {"unknown": str(error)}
    sizes = _sizes_of_model(shape, plan)
    return sizes | (_on_gpus(shape, plan, config, machine_gpus) if plan.engine in GPU_ENGINES else _on_cpu(shape, plan))


def _sizes_of_model(shape: ModelShape, plan: EnginePlan) -> dict[str, Any]:
    return {
        "parameters": {
            "total": shape.num_parameters,
            "components": shape.parameters,
            "is_head_tied": shape.is_tied,
        },
        "shape": {
            "hidden_size": shape.hidden_size,
            "num_layers": shape.num_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab_size,
            "sliding_layers": shape.sliding_layers,
            "window": shape.window,
        },
        "lengths": asdict(plan.limits),
    }


def _weights_and_cache(shape: ModelShape, plan: EnginePlan, precision: Precision, **formats: Any) -> dict[str, Any]:
    per_token = kv_bytes_per_token(shape, precision)
    return {
        "weights": {
            "dtype": precision.dtype,
            "format": precision.weights,
            "bytes": model_bytes(shape, precision, **formats),
        },
        "kv_cache": {
            "dtype": precision.kv_cache,
            "bytes_per_token": per_token,
            "bytes_per_sequence": per_token * plan.limits.max_seq_len,
        },
    }


def _window_note(shape: ModelShape, plan: EnginePlan) -> list[str]:
    if not shape.sliding_layers or shape.window is None or shape.window >= plan.limits.max_seq_len:
        return []
    return [
        f"{shape.sliding_layers} of {shape.num_layers} layers look back {shape.window} tokens only; their KV cache is "
        f"counted in full for all {plan.limits.max_seq_len}, so there may be room for more"
    ]


# --- on a CPU


def _on_cpu(shape: ModelShape, plan: EnginePlan) -> dict[str, Any]:
    if plan.engine == "synthetic":
        return {"notes": ["a synthetic engine holds no weights; the numbers are the checkpoint's"]}
    # compilers/openvino_compiler.py: a float32 engine has a float32 cache, the others one of 16 bits.
    precision = Precision(
        dtype=plan.dtype,
        weights=plan.quantization,
        kv_cache="float32" if plan.dtype == "float32" else "float16",
    )
    found = _weights_and_cache(shape, plan, precision, formats=OPENVINO_FORMATS)
    needed = found["weights"]["bytes"] + found["kv_cache"]["bytes_per_sequence"] * plan.limits.max_batch_size
    machine_bytes = _machine_bytes()
    groups = ["4-bit weights as if all had groups of 128; NNCF takes smaller ones where 128 does not divide a layer"]
    return found | {
        "machine": {
            "memory_bytes": machine_bytes,
            "needed_bytes": needed,
            "fits": needed <= machine_bytes,
            "fits_one_sequence": found["weights"]["bytes"] + found["kv_cache"]["bytes_per_sequence"] <= machine_bytes,
        },
        "basis": [
            "arithmetic on the shapes in config.json; activations, libraries and compiling take memory besides",
            *(groups if plan.quantization == "int4" else []),
        ],
        "notes": _window_note(shape, plan),
    }


def _machine_bytes() -> int:
    """The machine's memory, or what this container may have of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


# --- on GPUs


def _on_gpus(
    shape: ModelShape, plan: EnginePlan, config: Mapping[str, Any], machine_gpus: Sequence[Gpu]
) -> dict[str, Any]:
    weights, notes = _format(plan, config)
    precision = Precision(
        dtype=plan.dtype,
        weights=weights,
        kv_cache=(
            (checkpoint_kv_cache(config) or plan.dtype) if plan.kv_cache_dtype == "auto" else plan.kv_cache_dtype
        ),
    )
    asked = Layout(tp=plan.tensor_parallel, pp=plan.pipeline_parallel)
    notes += check_layout(shape, asked, plan.model, weights)
    notes += _precision_notes(plan, precision)
    here = product_of(machine_gpus)
    if plan.gpu is not None:
        products = [here] if here is not None and here.product == plan.gpu else [find_product(plan.gpu)]
        detailed = products[0].product
    else:
        others = [product for product in GPU_PRODUCTS if here is None or product.product != here.product]
        products = ([here] if here is not None else []) + others
        detailed = here.product if here is not None else None
    sized = [size_gpu(product, shape, precision, plan.limits, asked, engine=plan.engine) for product in products]
    if plan.gpu is not None and (refused := sized[0].refusal) is not None:
        raise UnsupportedError(refused)
    return _weights_and_cache(shape, plan, precision) | {
        "legal": {
            "tensor_parallel": legal_tensor_parallel(shape, weights),
            "pipeline_parallel": even_pipeline_parallel(shape),
        },
        "asked": {"tensor_parallel": asked.tp, "pipeline_parallel": asked.pp},
        "detailed": detailed,
        "gpus": [_gpu_in_json(each, plan) for each in sized],
        "basis": list(BASIS),
        "notes": notes + _window_note(shape, plan),
    }


def _format(plan: EnginePlan, config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The format of the weights: what was asked for, or what the checkpoint has already."""
    own = checkpoint_format(config)
    if own is None:
        return plan.quantization, []
    if plan.quantization != "none":
        raise UsageError(
            f"--quantization {plan.quantization} is for full weights, and '{plan.model}' is quantized already; "
            "leave it out, or use the checkpoint that it was made from"
        )
    if own == "unknown":
        return "none", [
            "config.json has a quantization_config that is not known here; weights are counted as "
            f"{plan.dtype}, {DTYPE_BYTES[plan.dtype]} bytes each, which is more than they take"
        ]
    return own, [f"the checkpoint is quantized already: {own}"]


def _precision_notes(plan: EnginePlan, precision: Precision) -> list[str]:
    """What TensorRT-LLM 1.2.1 makes of a combination, beside its size."""
    notes = []
    if plan.engine == "pytorch":
        notes.append(
            "the logs behind the estimates are of TensorRT engines; CUDA graphs of the pytorch kind are not in them"
        )
    if plan.engine == "pytorch" and plan.quantization != "none":
        notes.append(
            "the pytorch kind loads checkpoints that are quantized already; size is all that is said here about "
            f"--quantization {plan.quantization}"
        )
    kv_cache = precision.kv_cache
    if plan.engine == "tensorrt" and (
        kv_cache == "int8" or (kv_cache == "fp8" and precision.weights not in ("fp8", "nvfp4"))
    ):
        # tensorrt_llm/builder.py of 1.2.1 switches use_paged_context_fmha off.
        notes.append(
            f"with a KV cache in {kv_cache} and these weights an engine neither reuses KV blocks nor splits prefills "
            "into chunks"
        )
    return notes


def _fit_in_json(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    found = asdict(fit)
    layout = found.pop("layout")
    return {"tensor_parallel": layout["tp"], "pipeline_parallel": layout["pp"], "gpus": fit.layout.gpus, **found}


def _verdict(sized: GpuSizing, plan: EnginePlan) -> str:
    """Whether --tp and --pp as asked fit, and what to use, in a sentence."""
    if sized.refusal is not None or sized.asked is None:
        return f"refused: {sized.refusal}"
    product, asked, best = sized.gpu.product, sized.asked, sized.recommended
    of = f"sequences of {plan.limits.max_seq_len} tokens"
    layout = f"--tp {asked.layout.tp} --pp {asked.layout.pp}"
    if asked.fits:
        said = f"{layout} fits on {product}, with room for {asked.sequences} {of}"
        wanted = plan.limits.max_batch_size
        if not asked.holds_all and sized.recommended_for_all is not None:
            more = sized.recommended_for_all.layout
            said += f"; all {wanted} at their longest need --tp {more.tp} --pp {more.pp}"
        if best is not None and best.layout.gpus < asked.layout.gpus:
            said += f"; fewer GPUs do: --tp {best.layout.tp} --pp {best.layout.pp}"
        return said
    taken = asked.weight_bytes + asked.activation_bytes + asked.reserve_bytes
    said = (
        f"{layout} does not fit on {product}: of {sized.gpu.memory_mib / 1024:.1f} GiB, weights, activations and "
        f"reserve take {taken / GIB:.1f}, and what is left holds no sequence of {plan.limits.max_seq_len} tokens"
    )
    if best is None:
        return f"{said}; nor does any layout of up to {MOST_GPUS} of them; use --quantization, or a larger GPU"
    return f"{said}; use --tp {best.layout.tp} --pp {best.layout.pp}"


def _gpu_in_json(sized: GpuSizing, plan: EnginePlan) -> dict[str, Any]:
    return {
        "product": sized.gpu.product,
        "compute_capability": sized.gpu.compute_capability,
        "memory_mib": sized.gpu.memory_mib,
        "supports": list(sized.gpu.supports),
        "refused": sized.refusal,
        "verdict": _verdict(sized, plan),
        "asked": _fit_in_json(sized.asked),
        "recommended": _fit_in_json(sized.recommended),
        "recommended_for_all": _fit_in_json(sized.recommended_for_all),
        "layouts": [_fit_in_json(fit) for fit in sized.fits],
    }


# --- in words


def in_words(sizes: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal, after those that say what the plan is."""
    if "unknown" in sizes:
        return [f"parameters     {sizes['unknown']}"]
    components = {name: count for name, count in sizes["parameters"]["components"].items() if count}
    tied = ", head tied to embedding" if sizes["parameters"]["is_head_tied"] else ""
    listed = ", ".join(f"{name} {_short(count)}" for name, count in components.items())
    lines = [f"parameters     {sizes['parameters']['total']:,} ({listed}{tied})"]
    if "weights" in sizes:
        weights, cache, shape = sizes["weights"], sizes["kv_cache"], sizes["shape"]
        form = weights["dtype"] if weights["format"] == "none" else f"{weights['format']} and {weights['dtype']}"
        lines += [
            f"weights        {_gb(weights['bytes'])} in {form}",
            f"KV cache       {cache['bytes_per_token']:,} bytes a token in {cache['dtype']} ({shape['num_layers']} "
            f"layers, {shape['num_kv_heads']} KV heads of {shape['head_dim']}), {_gb(cache['bytes_per_sequence'])} a "
            f"sequence of {sizes['lengths']['max_seq_len']}",
        ]
    if "machine" in sizes:
        lines.append(f"memory         {_machine_in_words(sizes)}")
    if "gpus" in sizes:
        lines += _gpus_in_words(sizes)
    lines += [f"note           {note}" for note in sizes.get("notes", [])]
    lines += [f"{'estimated' if index == 0 else '':<15}{line}" for index, line in enumerate(sizes.get("basis", []))]
    return lines


def _machine_in_words(sizes: Mapping[str, Any]) -> str:
    machine = sizes["machine"]
    has = f"this machine has {machine['memory_bytes'] / GIB:.1f} GiB"
    needs = f"weights and KV cache of {sizes['lengths']['max_batch_size']} sequences at their longest take "
    needs += f"{machine['needed_bytes'] / GIB:.1f} GiB"
    if machine["fits"]:
        return f"{has}; {needs}"
    if machine["fits_one_sequence"]:
        return f"{has}; {needs}, so fewer of them will run at the same time"
    return f"{has}, too little; {needs}; use --quantization, --dtype bfloat16 or a shorter --max-seq-len"


def _gpus_in_words(sizes: Mapping[str, Any]) -> list[str]:
    legal = ", ".join(map(str, sizes["legal"]["tensor_parallel"]))
    lines = [f"layouts        --tp {legal}; --pp divides {sizes['shape']['num_layers']} layers"]
    lines += ["", *_product_table(sizes)]
    detailed = next((gpu for gpu in sizes["gpus"] if gpu["product"] == sizes["detailed"]), None)
    if detailed is not None and detailed["refused"] is None:
        lines += ["", f"{detailed['verdict']}.", "", *_layout_table(detailed, sizes)]
    if detailed is None:
        lines += ["", "--gpu PRODUCT shows every layout on one of them."]
    return [*lines, ""]


_NUMBERS = ("TPxPP", "weights", "reserve", "KV cache", "tokens", "sequences")


def _numbers(fit: Mapping[str, Any]) -> tuple[str, ...]:
    """Of one GPU of the layout, in GiB, activations within the reserve; tokens and sequences of the whole layout."""
    sizes = (fit["weight_bytes"], fit["activation_bytes"] + fit["reserve_bytes"], fit["kv_bytes"])
    return (
        f"{fit['tensor_parallel']}x{fit['pipeline_parallel']}",
        *(f"{size / GIB:.2f}" for size in sizes),
        f"{fit['tokens']:,}",
        f"{fit['sequences']:,}",
    )


def _product_table(sizes: Mapping[str, Any]) -> list[str]:
    """One line per product, with the fewest GPUs that fit."""
    wanted = sizes["lengths"]["max_batch_size"]
    asked = sizes["asked"]
    asked_name = f"{asked['tensor_parallel']}x{asked['pipeline_parallel']}"
    header = ("GPU", "GiB", "cc", *_NUMBERS, asked_name, f"all {wanted}", "also")
    rows, refused = [], []
    for gpu in sizes["gpus"]:
        start = (gpu["product"], f"{gpu['memory_mib'] / 1024:.1f}", gpu["compute_capability"])
        if gpu["refused"]:
            refused.append(f"refused        {gpu['refused']}")
            continue
        best, for_all = gpu["recommended"], gpu["recommended_for_all"]
        numbers = _numbers(best) if best else ("none", *[""] * (len(_NUMBERS) - 1))
        verdict = "fits" if gpu["asked"]["fits"] else "no"
        rows.append(
            (*start, *numbers, verdict, _numbers(for_all)[0] if for_all else "none", " ".join(gpu["supports"][2:]))
        )
    lines = [
        f"The fewest GPUs of each product, at most {MOST_GPUS}, that hold one sequence of "
        f"{sizes['lengths']['max_seq_len']} tokens; sizes in GiB of each GPU.",
        "The reserve: activations, buffers, the driver's part. All compute in 16 bits, some also in what is listed.",
    ]
    return [*lines, *(_table([header, *rows]) if rows else []), *refused]


def _layout_table(gpu: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """Every layout on one product."""
    rows = [("layout", "GPUs", *_NUMBERS[1:], "")]
    best = gpu["recommended"]
    for fit in gpu["layouts"]:
        if not fit["fits"]:
            verdict = "too big" if fit["kv_bytes"] == 0 else "no room for a sequence"
        elif fit == best:
            verdict = "recommended"
        else:
            verdict = "holds all" if fit["holds_all"] else "fits"
        layout, *numbers = _numbers(fit)
        rows.append((layout, str(fit["gpus"]), *numbers, verdict))
    least = "" if best else f"; no layout of up to {MOST_GPUS} GPUs fits"
    return [f"Layouts on {gpu['product']}, TP by PP{least}.", *_table(rows)]


_LEFT_ALIGNED = ("GPU", "layout", "", "also")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first row is the header; numbers are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_left = [name in _LEFT_ALIGNED for name in rows[0]]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in rows
    ]


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
