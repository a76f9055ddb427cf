"""Docker, as short calls."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from free_ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
BASE = "debian:bookworm-slim"
BASES = {"server": "triton-trtllm/nvidia-base:test"}  # of those that are not made from BASE
READY_SECONDS = 60
ANSWER_SECONDS = 60


def docker(*arguments: str, check: bool = True) -> str:
    """Its stdout and stderr. Raises AssertionError with them."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout[-6000:]}"
    return done.stdout


def make_image(
    name: str, folder: Path, *arguments: str, tag: str = "test", environment: Mapping[str, str] | None = None
) -> str:
    """As a person builds it; the network is the machine's since a daemon for tests may have no bridge."""
    options = ["--network host", f"--build-arg BASE={BASES.get(name, BASE)}", *arguments]
    done = subprocess.run(
        ["make", f"image-{name}", f"IMAGE_TAG={tag}", f"IMAGE_ARGS={' '.join(options)}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            **(environment or {}),
            "DOCKER_BUILDKIT": "0",  # one builder on all machines, and the one that knows least
        },
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return f"triton-trtllm/{name}:{tag}"


def inspect(image: str) -> dict[str, Any]:
    return json.loads(docker("image", "inspect", image))[0]


class SavedImage:
    """All layers of an image that its base image has not, with every file, also those that a later layer removes."""

    def __init__(self, image: str, archive: Path):
        base = BASES.get(image.partition("/")[2].partition(":")[0], BASE)
        docker("save", "--output", str(archive), image)
        self._archive = archive
        self.digests = inspect(image)["RootFS"]["Layers"]
        self.num_base_layers = len(inspect(base)["RootFS"]["Layers"])
        with tarfile.open(archive) as saved:
            (manifest,) = json.loads(_read(saved, "manifest.json"))
            self._layers = manifest["Layers"]
            self.layer_bytes = [saved.getmember(layer).size for layer in self._layers]

    def files(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Path and a way to read it."""
        with tarfile.open(self._archive) as saved:
            for layer in self._layers[self.num_base_layers :]:
                with tarfile.open(fileobj=saved.extractfile(layer)) as files:
                    for entry in files:
                        if entry.isfile() and not Path(entry.name).name.startswith(".wh."):  # marks of what is removed
                            yield entry.name, partial(_read, files, entry)

    @cached_property
    def paths(self) -> list[str]:
        return [path for path, _ in self._looked_at]

    @cached_property
    def outside_packages(self) -> dict[str, bytes]:
        """The files that are not of a Python package, with what is in them."""
        return {path: content for path, content in self._looked_at if content is not None}

    @cached_property
    def _looked_at(self) -> list[tuple[str, bytes | None]]:
        """In one go, since going through 2 GB takes 20 s."""
        return [(path, None if "/site-packages/" in path else read()) for path, read in self.files()]


def _read(archive: tarfile.TarFile, entry: tarfile.TarInfo | str) -> bytes:
    file = archive.extractfile(entry)
    assert file is not None
    return file.read()


class Container:
    """A container of `image` that runs `arguments`."""

    def __init__(self, image: str, arguments: Sequence[str], options: Sequence[str] = ()):
        self.image = image
        self.id = docker("run", "--detach", *options, image, *arguments).split()[-1]

    def log(self) -> str:
        return docker("logs", self.id)

    def execute(self, *command: str) -> str:
        return docker("exec", self.id, *command)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        return int(docker("wait", self.id))

    def stop(self) -> int:
        docker("stop", "--time", "60", self.id)
        return self.wait()

    def is_running(self) -> bool:
        return docker("inspect", "--format", "{{.State.Running}}", self.id).strip() == "true"

    def remove(self) -> None:
        docker("rm", "--force", "--volumes", self.id)


class ServerContainer:
    """scripts/serve.py in a container that has the machine's network, an arbitrary user and a read-only root."""

    OPTIONS = ("--network", "host", "--read-only", "--tmpfs", "/tmp", "--user", "1000:1000")

    def __init__(self, start: Any, image: str, repository: str, *arguments: str, options: Sequence[str] = ()):
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        ports = ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        ports += ["--metrics-port", str(self.metrics_port)]
        self.container: Container = start(image, repository, *ports, *arguments, options=[*self.OPTIONS, *options])

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end and self.container.is_running():
            if "serve: ready" in self.container.log():
                return
            time.sleep(0.2)
        raise AssertionError(f"not ready:\n{self.container.log()[-4000:]}")

    def open(self, path: str, body: dict[str, Any]) -> Any:
        url = f"http://127.0.0.1:{self.http_port}{path}"
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=ANSWER_SECONDS)

    def generate(self, model: str, **body: Any) -> dict[str, Any]:
        with self.open(f"/v2/models/{model}/generate", body) as response:
            return json.loads(response.read())
