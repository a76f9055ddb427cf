"""Start Triton Inference Server on a model repository: `python scripts/serve.py out/demo-gpt2`.

Finds the tritonserver of an NGC container, else the one inside the nvidia-pytriton wheel, sets up what it needs, and
runs it (supervisor.py). SIGTERM, or Ctrl-C, lets requests in flight finish, at most `--exit-timeout` seconds, and ends
with 0; a second one does not wait. Options after `--` go to tritonserver as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import socket
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from supervisor import Feedback, Supervisor, num_in_flight

NGC_TRITONSERVER = Path("/opt/tritonserver/bin/tritonserver")
TRITON_EXIT_SECONDS = 8  # when the supervisor ends it, nothing is in flight, and its models take two to four
SHARED_MEMORY = Path("/dev/shm")
# Each Python model takes 1 MiB there when it starts, and more with its requests: 10 MiB in all after a prompt of 4 MB.
SHARED_MEMORY_BYTES_PER_MODEL = 4 << 20
# Triton starts a model's process through a shell with the path unquoted, waits for it for ever, and reads it as ASCII.
NOT_IN_PATHS = re.compile(r"[^\w/.,:=+@%~#-]", re.ASCII)


class ServeError(Exception):
    """The server cannot be started: one sentence."""


@dataclass(frozen=True, kw_only=True)
class Tritonserver:
    """A tritonserver, the options it cannot do without, and the environment it needs."""

    binary: Path
    options: tuple[str, ...] = ()
    environment: dict[str, str]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        repository = check_repository(arguments.repository)
        check_engine(repository, arguments)
        check_shared_memory(arguments.repository)
        check_ports(arguments)
        server = find_tritonserver(arguments.tritonserver)
        command = [str(server.binary), *server.options, *server_options(arguments)]
        supervisor = make_supervisor(arguments, repository)
    except ServeError as error:
        print(f"serve: {error}", file=sys.stderr)
        if termination_message := os.environ.get("TERMINATION_MESSAGE_PATH"):  # what Kubernetes shows of its end
            with contextlib.suppress(OSError):
                Path(termination_message).write_text(f"serve: {error}")
        return 2
    if arguments.verbose:
        print("serve:", " ".join(command), file=sys.stderr)
    return supervisor.run(command, server.environment)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="options after -- go to tritonserver as they are",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("repository", type=Path, metavar="REPOSITORY", help="folder that build/engines.py assembled")
    address = parser.add_argument_group("where it listens")
    address.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for all interfaces")
    address.add_argument("--http-port", type=int, default=8000, metavar="PORT")
    address.add_argument("--grpc-port", type=int, default=8001, metavar="PORT")
    address.add_argument("--metrics-port", type=int, default=8002, metavar="PORT")
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--exit-timeout",
        type=float,
        default=30,
        metavar="SECONDS",
        help="how long SIGTERM waits for requests in flight; later they fail",
    )
    server.add_argument(
        "--tritonserver", type=Path, metavar="FILE", help="a tritonserver binary, instead of the one found"
    )
    server.add_argument("--log-verbose", type=int, default=0, metavar="LEVEL", help="tritonserver's verbose log level")
    server.add_argument("--log-file", type=Path, metavar="FILE", help="tritonserver's log goes there instead of stderr")
    server.add_argument("--quiet", action="store_true", help="only warnings and errors in tritonserver's log")
    server.add_argument(
        "--benchmark", action="store_true", help="serve also a synthetic engine, whose answers are made up"
    )
    server.add_argument("-v", "--verbose", action="store_true", help="print the command before it runs")
    # argparse finds no place for them behind an option, so they are taken off before.
    ours, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    return parser.parse_args(ours, argparse.Namespace(options=options))


def check_repository(path: Path) -> dict:
    """The repository's record. Raises ServeError for a folder that is no repository of ours."""
    record = path / "repository.json"
    if found := NOT_IN_PATHS.search(str(path.absolute())):
        raise ServeError(
            f"the path '{path.absolute()}' has {found[0]!r}, and tritonserver cannot load a repository from there; "
            "move it to a path of ASCII letters, digits, '/', '.', '_' and '-'"
        )
    if not path.is_dir():
        raise ServeError(
            f"{path} is not a folder; build a repository with: python build/engines.py --model MODEL --output {path}"
        )
    try:
        content = json.loads(record.read_text())
        if missing := {"served_name", "infer_name"} - set(content):
            raise ValueError(f"no {' and no '.join(sorted(missing))}")
        return content
    except FileNotFoundError:
        raise ServeError(
            f"{path} has no repository.json, so build/engines.py did not assemble it; give its --output folder"
        ) from None
    except OSError as error:
        raise ServeError(f"{record} cannot be read: {error.strerror}; make the repository readable") from None
    except (ValueError, TypeError) as error:
        raise ServeError(f"{record} is damaged ({error}); assemble the repository again") from None


def check_engine(repository: dict, arguments: argparse.Namespace) -> None:
    if repository.get("engine") == "synthetic" and not arguments.benchmark:
        raise ServeError(
            f"{arguments.repository} has a synthetic engine, which makes its answers up; "
            "if it is for a benchmark, serve it with --benchmark"
        )


def check_shared_memory(repository: Path, folder: Path = SHARED_MEMORY) -> None:
    """Triton's own words for too little of it are "failed to load all models"."""
    num_models = sum('backend: "python"' in path.read_text() for path in repository.glob("*/config.pbtxt"))
    needed = num_models * SHARED_MEMORY_BYTES_PER_MODEL
    try:
        there = os.statvfs(folder)
    except OSError as error:
        raise ServeError(f"{folder} cannot be used: {error.strerror}; tritonserver needs it for its models") from None
    free = there.f_bavail * there.f_frsize
    if free < needed:
        raise ServeError(
            f"{folder} has {free / (1 << 20):.1f} MiB free, and the {num_models} models of {repository} need "
            f"{needed >> 20} MiB there; give the container more: docker run --shm-size 64m, "
            f"or in Kubernetes an emptyDir of medium Memory, mounted at {folder}"
        )


def check_ports(arguments: argparse.Namespace) -> None:
    ports = {name: getattr(arguments, f"{name}_port") for name in ("http", "grpc", "metrics")}
    if len(set(ports.values())) < len(ports):
        raise ServeError(f"the ports {ports} must all be different")
    for name, port in ports.items():
        if not 1 <= port <= 65535:
            raise ServeError(f"--{name}-port {port} is not a port; use 1 to 65535")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((arguments.host, port))
            except OSError as error:
                raise ServeError(
                    f"cannot listen on {arguments.host}:{port} ({error.strerror}); "
                    f"choose another --{name}-port or --host"
                ) from None


def find_tritonserver(given: Path | None) -> Tritonserver:
    """The given binary, the container's, the wheel's, in this order. Raises ServeError when there is none."""
    if given is not None:
        if not (given.is_file() and os.access(given, os.X_OK)):
            raise ServeError(f"--tritonserver {given} is not a program that can be run")
        return Tritonserver(binary=given, environment=dict(os.environ))
    if NGC_TRITONSERVER.exists():
        # Its stubs take their packages from the python3 that is first on PATH: let that be this one.
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        return Tritonserver(binary=NGC_TRITONSERVER, environment={**os.environ, "PATH": path})
    wheel = importlib.util.find_spec("pytriton")
    if wheel is None or wheel.origin is None:
        raise ServeError(
            "no tritonserver found: run this in NVIDIA's tritonserver container, or install the server of the "
            "nvidia-pytriton wheel with: make install"
        )
    return _wheel_tritonserver(Path(wheel.origin).parent)


def _wheel_tritonserver(package: Path) -> Tritonserver:
    """The wheel keeps the Python backend apart from its stubs, and its libraries outside the loader's path."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        known = sorted(p.name for p in stub.parent.parent.iterdir())
        raise ServeError(f"the nvidia-pytriton wheel has no stub for Python {version}; use one of {', '.join(known)}")
    library = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("LDLIBRARY") or "")
    if ".so" not in library.name:
        raise ServeError(
            f"this Python {version} has no shared libpython, which the server's Python backend loads; "
            "use a Python built with --enable-shared, or Debian's python3 with its libpython3 package"
        )
    libraries = [package.parent / "nvidia_pytriton.libs", library.parent, os.environ.get("LD_LIBRARY_PATH")]
    environment = dict(os.environ)
    environment["LD_LIBRARY_PATH"] = ":".join(str(folder) for folder in libraries if folder)
    # A stub takes its packages from the python3 that is first on PATH: let that be this one.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}"
    backends = _backends_folder(package, stub)
    binary = package / "tritonserver/bin/tritonserver"
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    return Tritonserver(binary=binary, options=(f"--backend-directory={backends}",), environment=environment)


def _backends_folder(package: Path, stub: Path) -> Path:
    """A folder of links with the Python backend and this Python's stub side by side, inside the environment."""
    backends = Path(sys.prefix) / "lib" / "tritonserver-backends"
    python = backends / "python"
    wanted = {file.name: file for file in (package / "tritonserver/backends/python").iterdir() if file.is_file()}
    wanted[stub.name] = stub
    if python.is_dir() and all(os.path.realpath(python / name) == str(file.resolve()) for name, file in wanted.items()):
        return backends
    try:
        python.mkdir(parents=True, exist_ok=True)
    except OSError:  # an environment that is not ours to write
        backends = Path(tempfile.mkdtemp(prefix="tritonserver-backends-"))
        python = backends / "python"
        python.mkdir()
    for name, file in wanted.items():
        link = python / f".{name}.{os.getpid()}"
        link.symlink_to(file.resolve())
        os.replace(link, python / name)
    return backends


def server_options(arguments: argparse.Namespace) -> list[str]:
    options = [
        f"--model-repository={arguments.repository.absolute()}",
        "--disable-auto-complete-config",  # ours are complete, and asking each model again costs a process start
        f"--http-address={arguments.host}",
        f"--http-port={arguments.http_port}",
        f"--grpc-address={arguments.host}",
        f"--grpc-port={arguments.grpc_port}",
        f"--metrics-address={arguments.host}",
        f"--metrics-port={arguments.metrics_port}",
        f"--exit-timeout-secs={TRITON_EXIT_SECONDS}",
        f"--log-verbose={arguments.log_verbose}",
    ]
    if arguments.log_file:
        options.append(f"--log-file={arguments.log_file}")
    if arguments.quiet:
        options.append("--log-info=false")
    return options + arguments.options


def make_supervisor(arguments: argparse.Namespace, repository: dict) -> Supervisor:
    host = "127.0.0.1" if arguments.host in ("0.0.0.0", "::") else arguments.host
    name, infer_name = repository["served_name"], repository["infer_name"]
    return Supervisor(
        feedback=feedback_sender(arguments.repository),
        is_ready=lambda: _is_ready(f"http://{host}:{arguments.http_port}/v2/health/ready"),
        num_in_flight=lambda: num_in_flight(f"http://{host}:{arguments.metrics_port}/metrics"),
        drain_seconds=arguments.exit_timeout,
        ready_line=f"serve: ready: model '{name}' (generate, streams) and '{infer_name}' (infer) on "
        f"HTTP {arguments.host}:{arguments.http_port}, gRPC {arguments.host}:{arguments.grpc_port}, "
        f"metrics {arguments.host}:{arguments.metrics_port}",
    )


def feedback_sender(repository: Path) -> Feedback:
    """The repository's own code: what it says is understood by the models beside it."""
    path = repository / "tensorrt_llm/1/feedback_channel.py"
    spec = importlib.util.spec_from_file_location("feedback_channel", path)
    try:
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sender = module.FeedbackSender()
    except (OSError, AttributeError) as error:
        raise ServeError(f"{path} is damaged ({error}); assemble the repository again") from error
    if not isinstance(sender, Feedback):
        raise ServeError(f"{repository} was assembled by another version of this project; assemble it again")
    return sender


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
