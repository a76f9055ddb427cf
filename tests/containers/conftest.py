"""Real images, built by a real Docker daemon from this checkout, once a session; skipped where there is no daemon."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from containers import BASE, BASES, ROOT, Container, SavedImage, docker, make_image

CHECKPOINT = ROOT / "scripts/demo_checkpoint/demo-gpt2"


@pytest.fixture(scope="session", autouse=True)
def daemon() -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon answers; start one, and set DOCKER_HOST if it is not the usual one")
    there = subprocess.run(["docker", "image", "inspect", BASE], capture_output=True).returncode == 0
    if not there and subprocess.run(["docker", "pull", BASE], capture_output=True).returncode:
        pytest.skip(f"the base image {BASE} is not there and cannot be pulled")


@pytest.fixture(scope="session")
def image(daemon: None) -> Callable[[str], str]:
    """image("server-cpu") is the tag of that image, built with `make`; the daemon's cache makes it quick."""
    built: dict[str, str] = {}

    def build(name: str) -> str:
        if name not in built:
            if name == "server":
                file = ROOT / "tests/containers/nvidia-base.Containerfile"
                docker("build", "--network", "host", "--tag", BASES[name], "--file", str(file), str(ROOT))
            built[name] = make_image(name, ROOT)
        return built[name]

    return build


@pytest.fixture(scope="session")
def saved(image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SavedImage]:
    """saved("client") is that image, unpacked as far as needed."""
    folder = tmp_path_factory.mktemp("saved")
    return cache(lambda name: SavedImage(image(name), folder / f"{name}.tar"))


@pytest.fixture
def empty_volume() -> Iterator[str]:
    name = docker("volume", "create").strip()
    yield name
    docker("volume", "rm", name)


@pytest.fixture(scope="session")
def volume(image: Callable[[str], str]) -> Iterator[str]:
    """A volume with a store and, below `demo-gpt2`, the demo model's repository, both from the builder image.

    It had no network, and nothing to write on but the volume and /tmp.
    """
    name = docker("volume", "create").strip()
    try:
        docker(
            *("run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp"),
            *("--volume", f"{CHECKPOINT}:/checkpoint/demo-gpt2:ro", "--volume", f"{name}:/var/lib/triton-trtllm"),
            *(image("builder"), "--model", "/checkpoint/demo-gpt2"),
            *("--cache-dir", "/var/lib/triton-trtllm/store", "--output", "/var/lib/triton-trtllm/demo-gpt2"),
        )
        yield name
    finally:
        docker("volume", "rm", name)


@pytest.fixture
def start_container() -> Iterator[Callable[..., Container]]:
    """start_container(image, *arguments, options=[...]): a container that is removed, and its log shown, at the end."""
    containers: list[Container] = []

    def start(image: str, *arguments: str, options: list[str] = []) -> Container:  # noqa: B006  never changed
        containers.append(Container(image, arguments, options))
        return containers[-1]

    yield start
    for container in containers:
        print(f"---- the log of {container.image} ----\n{container.log()[-4000:]}")
        container.remove()
