"""The command line of `engines.py`: what to build (`BuildRequest`), and how (`Options`)."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import llm_arguments
from assemble import Settings
from errors import UsageError
from plan import (
    DTYPES,
    ENGINE_CHOICES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    BuildRequest,
    SyntheticRates,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to build, as opposed to what: nothing here changes the engine."""

    served_name: str | None
    output: Path | None
    cache_dir: Path
    token_file: Path | None
    offline: bool
    plan_only: bool
    verify: bool
    force: bool
    symlink_engine: bool
    settings: Settings


class _Parser(argparse.ArgumentParser):
    """Says what is wrong by an exception, so that --json has its document for a mistyped option too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


def parse(argv: list[str]) -> tuple[BuildRequest, Options, argparse.Namespace]:
    """Raises UsageError."""
    parser = _Parser(
        prog="engines.py",
        description="Build a Triton model repository from a Hugging Face checkpoint.",
        epilog="exit codes: 0 done, 2 wrong option, 3 checkpoint, 4 not supported here, 5 compiler, 6 disk, 7 verify",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to build")
    what.add_argument(
        "--model", required=True, help="hub id (gpt2, org/name, org/name@revision) or a local checkpoint folder"
    )
    what.add_argument("--revision", help="branch, tag or commit of a hub id (default: main)")
    what.add_argument(
        "--engine",
        choices=ENGINE_CHOICES,
        default="auto",
        help="auto: tensorrt where there is an NVIDIA GPU, else openvino (default: auto)",
    )
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of the weights (default: auto; on a GPU the checkpoint's own, or float16 for float32; on a CPU "
        "float32, or bfloat16 with --quantization)",
    )
    what.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="none", help="weights of fewer bits (default: none)"
    )
    what.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="type of the KV cache on NVIDIA GPUs (default: auto, that of --dtype)",
    )
    what.add_argument(
        "--calibration-data",
        type=_path,
        metavar="DIR",
        help="texts for --quantization fp8, int4_awq, int8_sq and for --kv-cache-dtype: a data set with the split "
        "'train' and the column 'text' (default: cnn_dailymail, downloaded)",
    )
    what.add_argument(
        "--llm-args",
        type=_llm_arguments,
        default={},
        metavar="JSON|@FILE",
        help="arguments of TensorRT-LLM's LLM class that the server is to load the engine with, checked by name and "
        "type (default: none)",
    )
    what.add_argument("--tp", type=_positive, default=1, metavar="N", help="tensor parallel GPUs (default: 1)")
    what.add_argument("--pp", type=_positive, default=1, metavar="N", help="pipeline parallel GPUs (default: 1)")
    what.add_argument(
        "--gpu",
        metavar="PRODUCT",
        help="GPU product to build for, as in the label nvidia.com/gpu.product (default: this machine's)",
    )
    what.add_argument(
        "--max-batch-size", type=_positive, metavar="N", help="sequences generated at the same time (default: 16)"
    )
    what.add_argument(
        "--max-input-len", type=_positive, metavar="N", help="tokens of a prompt (default: --max-seq-len less 1)"
    )
    what.add_argument(
        "--max-seq-len",
        type=_positive,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's, at most 4096)",
    )
    what.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the checkpoint brings (default: it is not used)",
    )
    where = parser.add_argument_group("where from and where to")
    where.add_argument(
        "--token-file",
        type=_path,
        metavar="FILE",
        help="file with a Hugging Face token (default: HF_TOKEN, HF_TOKEN_PATH)",
    )
    where.add_argument("--offline", action="store_true", help="use only what is already downloaded")
    where.add_argument("--served-name", metavar="NAME", help="the model's name in Triton (default: the checkpoint's)")
    where.add_argument(
        "--output", type=_path, metavar="DIR", help="the model repository (default: out/ and the served name)"
    )
    where.add_argument(
        "--cache-dir",
        type=_path,
        metavar="DIR",
        help="the engine store; several builders may share it (default: triton-trtllm in XDG_CACHE_HOME or ~/.cache)",
    )
    where.add_argument(
        "--symlink-engine",
        action="store_true",
        help="engine files in the repository are symbolic links to the store, which must stay where it is (default: "
        "hard links, or copies on another file system)",
    )
    what.add_argument(
        "--synthetic",
        type=_synthetic_rates,
        metavar="NAME=VALUE,...",
        help="for --engine synthetic, a tool for benchmarks: tokens_per_second of each sequence (default: 50), "
        "prefill_seconds before the first token (default: 0), kv_tokens that the KV cache has room for "
        "(default: enough for every sequence)",
    )
    serving = parser.add_argument_group("how it is served; building again with other values takes no time")
    serving.add_argument(
        "--max-queue-size",
        type=_positive,
        default=Settings.max_queue_size,
        metavar="N",
        help="requests that may wait for the engine; more are refused (default: any number, in Triton's own queue)",
    )
    serving.add_argument(
        "--queue-timeout",
        type=_above_0,
        default=Settings.queue_timeout_seconds,
        metavar="SECONDS",
        help="a request that has waited so long is refused (default: none is)",
    )
    serving.add_argument(
        "--priority-levels",
        type=_positive,
        default=Settings.priority_levels,
        metavar="N",
        help="requests may have the input priority, 1 to N, of which 1 goes first (default: first come, first served)",
    )
    serving.add_argument(
        "--responses-per-second",
        type=_above_0,
        metavar="N",
        help="of all streams together; under load several tokens go into one (default: what the machine affords)",
    )
    serving.add_argument(
        "--hang-timeout",
        type=_above_0,
        default=Settings.hang_seconds,
        metavar="SECONDS",
        help="end the server when its engine has work and says nothing for so long (default: 120)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--plan",
        action="store_true",
        help="print what would be built and whether it fits, from config.json alone, and stop",
    )
    how.add_argument("--force", action="store_true", help="build even if the store has this engine, and replace it")
    how.add_argument("--verify", action="store_true", help="compare the engine's greedy tokens with transformers")
    how.add_argument("--json", action="store_true", help="print one JSON result on stdout, errors included")
    how.add_argument("-v", "--verbose", action="count", default=0, help="more log lines; twice: tracebacks too")
    arguments = parser.parse_args(argv)
    request = BuildRequest(
        model=arguments.model,
        revision=arguments.revision,
        engine=arguments.engine,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        tensor_parallel=arguments.tp,
        pipeline_parallel=arguments.pp,
        gpu=arguments.gpu,
        max_batch_size=arguments.max_batch_size,
        max_input_len=arguments.max_input_len,
        max_seq_len=arguments.max_seq_len,
        trust_remote_code=arguments.trust_remote_code,
        synthetic=arguments.synthetic,
        calibration_data=arguments.calibration_data,
        llm_arguments=arguments.llm_args,
    )
    options = Options(
        served_name=arguments.served_name,
        output=arguments.output,
        cache_dir=arguments.cache_dir or default_cache_dir(),
        token_file=arguments.token_file,
        offline=arguments.offline,
        plan_only=arguments.plan,
        verify=arguments.verify,
        force=arguments.force,
        symlink_engine=arguments.symlink_engine,
        settings=Settings(
            max_queue_size=arguments.max_queue_size,
            queue_timeout_seconds=arguments.queue_timeout,
            priority_levels=arguments.priority_levels,
            responses_per_second=arguments.responses_per_second,
            hang_seconds=arguments.hang_timeout,
        ),
    )
    return request, options, arguments


def default_cache_dir() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triton-trtllm"
    except RuntimeError:  # a container's user without HOME and without a line in /etc/passwd
        raise UsageError("this user has no home folder for the engine store; give a folder with --cache-dir") from None


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))  # --output=~/x reaches us with its '~'


def _llm_arguments(text: str) -> dict[str, Any]:
    try:
        return llm_arguments.read(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _synthetic_rates(text: str) -> SyntheticRates:
    known = {field.name: field for field in fields(SyntheticRates)}
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise argparse.ArgumentTypeError(f"'{part}' is none of {', '.join(f'{name}=N' for name in known)}")
        least = 0 if name != "tokens_per_second" else 0.01
        try:
            values[name] = type(known[name].default)(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{value}' is not a value for {name}; give a number") from None
        if not least <= values[name] < 1e9:
            raise argparse.ArgumentTypeError(f"{name} is {value}; it must be at least {least}")
    return SyntheticRates(**values)


def _above_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return number


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)
