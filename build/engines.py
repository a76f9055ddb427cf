"""A Hugging Face checkpoint becomes an engine and a Triton model repository.

    python build/engines.py --model gpt2 --tp 1
    python scripts/serve.py out/gpt2

The steps are `build()` below: resolve the checkpoint, plan, compile or find in the store, verify, assemble.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from assemble import Settings, assemble, check_output, check_served_name
from checkpoint import Checkpoint, resolve
from engine_manifest import EngineManifest
from errors import BuildError, UnsupportedError, UsageError
from gpus import Gpu, find_gpus
from plan import (
    DTYPES,
    ENGINE_CHOICES,
    GPU_ENGINES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    BuildRequest,
    EngineKind,
    EnginePlan,
    SyntheticRates,
    choose_engine,
    make_plan,
    read_config,
)
from sizing_report import in_words, size_plan
from store import Store

_log = logging.getLogger("engines")

# Engine kind -> the module in compilers/ that builds it, and what to say for a kind that has none.
COMPILERS = {"openvino": "openvino_compiler", "synthetic": "synthetic_compiler"}
_NO_COMPILER = "--engine {kind} is not built by this version yet; build for the CPU with --engine openvino"

_SERVE = Path(__file__).resolve().parent.parent / "scripts/serve.py"


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


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine folder in the store."""

    folder: Path
    key: str
    was_stored: bool


def build(request: BuildRequest, options: Options) -> dict[str, Any]:
    """All steps. Returns the report that --json prints. Raises BuildError."""
    started = time.monotonic()
    if options.served_name is not None:
        check_served_name(options.served_name)
    if options.output is not None:
        check_output(options.output)
    gpus = find_gpus() if request.engine == "auto" else []
    kind, reason = choose_engine(request.engine, [gpu.product for gpu in gpus])
    if options.plan_only and kind == "openvino" and request.engine == "auto" and request.gpu is not None:
        kind, reason = "tensorrt", f"auto: planned for {request.gpu}"
    _log.info("engine: %s (%s)", kind, reason)
    # Planning needs neither a GPU nor the libraries that build for one.
    compiler = None if options.plan_only and kind in GPU_ENGINES else _compiler(kind)
    if compiler is not None:
        compiler.check_request(request)
    if kind != "synthetic" and request.synthetic is not None:
        raise UsageError(f"--synthetic is for --engine synthetic, and this engine is {kind}; leave it out")
    if kind == "synthetic" and options.verify:
        raise UsageError("--verify compares answers with transformers, and those of a synthetic engine are made up")
    checkpoint = resolve(
        request.model,
        revision=request.revision,
        token_file=options.token_file,
        offline=options.offline,
        trust_remote_code=request.trust_remote_code,
        digest_cache=options.cache_dir,
        is_plan=options.plan_only,
    )
    if compiler is None:
        return _plan_for_gpus(request, checkpoint, kind, gpus)
    plan = make_plan(request, checkpoint, kind, compiler.versions())
    compiler.check(plan)
    served_name = options.served_name or _default_name(request, checkpoint)
    output = options.output or Path("out") / served_name
    check_served_name(served_name)
    check_output(output)
    store = Store(options.cache_dir)
    has_weights = checkpoint.digest != ""
    report = _planned(plan, checkpoint) | {"key": store.key_of(plan) if has_weights else None}
    if options.plan_only:
        stored = store.find(plan) if has_weights else None
        sizes = size_plan(plan, read_config(checkpoint))
        return report | {"stored": str(stored) if stored else None, "sizing": sizes}
    engine = _compile(plan, checkpoint, compiler, store, force=options.force)
    report |= {"engine": str(engine.folder), "was_stored": engine.was_stored}
    if options.verify:
        report["verified"] = _verify(engine, checkpoint, trust_remote_code=request.trust_remote_code)
    repository = assemble(engine.folder, served_name, output, options.settings, symlink_engine=options.symlink_engine)
    _log.info("repository: %s", repository.path)
    return report | {
        "repository": str(repository.path),
        "served_name": repository.served_name,
        "infer_name": repository.infer_name,
        "seconds": round(time.monotonic() - started, 3),
    }


def _plan_for_gpus(
    request: BuildRequest, checkpoint: Checkpoint, kind: EngineKind, gpus: Sequence[Gpu]
) -> dict[str, Any]:
    """Without the compiler, which wants a GPU. The key of an engine holds the compiler's version, so there is none."""
    plan = make_plan(request, checkpoint, kind, versions={})
    sizes = size_plan(plan, read_config(checkpoint), gpus)
    return _planned(plan, checkpoint) | {"key": None, "stored": None, "sizing": sizes}


def _planned(plan: EnginePlan, checkpoint: Checkpoint) -> dict[str, Any]:
    return {"model": checkpoint.model, "revision": checkpoint.revision, "plan": asdict(plan)}


def _default_name(request: BuildRequest, checkpoint: Checkpoint) -> str:
    """The last part of the hub id, or of the path as it was typed: a linked folder is called what the link is."""
    if checkpoint.revision is not None:
        return checkpoint.name
    return Path(os.path.abspath(os.path.expanduser(request.model))).name


def _compiler(kind: EngineKind):
    if kind not in COMPILERS:
        raise UnsupportedError(_NO_COMPILER.format(kind=kind))
    return import_module(f"compilers.{COMPILERS[kind]}")


def _compile(plan: EnginePlan, checkpoint: Checkpoint, compiler, store: Store, *, force: bool) -> Engine:
    key = store.key_of(plan)
    was_stored = True

    def compile_into(folder: Path) -> EngineManifest:
        nonlocal was_stored
        was_stored = False
        _log.info("engine: building %s, %s, quantization %s", plan.model, plan.dtype, plan.quantization)
        compiled = compiler.compile(plan, checkpoint, folder)
        return EngineManifest(
            key=key,
            engine=plan.engine,
            model=plan.model,
            revision=plan.revision,
            checkpoint_digest=plan.checkpoint_digest,
            architecture=plan.architecture,
            dtype=plan.dtype,
            quantization=plan.quantization,
            kv_cache_dtype=plan.kv_cache_dtype,
            tensor_parallel=plan.tensor_parallel,
            pipeline_parallel=plan.pipeline_parallel,
            limits=asdict(plan.limits),
            vocab_size=compiled.vocab_size,
            bos_token_id=compiled.bos_token_id,
            eos_token_ids=list(compiled.eos_token_ids),
            pad_token_id=compiled.pad_token_id,
            kv_bytes_per_token=compiled.kv_bytes_per_token,
            gpu=None,
            versions=dict(plan.compiler_versions),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={},  # the store fills them in, when it has read them
        )

    folder = store.build_once(plan, compile_into, force=force)
    _log.info("engine: %s%s", folder, " (stored)" if was_stored else "")
    return Engine(folder=folder, key=key, was_stored=was_stored)


def _verify(engine: Engine, checkpoint: Checkpoint, *, trust_remote_code: bool) -> dict[str, Any]:
    from verify import verify  # imports torch and transformers, seconds that a stored engine need not pay

    _log.info("verify: comparing greedy tokens with transformers")
    result = verify(engine.folder, checkpoint, trust_remote_code=trust_remote_code)
    _log.info("verify: %s", result.sentence)
    return asdict(result)


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
    what.add_argument("--tp", type=_positive, default=1, metavar="N", help="tensor parallel GPUs (default: 1)")
    what.add_argument("--pp", type=_positive, default=1, metavar="N", help="pipeline parallel GPUs (default: 1)")
    what.add_argument(
        "--gpu", metavar="PRODUCT", help="GPU product to build for, as in the label nvidia.com/gpu.product"
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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        request, options, arguments = parse(argv)
    except UsageError as error:
        return _report_error(error, error.exit_code, as_json="--json" in argv)
    _set_up_logging(arguments.verbose)
    with_traceback = arguments.verbose > 1
    try:
        report = build(request, options)
    except BuildError as error:
        return _report_error(error, error.exit_code, as_json=arguments.json, with_traceback=with_traceback)
    except KeyboardInterrupt:
        error = KeyboardInterrupt("interrupted; nothing half-built is left")
        return _report_error(error, 130, as_json=arguments.json)
    except Exception as error:  # a defect of ours: say so in a sentence, with the way to the details
        if not with_traceback:
            error = RuntimeError(
                f"unexpected {type(error).__name__}: {error}; run again with -vv and report the traceback"
            )
        return _report_error(error, 1, as_json=arguments.json, with_traceback=with_traceback)
    print(json.dumps(report) if arguments.json else _in_words(report))
    return 0


def _set_up_logging(verbose: int) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,  # of the libraries; ours speak below
        format="%(message)s",
        force=True,
    )
    logging.getLogger().setLevel(logging.DEBUG if verbose > 1 else logging.WARNING)
    for name in ("engines", "checkpoint", "store", "compilers", "verify"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


def _report_error(error: BaseException, exit_code: int, *, as_json: bool, with_traceback: bool = False) -> int:
    if with_traceback:
        traceback.print_exception(error)
    print(f"engines: {error}", file=sys.stderr)
    if termination_message := os.environ.get("TERMINATION_MESSAGE_PATH"):  # what Kubernetes shows as the Pod's status
        with suppress(OSError):
            Path(termination_message).write_text(f"engines: {error}")
    if as_json:
        print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error), "exit_code": exit_code}}))
    return exit_code


def _in_words(report: dict[str, Any]) -> str:
    plan = report["plan"]
    limits = plan["limits"]
    numbers = f"{plan['dtype']}, quantization {plan['quantization']}"
    lines = [
        f"model          {report['model']}" + (f" at {report['revision']}" if report["revision"] else ""),
        f"engine         {plan['engine']}, {numbers}, {plan['architecture']}",
        f"limits         {limits['max_batch_size']} sequences, prompts of {limits['max_input_len']} tokens, "
        f"{limits['max_seq_len']} with the answer",
    ]
    if "repository" not in report:
        lines += in_words(report["sizing"])
        if plan["engine"] not in GPU_ENGINES:
            nothing = "no: a build would compile it" if report["key"] else "no: there are no weights to compile"
            lines.append(f"in the store   {report['stored'] or nothing}")
        return "\n".join(lines)
    name, infer_name = report["served_name"], report["infer_name"]
    output, serve = _shown(Path(report["repository"])), _shown(_SERVE)
    lines += [
        f"repository     {output} ({'stored engine' if report['was_stored'] else 'built'}, {report['seconds']:.1f} s)",
        f"models         {name}: generate, generate_stream, gRPC streams; {infer_name}: infer()",
        f"serve it with  python {serve} {output}",
    ]
    return "\n".join(lines)


def _shown(path: Path) -> str:
    """For a command line: relative where the path is inside this folder."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


if __name__ == "__main__":
    sys.exit(main())
