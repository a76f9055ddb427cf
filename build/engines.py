"""A Hugging Face checkpoint becomes an engine and a Triton model repository.

    python build/engines.py --model gpt2 --tp 1
    python scripts/serve.py out/gpt2

The steps are `build()` below: resolve the checkpoint, plan, compile or find in the store, verify, assemble.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import llm_arguments
from assemble import assemble, check_output, check_served_name
from calibration import DEFAULT_DATASET
from checkpoint import Checkpoint, resolve
from engine_manifest import EngineManifest
from errors import BuildError, UsageError
from gpus import Gpu, find_gpus
from options import Options, parse
from plan import GPU_ENGINES, BuildRequest, EngineKind, EnginePlan, choose_engine, make_plan, read_config
from sizing_report import in_words, size_plan
from store import Store

_log = logging.getLogger("engines")

# Engine kind -> the module in compilers/ that builds it.
COMPILERS = {
    "tensorrt": "tensorrt_compiler",
    "pytorch": "pytorch_compiler",
    "openvino": "openvino_compiler",
    "synthetic": "synthetic_compiler",
}

_SERVE = Path(__file__).resolve().parent.parent / "scripts/serve.py"


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
    _check_options(kind, request, options)
    if compiler is not None:
        compiler.check_request(request)
        if kind == "tensorrt":  # which builds for the GPU that it runs on
            request = replace(request, gpu=compiler.target_gpus(request.gpu)[0].product)
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
    compiler.check(plan, read_config(checkpoint))
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
    engine = _compile(plan, checkpoint, compiler, store, options)
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
    llm_arguments.check(request.llm_arguments, kind)
    plan = make_plan(request, checkpoint, kind, versions={})
    sizes = size_plan(plan, read_config(checkpoint), gpus)
    return _planned(plan, checkpoint) | {"key": None, "stored": None, "sizing": sizes}


def _check_options(kind: EngineKind, request: BuildRequest, options: Options) -> None:
    """Options that are for other kinds. Raises UsageError."""
    if kind != "synthetic" and request.synthetic is not None:
        raise UsageError(f"--synthetic is for --engine synthetic, and this engine is {kind}; leave it out")
    if kind not in GPU_ENGINES and request.llm_arguments:
        raise UsageError(f"--llm-args is for TensorRT-LLM's engines, and this engine is {kind}; leave it out")
    if kind == "synthetic" and options.verify:
        raise UsageError("--verify compares answers with transformers, and those of a synthetic engine are made up")
    if kind in GPU_ENGINES and options.verify:
        raise UsageError(
            f"--verify runs CPU engines only, and this engine is {kind}; leave it out, and compare it on a GPU with "
            "scripts/gpu_smoke.py"
        )


def _planned(plan: EnginePlan, checkpoint: Checkpoint) -> dict[str, Any]:
    return {"model": checkpoint.model, "revision": checkpoint.revision, "plan": asdict(plan)}


def _default_name(request: BuildRequest, checkpoint: Checkpoint) -> str:
    """The last part of the hub id, or of the path as it was typed: a linked folder is called what the link is."""
    if checkpoint.revision is not None:
        return checkpoint.name
    return Path(os.path.abspath(os.path.expanduser(request.model))).name


def _compiler(kind: EngineKind):
    return import_module(f"compilers.{COMPILERS[kind]}")


def _compile(plan: EnginePlan, checkpoint: Checkpoint, compiler, store: Store, options: Options) -> Engine:
    key = store.key_of(plan)
    was_stored = True

    def compile_into(folder: Path) -> EngineManifest:
        nonlocal was_stored
        was_stored = False
        if options.offline and plan.calibration == DEFAULT_DATASET:
            raise UsageError(
                f"quantizing downloads {DEFAULT_DATASET} from the hub, and --offline was given; name a folder with "
                "texts by --calibration-data"
            )
        _log.info("engine: building %s, %s, quantization %s", plan.model, plan.dtype, plan.quantization)
        compiled = compiler.compile(plan, checkpoint, folder, store.kept_folder(plan))
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
            gpu=dict(zip(("product", "compute_capability"), compiled.gpu, strict=True)) if compiled.gpu else None,
            versions=dict(plan.compiler_versions),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={},  # the store fills them in, when it has read them
        )

    folder = store.build_once(plan, compile_into, force=options.force)
    _log.info("engine: %s%s", folder, " (stored)" if was_stored else "")
    return Engine(folder=folder, key=key, was_stored=was_stored)


def _verify(engine: Engine, checkpoint: Checkpoint, *, trust_remote_code: bool) -> dict[str, Any]:
    from verify import verify  # imports torch and transformers, seconds that a stored engine need not pay

    _log.info("verify: comparing greedy tokens with transformers")
    result = verify(engine.folder, checkpoint, trust_remote_code=trust_remote_code)
    _log.info("verify: %s", result.sentence)
    return asdict(result)


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
