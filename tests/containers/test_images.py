"""What every image promises, whatever runs in it: user, entry point, labels, no secret, and quick rebuilds."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from containers import ROOT, SavedImage, docker, inspect, make_image

IMAGES = ("server-cpu", "builder", "client", "server")
PROGRAMS = {"server-cpu": "serve.py", "builder": "engines.py", "client": "load.py", "server": "serve.py"}
# A change of one of these is what a developer's day is made of.
CODE = {
    "server-cpu": "scripts/serve.py",
    "builder": "build/engines.py",
    "client": "clients/load.py",
    "server": "model_repo/tensorrt_llm/1/dispatcher.py",
}
FOLDERS = {
    "server-cpu": {"LICENSE", "scripts"},
    "builder": {"LICENSE", "build", "model_repo"},
    "client": {"LICENSE", "clients"},
    "server": {"LICENSE", "build", "model_repo", "scripts"},
}
# What nobody should find in an image; installed packages have examples of all of them in their own files.
SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{34}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|-----BEGIN [A-Z ]*PRIVATE KEY-----\s"
    rb"|https?://[^/\s:@'\"<>{}]+:[^/\s@'\"<>{}]+@"
)
PLANTED = b"planted-secret-4711"


@pytest.mark.parametrize("name", IMAGES)
def test_it_runs_its_program_as_a_user_with_a_number_and_without_a_shell(image, name: str):
    config = inspect(image(name))["Config"]
    assert config["User"] == "1000:1000"
    assert [Path(part).name for part in config["Entrypoint"]] in (
        ["python", PROGRAMS[name]],
        ["python3", PROGRAMS[name]],
    )


@pytest.mark.parametrize("name", IMAGES)
def test_its_labels_say_what_it_is_and_of_which_commit(image, name: str):
    labels = inspect(image(name))["Config"]["Labels"]
    label = {key.removeprefix("org.opencontainers.image."): value for key, value in labels.items()}
    assert label["title"] == f"triton-trtllm {name}"
    assert label["licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d+\.\d+\.\d+", label["version"])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", label["revision"])


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("user", ["1000:1000", "12345:0"])
def test_help_is_that_of_its_program_for_any_user_on_a_read_only_root(image, name: str, user: str):
    text = docker("run", "--rm", "--read-only", "--network", "none", "--user", user, image(name), "--help")
    assert text.startswith(f"usage: {PROGRAMS[name]}")


@pytest.mark.parametrize("name", IMAGES)
def test_neither_its_history_nor_any_of_its_layers_has_a_secret(image, saved, name: str):
    assert not SECRETS.search(docker("history", "--no-trunc", image(name)).encode())
    environment = inspect(image(name))["Config"]["Env"]
    assert not [variable for variable in environment if re.search("TOKEN|SECRET|PASSWORD|INDEX", variable)]
    for path, content in saved(name).outside_packages.items():
        found = SECRETS.search(content)
        assert not found, f"{path}: {found[0]!r}"


@pytest.mark.parametrize("name", IMAGES)
def test_it_has_nothing_that_its_program_does_not_use(saved, name: str):
    paths = saved(name).paths
    assert {path.split("/")[2] for path in paths if path.startswith("opt/triton-trtllm/")} == FOLDERS[name]
    assert [path for path in paths if path.startswith(("src/", "root/", "home/", "tmp/", "var/lib/apt/lists/"))] == []
    assert any(path.endswith("/site-packages/torch/__init__.py") for path in paths) == (name == "builder")


def test_secrets_beside_the_code_and_in_the_package_index_get_into_no_image(checkout: Path, tmp_path: Path):
    """What a company's machine has: tokens in the checkout, and an index with a password."""
    for place in (
        ".env",
        "hf-token",
        "clients/.env",
        "out/gpt2/token",
        ".git/config",
        "scripts/token",
        ".venv/pip.conf",
    ):
        path = checkout / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PLANTED)
    with an_empty_index() as (host, requests):
        url = f"http://user:{PLANTED.decode()}@{host}/simple"
        built = make_image("client", checkout, tag="secrets", environment={"PIP_EXTRA_INDEX_URL": url})
    try:
        assert requests, "the index was not asked, so the test shows nothing"
        assert PLANTED.decode() not in docker("history", "--no-trunc", built) + docker("image", "inspect", built)
        files = SavedImage(built, tmp_path / "client.tar").files()
        assert [path for path, read in files if PLANTED in read()] == []
    finally:
        docker("image", "rm", built)


@pytest.mark.parametrize("name", IMAGES)
def test_a_change_of_code_rebuilds_nothing_but_the_layers_of_the_code(saved, checkout: Path, tmp_path: Path, name: str):
    code = checkout / CODE[name]
    code.write_text(code.read_text() + "# changed\n")
    built = make_image(name, checkout, tag="changed")
    try:
        before, after = saved(name), SavedImage(built, tmp_path / "changed.tar")
        assert len(after.digests) == len(before.digests)
        changed = [
            size for size, digest in zip(after.layer_bytes, after.digests, strict=True) if digest not in before.digests
        ]
        assert 0 < len(changed) <= 4
        assert sum(changed) < 2_000_000  # bytes; the packages have hundreds of MB
    finally:
        docker("image", "rm", built)


def test_another_commit_alone_rebuilds_no_layer(image, checkout: Path):
    built = make_image("client", checkout, "--build-arg REVISION=other", tag="relabelled")
    try:
        assert inspect(built)["RootFS"] == inspect(image("client"))["RootFS"]
    finally:
        docker("image", "rm", built)


def test_the_images_on_debian_begin_alike_so_that_they_share_what_comes_first():
    beginnings = set()
    for name in ("server-cpu", "builder", "client"):
        text = (ROOT / f"containerfiles/{name}.Containerfile").read_text()
        beginnings.add(text[text.index("FROM") : text.index("COPY pyproject.toml")])
    assert len(beginnings) == 1


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What git has of this checkout, to change and build from."""
    folder = tmp_path / "checkout"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(bytes.decode, files)):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():  # else removed, and not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@contextmanager
def an_empty_index() -> Iterator[tuple[str, list[str]]]:
    """A package index that has nothing: its host and port, and the paths that it is asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}", paths
        finally:
            server.shutdown()
