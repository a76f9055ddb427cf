"""The Containerfiles are not Docker's alone: buildah, without a daemon, makes the same image of the smallest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from containers import BASE, ROOT, docker, inspect

pytestmark = pytest.mark.skipif(
    shutil.which("buildah") is None or os.geteuid() != 0, reason="needs root, and buildah: apt-get install buildah"
)


@pytest.fixture
def buildah(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """buildah with a store of its own, which needs neither a daemon nor overlayfs."""
    store = ["--storage-driver", "vfs", "--root", str(tmp_path / "store"), "--runroot", str(tmp_path / "run")]

    def call(verb: str, *arguments: str) -> str:
        done = subprocess.run(
            ["buildah", *store, verb, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    yield call
    call("rm", "--all")
    call("rmi", "--all", "--force")


def test_buildah_builds_the_image_that_docker_builds(buildah: Callable[..., str], image, tmp_path: Path):
    docker("save", "--output", str(tmp_path / "base.tar"), BASE)
    buildah("pull", "--quiet", f"docker-archive:{tmp_path}/base.tar")
    tag = "triton-trtllm/client:buildah"
    options = ["--isolation", "chroot", "--network", "host", "--build-arg", "PIP_INDEX_URL"]
    buildah("bud", *options, "--file", "containerfiles/client.Containerfile", "--tag", tag, ".")
    built = json.loads(buildah("inspect", "--type", "image", tag))["OCIv1"]["config"]
    by_docker = inspect(image("client"))["Config"]
    for key in ("User", "Entrypoint", "WorkingDir"):
        assert built[key] == by_docker[key]
    container = buildah("from", "--pull-never", "--quiet", tag).split()[-1]
    run = ["--isolation", "chroot", container, "--", *built["Entrypoint"], "--help"]
    assert buildah("run", *run).startswith("usage: load.py")
