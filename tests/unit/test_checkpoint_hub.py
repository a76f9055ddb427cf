"""Hub ids as checkpoints: the real huggingface_hub client against a fake hub on this machine.

Not covered: Xet transfers, proxies and certificates of a real network, file systems without symbolic links.
"""

from __future__ import annotations

import fcntl
import gc
import json
import logging
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import hub_download
import hub_errors
import pytest
from checkpoint import Checkpoint
from errors import CheckpointError, UsageError
from hub_repository import Repository
from hub_server import HubServer, model_files, safetensors
from huggingface_hub import constants, file_download, snapshot_download
from huggingface_hub.utils import _http

BUILD = Path(checkpoint.__file__).parent
TOKEN = "hf_secretsecretsecret"
INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
SHARDED = model_files(model__safetensors=None, model__safetensors__index__json=INDEX) | {
    f"model-{n}-of-2.safetensors": safetensors(n) for n in (1, 2)
}
WITH_CODE = model_files(config__json=b'{"auto_map": {"AutoModel": "code.M"}}') | {"code.py": b"x = 1"}
LARGE = safetensors(24_000_000)  # more than two of the 10 MB chunks that the client writes
CLIENT_SETTINGS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
)


pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # huggingface_hub closes no connection


@pytest.fixture(scope="module", autouse=True)
def no_connection_is_left_to_other_tests():
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        _http.reset_sessions()
        gc.collect()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake hub that this process's huggingface_hub talks to, without waits between tries."""
    with HubServer() as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in CLIENT_SETTINGS:
            monkeypatch.delenv(name, raising=False)
        use_endpoint(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_errors, "RETRY_WAITS_SECONDS", (0, 0, 0))
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))
        yield server
        server.release.set()
        for thread in threading.enumerate():
            if thread.name == "fetch":  # left behind by a failed download
                thread.join(timeout=20)
    assert server.unexpected == []


def use_endpoint(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def resolve(model: str = "org/tiny", **options) -> Checkpoint:
    return checkpoint.resolve(model, **options)


def sentence(model: str = "org/tiny", **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def contents(found: Checkpoint) -> dict[str, bytes]:
    return {name: (found.path / name).read_bytes() for name in found.files}


def token_file(tmp_path: Path, text: str = f"{TOKEN}\n") -> Path:
    path = tmp_path / "token"
    path.write_text(text)
    return path


def run_child(hub: HubServer, tmp_path: Path, code: str, **settings: str) -> subprocess.Popen[str]:
    """A Python of its own, with the client's settings in the environment as users set them."""
    environment = {name: value for name, value in os.environ.items() if name not in CLIENT_SETTINGS}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    environment |= settings
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=BUILD,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


NO_WAITS = "from huggingface_hub.utils import _http; _http.time.sleep = lambda seconds: None"
RESOLVE = "import checkpoint; found = checkpoint.resolve('org/tiny'); print(found.path)"


# --- what arrives


def test_a_hub_id_becomes_a_complete_pinned_checkpoint(hub, tmp_path):
    commit = hub.add("org/tiny", model_files())
    found = resolve()
    assert (found.model, found.revision, found.name) == ("org/tiny", commit, "tiny")
    assert found.path == tmp_path / "cache/models--org--tiny/snapshots" / commit
    assert contents(found) == model_files()


def test_only_what_is_needed_is_asked_for(hub):
    extras = (
        "README.md",
        "pytorch_model.bin",
        "flax_model.msgpack",
        "tf_model.h5",
        "tiny.gguf",
        "consolidated.safetensors",
    )
    hub.add(
        "org/tiny",
        model_files() | dict.fromkeys((*extras, "code.py", "onnx/model.onnx", "original/tokenizer.model"), b"x"),
    )
    resolve()
    assert {request.file for request in hub.requests if request.file} == set(model_files())


@pytest.mark.parametrize(
    ("files", "asked_for"),
    [
        (model_files(), {"config.json", "tokenizer_config.json"}),
        (SHARDED, {"config.json", "tokenizer_config.json", "model.safetensors.index.json"}),
        (
            model_files() | {"hf_quant_config.json": b"{}"},
            {"config.json", "tokenizer_config.json", "hf_quant_config.json"},
        ),
    ],
)
def test_a_plan_asks_for_no_weights_and_has_the_same_digest(hub, files, asked_for):
    hub.add("org/tiny", files)
    planned = resolve(is_plan=True)
    assert {request.file for request in hub.requests if request.file} == asked_for
    assert (planned.path / "config.json").is_file()
    assert resolve() == planned


def test_a_plan_offline_needs_no_weights_and_leaves_nothing_half_for_a_build(hub):
    commit = hub.add("org/tiny", model_files())
    resolve(is_plan=True)
    assert resolve(revision=commit, is_plan=True, offline=True).revision == commit
    assert "is not in the cache" in sentence(offline=True)


def test_only_the_shards_that_the_index_names_are_asked_for(hub):
    hub.add("org/tiny", SHARDED | {"model-3-of-3.safetensors": b"x", "pytorch_model.bin": b"x"})
    assert contents(resolve()) == SHARDED


def test_pickled_weights_are_taken_when_there_are_no_others(hub):
    hub.add("org/tiny", model_files(model__safetensors=None) | {"pytorch_model.bin": b"\x80\x02legacy"})
    assert "pytorch_model.bin" in resolve().files


def test_code_is_fetched_only_when_trusted(hub, caplog):
    caplog.set_level(logging.INFO)
    hub.add("org/tiny", WITH_CODE)
    assert "code.py" not in resolve().files
    assert not hub.asked("HEAD", "code.py")
    assert "brings Python code (auto_map in config.json), which is not used" in caplog.text
    assert "code.py" in resolve(trust_remote_code=True).files


def test_trusting_the_code_makes_another_digest(hub):
    hub.add("org/tiny", WITH_CODE)
    assert resolve().digest != resolve(trust_remote_code=True).digest


def test_code_of_another_repository_is_warned_about(hub, caplog):
    hub.add("org/tiny", model_files(config__json=b'{"auto_map": {"AutoModel": "org/other--code.M"}}'))
    resolve(trust_remote_code=True)
    assert "takes code from another repository, which is not pinned" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b""}, "has no config.json"),
        (model_files(model__safetensors=None) | {"q4.gguf": b"x"}, "has its weights only as GGUF (q4.gguf)"),
        (model_files(model__safetensors=None), "has no weights"),
        (model_files(tokenizer__json=None), "has no tokenizer"),
        (model_files(config__json=b"<html>"), "config.json is not JSON"),
        ({**SHARDED, "model-2-of-2.safetensors": b"short"}, "model-2-of-2.safetensors is not a safetensors file"),
        (
            {k: v for k, v in SHARDED.items() if "2-of" not in k},
            "names 2 weight files, and model-2-of-2.safetensors is missing",
        ),
    ],
)
def test_a_repository_that_cannot_be_built_is_refused(hub, files, message):
    commit = hub.add("org/tiny", files)
    assert sentence().startswith(f"'org/tiny' at commit {commit[:8]} ")
    assert message in sentence()


# --- which revision


@pytest.mark.parametrize(("model", "options"), [("org/tiny@v1", {}), ("org/tiny", {"revision": "v1"})])
def test_a_revision_can_be_named_in_two_ways(hub, model, options):
    tagged = hub.add("org/tiny", model_files(), revision="v1")
    hub.add("org/tiny", model_files(config__json=b"{}"))
    assert resolve(model, **options).revision == tagged


def test_two_revisions_are_refused(hub):
    with pytest.raises(UsageError, match="name two revisions; give one"):
        resolve("org/tiny@v1", revision="v2")


def test_all_files_come_from_one_commit_when_the_branch_moves(hub):
    old = hub.add("org/tiny", model_files())
    new = model_files(config__json=b'{"new": 1}', model__safetensors=safetensors(99))
    hub.fail("config.json", method="HEAD", times=1, before=lambda: hub.add("org/tiny", new))
    found = resolve()
    assert (found.revision, contents(found)) == (old, model_files())


def test_a_branch_that_moved_is_followed_and_the_old_commit_stays(hub):
    old = hub.add("org/tiny", model_files())
    first = resolve()
    new = hub.add("org/tiny", model_files(config__json=b'{"new": 1}'))
    assert (resolve().revision, resolve(revision=old, offline=True)) == (new, first)


def test_unchanged_files_of_a_new_commit_are_not_fetched_again(hub):
    hub.add("org/tiny", model_files())
    resolve()
    hub.add("org/tiny", model_files(config__json=b'{"new": 1}'))
    resolve()
    assert len(hub.asked("GET", "/content/")) == 1


def test_the_digest_tells_commits_apart(hub):
    hub.add("org/tiny", model_files())
    before = resolve().digest
    hub.add("org/tiny", model_files(config__json=b'{"new": 1}'))
    assert resolve().digest != before


def test_a_renamed_repository_works_under_its_old_name(hub, caplog):
    caplog.set_level(logging.INFO)
    hub.add("org/tiny", model_files())
    hub.renamed["tiny"] = "org/tiny"
    found = resolve("tiny")
    assert (found.model, found.digest) == ("tiny", resolve("org/tiny").digest)
    assert "'tiny' is called 'org/tiny' on the hub now" in caplog.text


# --- the cache


def test_a_cached_id_costs_one_request(hub):
    hub.add("org/tiny", model_files())
    first = resolve()
    hub.requests.clear()
    assert resolve() == first
    assert [request.path for request in hub.requests] == ["/api/models/org/tiny/revision/main?blobs=True"]


def test_a_cached_commit_costs_no_request(hub):
    commit = hub.add("org/tiny", model_files())
    first = resolve(revision=commit)
    hub.requests.clear()
    assert (resolve(revision=commit), hub.requests) == (first, [])


def test_offline_costs_no_request_and_is_the_same_checkpoint(hub):
    hub.add("org/tiny", model_files())
    first = resolve()
    hub.requests.clear()
    assert (resolve(offline=True), hub.requests) == (first, [])


def test_hf_hub_offline_is_offline(hub, monkeypatch):
    hub.add("org/tiny", model_files())
    first = resolve()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (resolve(), hub.requests) == (first, [])


@pytest.mark.parametrize("revision", [None, "v2", "0" * 40])
def test_offline_without_the_revision_is_refused(hub, tmp_path, revision):
    hub.add("org/tiny", model_files(), revision="v1")
    resolve(revision="v1")
    said = sentence(revision=revision, offline=True)
    assert f"'org/tiny' at {revision or 'main'!r} is not in the cache {str(tmp_path / 'cache')!r}" in said


def test_offline_names_the_files_that_are_missing(hub):
    hub.add("org/tiny", model_files())
    (resolve().path / "tokenizer_config.json").unlink()
    assert "is incomplete: tokenizer_config.json is missing; run once without --offline" in sentence(offline=True)


def test_an_interrupted_update_leaves_the_old_commit_for_offline(hub):
    hub.add("org/tiny", model_files())
    first = resolve()
    hub.add("org/tiny", model_files(model__safetensors=safetensors(99)))
    hub.fail("/content/", status=404)
    sentence()
    assert resolve(offline=True) == first


def test_a_cache_filled_by_the_client_itself_is_used_again(hub, tmp_path):
    hub.add("org/tiny", model_files())
    snapshot_download("org/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    hub.requests.clear()
    assert (len(resolve().files), len(hub.requests)) == (5, 1)


def test_a_cache_filled_by_the_client_itself_is_used_offline(hub, tmp_path):
    hub.add("org/tiny", model_files())
    snapshot_download("org/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert resolve(offline=True).digest == resolve().digest


def test_a_foreign_half_filled_cache_is_refused_offline(hub, tmp_path):
    hub.add("org/tiny", model_files())
    snapshot_download("org/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url, allow_patterns=["*.json"])
    assert "has no weights" in sentence(offline=True)
    assert "run once without --offline" in sentence(offline=True)


def test_the_default_cache_is_the_clients_own(hub, tmp_path):
    commit = hub.add("org/tiny", model_files())
    output, errors = run_child(hub, tmp_path, RESOLVE).communicate()
    assert (output.strip(), errors) == (str(tmp_path / "home/hub/models--org--tiny/snapshots" / commit), "")


def test_a_damaged_cached_file_is_fetched_again(hub, caplog):
    hub.add("org/tiny", model_files())
    (resolve().path / "model.safetensors").write_bytes(b"half")
    assert contents(resolve()) == model_files()
    assert "model.safetensors in the cache has the wrong size" in caplog.text


def test_a_read_only_complete_cache_will_do(hub, monkeypatch):
    hub.add("org/tiny", model_files())
    first = resolve()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert resolve() == first


def test_two_at_once_fetch_once(hub, tmp_path):
    hub.add("org/tiny", model_files())
    children = [run_child(hub, tmp_path, RESOLVE) for _ in range(2)]
    outputs = [child.communicate()[0].strip() for child in children]
    assert outputs[0] == outputs[1] != ""
    assert len(hub.asked("GET", "/content/")) == 1


def test_a_mirror_that_lists_only_names_will_do(hub):
    hub.add("org/tiny", model_files(), lists_sizes=False)
    assert contents(resolve()) == model_files()


# --- interrupted and damaged downloads


def test_a_killed_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    hub.fail("/content/", times=1, stall_after=12_000_000)
    child = run_child(hub, tmp_path, RESOLVE)
    wait_until(lambda: any(path.stat().st_size >= 10_000_000 for path in (tmp_path / "home").rglob("*.incomplete")))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    hub.requests.clear()

    output, _ = run_child(hub, tmp_path, RESOLVE).communicate()
    (weights,) = hub.asked("GET", "/content/")
    arrived = int(weights.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert arrived >= 10_000_000
    assert weights.sent_bytes == len(LARGE) - arrived
    assert (Path(output.strip()) / "model.safetensors").read_bytes() == LARGE


def test_files_that_had_arrived_before_the_kill_are_not_asked_for_again(hub, tmp_path):
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    hub.fail("/content/", times=1, stall_after=0)
    child = run_child(hub, tmp_path, RESOLVE)
    wait_until(lambda: hub.asked("GET", "/content/"))
    wait_until(lambda: len(list((tmp_path / "home").rglob("snapshots/*/*.json"))) == 4)
    wait_until(lambda: len(list((tmp_path / "home").rglob(".unverified/*"))) == 1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    hub.requests.clear()
    run_child(hub, tmp_path, RESOLVE).communicate()
    assert {request.file for request in hub.asked("HEAD")} == {"model.safetensors"}


def test_a_killed_download_is_no_checkpoint_offline(hub, tmp_path):
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    commit = hub.repositories["org/tiny"].revisions["main"]
    hub.fail("/content/", times=1, stall_after=0)
    child = run_child(hub, tmp_path, RESOLVE)
    wait_until(lambda: hub.asked("GET", "/content/"))
    wait_until(lambda: len(list((tmp_path / "home").rglob(".unverified/*"))) == 1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    cache = tmp_path / "home/hub"
    assert "is not in the cache" in sentence(cache_dir=cache, offline=True)
    assert "model.safetensors is missing" in sentence(revision=commit, cache_dir=cache, offline=True)


def wait_until(is_true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(FileNotFoundError):  # folders that the child makes and removes while they are walked through
            if is_true():
                return
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_an_interrupted_download_ends_at_once(hub, tmp_path):
    hub.add("org/tiny", SHARDED)
    hub.fail("/content/", stall_after=0)
    child = run_child(hub, tmp_path, RESOLVE)
    wait_until(lambda: len(hub.asked("GET", "/content/")) == 2)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=5)
    assert errors.endswith("KeyboardInterrupt\n")


def test_a_broken_connection_is_taken_up_again_in_the_same_run(hub, caplog):
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    hub.fail("/content/", times=1, drop_after=12_000_000)
    assert (resolve().path / "model.safetensors").read_bytes() == LARGE
    assert "range" in hub.asked("GET", "/content/")[1].headers
    assert f"{hub.url}: connection lost; trying again in 0 s" in caplog.text


def test_tries_start_again_while_bytes_arrive(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000_000)
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    hub.fail("/content/", times=10, drop_after=2_000_000)  # three tries alone would not do
    assert (resolve().path / "model.safetensors").read_bytes() == LARGE


def test_a_connection_that_always_breaks_is_given_up(hub):
    hub.add("org/tiny", model_files())
    hub.fail("/content/", drop_after=0)
    assert "cannot be reached for model.safetensors of 'org/tiny': connection lost" in sentence()


def test_altered_content_is_refused_and_removed(hub):
    hub.add("org/tiny", model_files())
    hub.fail("/content/", times=1, corrupt=True)
    assert "model.safetensors of 'org/tiny' arrived damaged" in sentence()
    assert contents(resolve()) == model_files()


def test_altered_small_files_are_refused_too(hub):
    hub.add("org/tiny", model_files())
    hub.fail("generation_config.json", times=1, corrupt=True)
    assert "generation_config.json of 'org/tiny' arrived damaged" in sentence()


def test_a_kill_between_download_and_check_does_not_skip_the_check(hub, monkeypatch):
    hub.add("org/tiny", model_files())
    hub.fail("/content/", times=1, corrupt=True)
    with monkeypatch.context() as patch:
        patch.setattr(hub_download, "_verify", lambda *_: None)  # as if killed just before
        with pytest.raises(CheckpointError):
            resolve()
    assert "model.safetensors of 'org/tiny' arrived damaged" in sentence(offline=True, revision=resolve_commit(hub))


def resolve_commit(hub: HubServer) -> str:
    return hub.repositories["org/tiny"].revisions["main"]


def test_an_overlong_partial_file_is_started_again(hub, tmp_path):
    hub.add("org/tiny", model_files())
    etag = resolve().path.joinpath("model.safetensors").resolve().name
    shutil.rmtree(tmp_path / "cache")
    blobs = tmp_path / "cache/models--org--tiny/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag}.incomplete").write_bytes(bytes(100_000))
    assert contents(resolve()) == model_files()


def test_one_failed_file_does_not_wait_for_the_others(hub):
    hub.add("org/tiny", SHARDED)
    hub.fail("model-1-of-2", method="HEAD", before=hub.release.wait)
    hub.fail("model-2-of-2", method="HEAD", status=403)
    assert "does not give out model-2-of-2.safetensors" in sentence()


# --- tokens


@pytest.fixture
def gated(hub):
    hub.tokens = {TOKEN, "hf_other"}
    hub.add("org/tiny", model_files(), gated=True, readers={TOKEN})
    return hub


def test_a_token_file_opens_a_gated_repository(gated, tmp_path):
    assert contents(resolve(token_file=token_file(tmp_path))) == model_files()


def test_hf_token_opens_a_gated_repository(gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert contents(resolve()) == model_files()


def test_hf_token_path_opens_a_gated_repository(gated, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN_PATH", str(token_file(tmp_path)))
    assert contents(resolve()) == model_files()


def test_the_stored_login_opens_a_gated_repository(gated, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token_file(tmp_path)))
    assert contents(resolve()) == model_files()


def test_a_stored_login_that_cannot_be_read_is_left_out(hub, monkeypatch, tmp_path, caplog):
    hub.add("org/tiny", model_files())
    (tmp_path / "login").write_bytes(b"\xff")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    assert contents(resolve()) == model_files()
    assert "the stored login cannot be read and is not used" in caplog.text


def test_a_stored_login_is_left_out_where_the_client_is_told_so(gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert sentence().startswith("'org/tiny' is gated; accept its licence")


def test_the_token_file_comes_before_the_environment(gated, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert contents(resolve(token_file=token_file(tmp_path))) == model_files()


def test_the_token_goes_to_the_hub_and_nowhere_else(gated, tmp_path):
    resolve(token_file=token_file(tmp_path))
    hub_port = int(gated.url.rpartition(":")[2])
    sent_to = {request.port for request in gated.requests if "authorization" in request.headers}
    assert sent_to == {hub_port}
    assert gated.asked("GET", "/content/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; it must hold one token"),
        ("\n \n", "is empty; it must hold one token"),
        (f"{TOKEN}\n{TOKEN}", "holds more than a token; it must be one word"),
        (f"HF_TOKEN= {TOKEN}", "holds more than a token; it must be one word"),
        (f"{TOKEN}\u00e9", "holds more than a token; it must be one word"),
        (None, "cannot be read: No such file or directory"),
    ],
)
@pytest.mark.parametrize("given_as", ["--token-file", "HF_TOKEN_PATH"])
def test_a_token_file_that_holds_no_token_is_refused(hub, tmp_path, monkeypatch, given_as, text, message):
    path = tmp_path / "missing" if text is None else token_file(tmp_path, text)
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    said = sentence(token_file=path) if given_as == "--token-file" else sentence()
    assert message in said
    assert f"{given_as} {str(path)!r}" in said
    assert TOKEN not in said
    assert hub.requests == []


def test_a_token_file_of_bytes_is_refused(hub, tmp_path):
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    assert "is not text; it must hold one token" in sentence(token_file=tmp_path / "token")


def test_a_folder_as_token_file_is_refused(hub, tmp_path):
    assert "cannot be read: Is a directory" in sentence(token_file=tmp_path)


def test_a_token_of_two_words_in_the_environment_is_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"Bearer {TOKEN}")
    said = sentence()
    assert said.startswith("HF_TOKEN holds more than a token")
    assert TOKEN not in said


@pytest.mark.parametrize("fault", [{}, {"status": 403, "error_message": "no"}, {"status": 500}, {"drop_after": 0}])
def test_the_token_is_in_no_log_and_no_message(gated, tmp_path, fault):
    if fault:
        gated.fail("/org/tiny/resolve/", method="HEAD", **fault)
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "import checkpoint, hub_errors, traceback; from pathlib import Path\n"
        "hub_errors.RETRY_WAITS_SECONDS = (0,)\n"
        f"{NO_WAITS}\n"
        "try: print(checkpoint.resolve('org/tiny', token_file=Path('@')))\n"
        "except Exception as error: traceback.print_exception(error)\n"
    ).replace("@", str(token_file(tmp_path)))
    output, errors = run_child(gated, tmp_path, code, HF_DEBUG="1").communicate()
    assert TOKEN not in output + errors
    assert "authenticated: True" in errors  # the log is as loud as it can be


def test_the_repository_does_not_show_its_token():
    repository = Repository(id="a/b", revision="main", cache=Path(), endpoint="", token=TOKEN, token_origin="HF_TOKEN")
    assert TOKEN not in repr(repository)


# --- what the hub refuses


def test_a_gated_repository_without_token_asks_for_licence_and_token(gated):
    page = f"{gated.url}/org/tiny"
    assert sentence() == (
        f"'org/tiny' is gated; accept its licence at {page}, then pass a token with --token-file or HF_TOKEN"
    )


def test_a_gated_repository_with_a_token_that_may_not_names_the_token(gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    said = sentence()
    assert "is gated, and the token of HF_TOKEN has no access; accept its licence at" in said
    assert "hf_other" not in said


def test_an_unknown_token_is_named_by_its_origin(gated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert sentence() == (
        f"{gated.url} does not know the token of HF_TOKEN; it is mistyped, expired or revoked, make a new one"
    )


@pytest.mark.parametrize("token", [None, "hf_other"])
@pytest.mark.parametrize("model", ["org/none", "org/private"])
def test_missing_and_private_repositories_are_not_told_apart(hub, monkeypatch, model, token):
    hub.add("org/private", model_files(), private=True)
    hub.tokens = {"hf_other"}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    advice = "let the token of HF_TOKEN read it" if token else "pass a token with --token-file or HF_TOKEN"
    assert sentence(model) == (
        f"{model!r} is not a folder here, and on {hub.url} it does not exist or is private; check the name, or {advice}"
    )


def test_a_revision_that_does_not_exist_is_named(hub):
    hub.add("org/tiny", model_files())
    assert sentence("org/tiny@v9") == (
        f"'org/tiny' has no revision 'v9'; it must be a branch, a tag or a commit, see {hub.url}/org/tiny/commits"
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"status": 403, "error_message": "Access to this resource is disabled."},
            "(Access to this resource is disabled.)",
        ),
        ({"status": 429}, "limits requests from here (HTTP 429); wait some minutes, or pass a token"),
        ({"status": 500}, "is in trouble (HTTP 500, several tries); try later, use --offline"),
        ({"status": 503}, "is in trouble (HTTP 503, several tries); try later, use --offline"),
        ({"page": b"<html>Please log in</html>"}, "does not answer as a Hugging Face hub does; check HF_ENDPOINT"),
        ({"page": b"{}"}, "does not answer as a Hugging Face hub does"),
        ({"page": b"[]"}, "does not answer as a Hugging Face hub does"),
        ({"page": b'{"id": "org/tiny", "sha": "main"}'}, "does not answer as a Hugging Face hub does"),
        ({"drop_after": 3}, "cannot be reached for 'org/tiny': connection lost, also after several tries"),
    ],
)
def test_a_hub_that_does_not_list_is_explained(hub, fault, message):
    hub.add("org/tiny", model_files())
    hub.fail("/api/models/", **fault)
    said = sentence()
    assert hub.url in said
    assert message in said


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 403, "error_message": "not\n with this plan"}, "does not give out model.safetensors of 'org/tiny'"),
        ({"status": 404}, "does not exist or is private"),
        ({"status": 429}, "limits requests from here (HTTP 429)"),
        ({"status": 502}, "is in trouble (HTTP 502, several tries)"),
        ({"page": b"<html>Please log in</html>"}, "does not answer as a Hugging Face hub does"),
    ],
)
def test_a_hub_that_lists_but_gives_no_file_is_explained(hub, fault, message):
    hub.add("org/tiny", model_files())
    hub.fail("model.safetensors", method="HEAD", **fault)
    assert message in sentence()


def test_a_listed_file_that_is_gone_is_named(hub):
    commit = hub.add("org/tiny", model_files())
    hub.fail(
        "generation_config.json",
        method="HEAD",
        before=lambda: hub.repositories["org/tiny"].commits[commit].pop("generation_config.json", None),
    )
    assert "lists generation_config.json of 'org/tiny' but does not have it" in sentence()


def test_an_error_that_passes_is_waited_for(hub, caplog):
    hub.add("org/tiny", model_files())
    hub.fail("/api/models/", times=2, status=503)
    hub.fail("model.safetensors", method="HEAD", times=2, status=503)
    assert contents(resolve()) == model_files()
    assert f"{hub.url}: HTTP 503; trying again in 0 s" in caplog.text


def test_a_store_that_refuses_is_not_taken_for_the_hub(hub):
    hub.add("org/tiny", model_files())
    hub.fail("/content/", status=404)
    store = hub.content_url.removeprefix("http://")
    assert f"model.safetensors of 'org/tiny' could not be fetched: {store} answers HTTP 404; run again" in sentence()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is too full for 'org/tiny'"),
        (RuntimeError("bad\nanswer of http://store/x?signature=secret"), "(bad answer of http://store/x); run again"),
        (TimeoutError("request timed out"), "config.json of 'org/tiny': no answer in time, also after several tries"),
        (ValueError(), "config.json of 'org/tiny' could not be fetched (ValueError)"),
    ],
)
def test_whatever_the_client_raises_becomes_a_sentence(hub, monkeypatch, error, message):
    hub.add("org/tiny", model_files())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub_download, "hf_hub_download", fail)
    assert message in sentence()


def test_a_download_address_that_expired_is_asked_for_again(hub):
    hub.add("org/tiny", model_files())
    hub.fail("/content/", times=1, status=403)
    assert contents(resolve()) == model_files()


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1 cannot be reached for 'org/tiny': connection refused"),
        ("http://hub.invalid", "http://hub.invalid cannot be reached for 'org/tiny': its name cannot be resolved"),
        ("hub.invalid", "HF_ENDPOINT 'hub.invalid' is not an address; it must look like https://host"),
        ("https://127.0.0.1:@", "no TLS connection, or a certificate that is not trusted; check network and proxy"),
    ],
)
def test_a_hub_out_of_reach_is_explained(hub, monkeypatch, endpoint, message):
    use_endpoint(monkeypatch, endpoint.replace("@", hub.url.rpartition(":")[2]))
    assert message in sentence()


def test_a_hub_that_does_not_answer_is_explained(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.add("org/tiny", model_files())
    hub.fail("/api/models/", before=hub.release.wait)
    assert "cannot be reached for 'org/tiny': no answer in time" in sentence()


@pytest.mark.parametrize(
    "model",
    [
        "",
        "a//b",
        "a/b/c",
        "/".join("ab") + "/",
        "org/na me",
        "org/name\n",
        "-x",
        "x.",
        "a--b",
        "a..b",
        "x.git",
        "ü",
        "x" * 97,
        "x" * 5000,
        "https://host/gpt2",
    ],
)
def test_an_id_that_cannot_be_one_is_refused_without_asking(hub, model):
    said = sentence(model)
    assert "is neither a folder here nor a Hugging Face id; an id is 'name' or 'org/name'" in said
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "a b", "../main", "a/../b", "/etc", "-x", "a:b", "a^", "a/", "a\0b"])
def test_a_revision_that_cannot_be_one_is_refused_without_asking(hub, revision):
    assert "is not a revision of 'org/tiny'; it must be a branch, a tag or a commit" in sentence(f"org/tiny@{revision}")
    assert hub.requests == []


# --- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_small_a_disk_is_noticed_before_the_download(hub, small_disk):
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    said = sentence(cache_dir=small_disk / "hub")
    assert (
        f"the disk of {str(small_disk / 'hub')!r} is too full for 'org/tiny': 24 MB are to come and 17 MB are free"
        in said
    )
    assert not hub.asked("HEAD", "model.safetensors")


def test_a_disk_that_fills_up_during_the_download_is_explained(hub, small_disk):
    hub.add("org/tiny", model_files(model__safetensors=safetensors(14_000_000)))
    hub.fail("/content/", before=lambda: (small_disk / "other").write_bytes(bytes(8_000_000)))
    assert re.search(
        r"is too full for 'org/tiny': \d+ MB are to come and \d+ \w+ are free; make room",
        sentence(cache_dir=small_disk),
    )


def test_a_mirror_without_sizes_still_ends_in_a_full_disk(hub, small_disk):
    hub.add("org/tiny", model_files(model__safetensors=LARGE), lists_sizes=False)
    assert "is too full for 'org/tiny'" in sentence(cache_dir=small_disk)


def test_a_download_goes_on_after_room_was_made(hub, small_disk):
    hub.add("org/tiny", model_files(model__safetensors=safetensors(14_000_000)))
    hub.fail("/content/", times=1, before=lambda: (small_disk / "other").write_bytes(bytes(4_000_000)))
    sentence(cache_dir=small_disk)
    (small_disk / "other").unlink()
    resolve(cache_dir=small_disk)
    assert hub.asked("GET", "/content/")[-1].status == 206


def test_a_cache_folder_that_cannot_be_made_is_explained(hub, tmp_path):
    hub.add("org/tiny", model_files())
    (tmp_path / "file").write_text("")
    said = sentence(cache_dir=tmp_path / "file" / "hub")
    assert (
        f"the cache {str(tmp_path / 'file' / 'hub')!r} cannot be used: Not a directory; choose another with HF_HOME"
        in said
    )


# --- what the user sees meanwhile


def test_the_log_says_what_comes_and_what_came(hub, caplog):
    caplog.set_level(logging.INFO)
    commit = hub.add("org/tiny", model_files(model__safetensors=safetensors(2_000_000)))
    resolve()
    assert [record.message for record in caplog.records] == [
        f"fetching 3 files, 2 MB, of 'org/tiny' at commit {commit[:8]}",
        "fetched 3 files, 2 MB, in 0 s",
    ]


def test_the_log_says_how_far_it_is(hub, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hub_download, "PROGRESS_SECONDS", 0.02)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000_000)
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    hub.fail("/content/", times=1, stall_after=12_500_000)
    with ThreadPoolExecutor(1) as pool:
        resolving = pool.submit(resolve)
        wait_until(lambda: re.search(r"fetched [1-5]\d % of 24 MB", caplog.text))
        hub.release.set()
        resolving.result()


def test_a_resumed_download_says_how_much_is_there(hub, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hub_errors, "RETRY_WAITS_SECONDS", ())
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    hub.fail("/content/", times=1, drop_after=12_000_000)
    sentence()
    resolve()
    assert re.search(r"fetching 1 file, 24 MB, of 'org/tiny' at commit \w+ \(4\d % is there\)", caplog.text)


def test_nothing_is_drawn_when_stderr_is_no_terminal(hub, tmp_path):
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    _, errors = run_child(hub, tmp_path, RESOLVE).communicate()
    assert errors == ""


def test_the_clients_warnings_with_signed_addresses_are_not_shown(hub, tmp_path):
    hub.add("org/tiny", model_files())
    hub.fail("/content/", times=1, status=503)
    _, errors = run_child(hub, tmp_path, f"{NO_WAITS}; {RESOLVE}").communicate()
    assert errors == ""


def test_the_clients_progress_bar_is_drawn_on_a_terminal(hub, tmp_path):
    hub.add("org/tiny", model_files(model__safetensors=LARGE))
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    code = f"import os; os.dup2({terminal}, 2); {RESOLVE}"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=BUILD,
        env=environment,
        pass_fds=[terminal],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    os.close(terminal)
    drawn = os.read(controller, 100_000).decode()
    os.close(controller)
    assert "config.json: 100%" in drawn


def test_the_clients_log_level_is_left_as_it_was(hub):
    before = logging.getLogger("huggingface_hub").level
    sentence()
    assert logging.getLogger("huggingface_hub").level == before
