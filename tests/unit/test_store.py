"""The engine store: built once, by whichever process; nothing half done is ever found, whenever a builder dies.

Builders that wait or die are real processes, forked from this one and told by pipes and gates what to do.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import engine_manifest
import pytest
import store as store_module
from engine_manifest import EngineManifest, ManifestError, check_files, read_manifest, write_manifest
from errors import CompileError, StoreError
from plan import EngineLimits, EnginePlan
from store import Store

PLAN = EnginePlan(
    engine="openvino",
    model="gpt2",
    revision=None,
    checkpoint_digest="cd" * 32,
    architecture="GPT2LMHeadModel",
    dtype="float32",
    quantization="none",
    kv_cache_dtype="auto",
    tensor_parallel=1,
    pipeline_parallel=1,
    gpu=None,
    limits=EngineLimits(max_batch_size=16, max_input_len=1023, max_seq_len=1024),
    trust_remote_code=False,
    compiler_versions=(("openvino", "2026.4.1"),),
)
OTHER_PLAN = replace(PLAN, checkpoint_digest="ef" * 32)
FORK = multiprocessing.get_context("fork")
SOON_SECONDS = 20  # for what comes at once unless something is wrong

Compile = Callable[[Path], EngineManifest]


def manifest_of(plan: EnginePlan) -> EngineManifest:
    return EngineManifest(
        key=Store.key_of(plan),
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
        vocab_size=256,
        bos_token_id=0,
        eos_token_ids=[0],
        pad_token_id=None,
        kv_bytes_per_token=64,
        gpu=None,
        versions=dict(plan.compiler_versions),
        created="2026-11-24T02:00:00+00:00",
        files={},
    )


def compile_small(folder: Path, plan: EnginePlan = PLAN, content: bytes = b"weights" * 1000) -> EngineManifest:
    (folder / "rank0").mkdir()
    (folder / "rank0/weights.bin").write_bytes(content)
    (folder / "tokenizer.json").write_text("{}")
    return manifest_of(plan)


def compile_other(folder: Path) -> EngineManifest:
    return compile_small(folder, OTHER_PLAN)


def never(folder: Path) -> EngineManifest:
    raise AssertionError("compiled again")


@pytest.fixture(autouse=True)
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, in order, without waiting for the disk."""
    done: list[str] = []
    replace_ = os.replace

    def fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace_noting(source: Path, target: Path) -> None:
        replace_(source, target)
        done.append(f"{source} -> {target}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_noting)
    return done


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def stored(store: Store) -> Path:
    return store.build_once(PLAN, compile_small)


def engines(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.iterdir() if not path.name.startswith("."))


def half_built(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / ".building").iterdir())


def sentence(call: Callable, *args: object) -> str:
    with pytest.raises(StoreError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and "--cache-dir" in message
    return message


# ---- keys and names


def test_the_key_is_a_sha256(store):
    assert len(bytes.fromhex(store.key_of(PLAN))) == 32


def test_the_name_of_the_model_does_not_change_the_key(store):
    assert store.key_of(replace(PLAN, model="/models/gpt2")) == store.key_of(PLAN)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "pytorch"},
        {"checkpoint_digest": "00" * 32},
        {"dtype": "float16"},
        {"quantization": "int8"},
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
        {"gpu": "NVIDIA-A10G"},
        {"limits": EngineLimits(max_batch_size=8, max_input_len=1023, max_seq_len=1024)},
        {"compiler_versions": (("openvino", "2026.4.2"),)},
    ],
)
def test_what_decides_the_engine_changes_the_key(store, change):
    assert store.key_of(replace(PLAN, **change)) != store.key_of(PLAN)


def test_a_new_schema_of_the_manifest_changes_the_key(store, monkeypatch):
    key = store.key_of(PLAN)
    monkeypatch.setattr(store_module, "SCHEMA", store_module.SCHEMA + 1)
    assert store.key_of(PLAN) != key


@pytest.mark.parametrize(("quantization", "word"), [("none", "float32"), ("int4", "int4")])
def test_the_folder_says_what_it_holds(store, quantization, word):
    plan = replace(PLAN, quantization=quantization)
    assert store.folder_of(plan) == store.root / f"openvino-GPT2LMHeadModel-{word}-{store.key_of(plan)[:16]}"


# ---- building and finding


def test_an_empty_store_finds_nothing(store):
    assert store.find(PLAN) is None


def test_what_is_built_is_found(store, stored):
    assert store.find(PLAN) == stored == store.folder_of(PLAN)


def test_an_engine_is_not_another_plans(store, stored):
    assert store.find(OTHER_PLAN) is None


def test_what_is_stored_is_not_built_again(store, stored):
    assert store.build_once(PLAN, never) == stored


def test_a_stored_engine_has_its_compilers_manifest_and_the_files_digests(store, stored):
    manifest = read_manifest(stored)
    assert replace(manifest, files={}) == manifest_of(PLAN)
    assert sorted(manifest.files) == ["rank0/weights.bin", "tokenizer.json"]
    check_files(stored, manifest)


def test_a_build_leaves_nothing_but_the_engine(store, stored):
    assert (engines(store), half_built(store)) == ([stored.name], [])


def test_a_file_written_for_its_user_only_becomes_readable_as_the_folder_is(store):
    def compile_private(folder: Path) -> EngineManifest:
        manifest = compile_small(folder)
        (folder / "rank0/weights.bin").chmod(0o600)
        (folder / "rank0").chmod(0o700)
        return manifest

    old = os.umask(0o027)
    try:
        folder = store.build_once(PLAN, compile_private)
    finally:
        os.umask(old)
    modes = [path.stat().st_mode & 0o777 for path in (folder, folder / "rank0", folder / "rank0/weights.bin")]
    assert modes == [0o750, 0o750, 0o640]


def test_everything_is_on_the_disk_before_it_is_seen(store, stored, flushed):
    building = flushed[-2].partition(" -> ")[0]
    manifest, new_manifest = f"{building}/engine.json", f"{building}/.engine.json.{os.getpid()}"
    start = len(flushed) - 5
    assert sorted(flushed[start - 3 : start]) == [
        f"{building}/rank0",
        f"{building}/rank0/weights.bin",
        f"{building}/tokenizer.json",
    ]
    assert flushed[start:] == [
        new_manifest,
        f"{new_manifest} -> {manifest}",
        building,
        f"{building} -> {stored}",
        str(store.root),
    ]


def test_a_file_system_that_cannot_flush_folders_will_do(store, monkeypatch):
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    assert store.build_once(PLAN, compile_small) == store.find(PLAN)


def test_finding_a_large_engine_takes_no_time(store, stored):
    os.truncate(stored / "rank0/weights.bin", 64 << 30)  # a hole: hashing it would take a minute
    manifest = read_manifest(stored)
    manifest.files["rank0/weights.bin"]["bytes"] = 64 << 30
    write_manifest(stored, manifest)
    start = time.monotonic()
    found = store.find(PLAN)
    assert found == stored and time.monotonic() - start < 0.5


def test_what_the_compiler_raises_comes_out_and_nothing_is_left(store):
    def fail(folder: Path) -> EngineManifest:
        compile_small(folder)
        raise CompileError("no such operator")

    with pytest.raises(CompileError, match="no such operator"):
        store.build_once(PLAN, fail)
    assert (engines(store), half_built(store)) == ([], [])


def test_an_interrupted_build_leaves_nothing(store):
    def interrupt(folder: Path) -> EngineManifest:
        compile_small(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build_once(PLAN, interrupt)
    assert (engines(store), half_built(store)) == ([], [])


def test_a_failed_build_can_be_tried_again_in_the_same_process(store):
    with pytest.raises(AssertionError):
        store.build_once(PLAN, never)
    assert store.build_once(PLAN, compile_small) == store.find(PLAN)


# ---- several builders


class Builder:
    """A build in a process of its own. It tells what happens and, if it has a gate, waits there while compiling."""

    def __init__(self, store: Store, *, plan: EnginePlan = PLAN, gate: Any = None, patch: Callable | None = None):
        self._events, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_build, args=(store.root, plan, gate, patch, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def tells(self) -> str:
        assert self._events.poll(SOON_SECONDS), "the builder says nothing"
        return self._events.recv()

    def told(self) -> list[str]:
        """All that it has told, once it has ended."""
        told = []
        with suppress(EOFError):
            while True:
                told.append(self._events.recv())
        return told

    def ends(self) -> int:
        self.process.join(SOON_SECONDS)
        assert self.process.exitcode is not None, "the builder does not end"
        return self.process.exitcode


class _Tell(logging.Handler):
    def __init__(self, events: Connection):
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.send(record.getMessage())


def _build(root: Path, plan: EnginePlan, gate: Any, patch: Callable | None, events: Connection) -> None:
    store_module.log.addHandler(_Tell(events))
    store_module.log.setLevel(logging.INFO)
    if patch:
        patch()

    def compile_behind_gate(folder: Path) -> EngineManifest:
        manifest = compile_small(folder, plan)
        events.send("compiling")
        if gate:
            gate.wait()
        return manifest

    events.send(str(Store(root).build_once(plan, compile_behind_gate)))


def test_two_builders_compile_once_and_get_the_same_folder(store):
    gate = FORK.Event()
    builders = [Builder(store, gate=gate) for _ in range(2)]
    first = sorted(builder.tells() for builder in builders)  # both are under way before the gate opens
    assert first[0] == "compiling" and first[1].startswith("waiting for openvino-GPT2LMHeadModel-float32-")
    gate.set()
    assert [builder.tells() for builder in builders] == [str(store.folder_of(PLAN))] * 2
    assert [builder.ends() for builder in builders] == [0, 0]


def test_of_four_builders_one_compiles(store):
    builders = [Builder(store) for _ in range(4)]
    assert [builder.ends() for builder in builders] == [0] * 4
    told = [sentence for builder in builders for sentence in builder.told()]
    assert told.count("compiling") == 1
    assert told.count(str(store.folder_of(PLAN))) == 4


def test_threads_of_one_process_compile_once(store):
    compiled = []

    def compile_noting(folder: Path) -> EngineManifest:
        compiled.append(folder)
        return compile_small(folder)

    threads = [threading.Thread(target=store.build_once, args=(PLAN, compile_noting)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


def test_who_waits_says_for_whom(store):
    gate = FORK.Event()
    first = Builder(store, gate=gate)
    assert first.tells() == "compiling"
    second = Builder(store)
    assert f"being built by process {first.process.pid} on {os.uname().nodename} since 20" in second.tells()
    gate.set()
    assert (first.ends(), second.ends()) == (0, 0)


def test_who_waits_goes_on_saying_so(store):
    def hurry() -> None:
        store_module.PROGRESS_SECONDS = 0.01

    gate = FORK.Event()
    first = Builder(store, gate=gate)
    assert first.tells() == "compiling"
    second = Builder(store, patch=hurry)
    assert second.tells() == second.tells() == second.tells() != "compiling"
    gate.set()
    assert (first.ends(), second.ends()) == (0, 0)


def test_another_engine_is_built_meanwhile_and_leaves_the_first_alone(store):
    gate = FORK.Event()
    first = Builder(store, gate=gate)
    assert first.tells() == "compiling"
    other = store.build_once(OTHER_PLAN, compile_other)
    assert len(half_built(store)) == 1
    gate.set()
    assert first.ends() == 0
    assert engines(store) == sorted([other.name, store.folder_of(PLAN).name])


# ---- builders that die


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_replace(number: int, *, done: bool) -> Callable[[], None]:
    """Die before or after the `number`th os.replace of a build: engine.json's is the first, the folder's the last."""

    def patch() -> None:
        calls, replace_ = [], os.replace

        def replace_or_die(*names: Path) -> None:
            calls.append(names)
            if len(calls) == number and not done:
                die()
            replace_(*names)
            if len(calls) == number:
                die()

        os.replace = replace_or_die

    return patch


MOMENTS: dict[str, Callable[[], None]] = {
    "hashing": lambda: setattr(engine_manifest.hashlib, "sha256", die_after_key()),
    "flushing": lambda: setattr(store_module, "_make_durable", die),
    "before engine.json": lambda: setattr(store_module, "write_manifest", die),
    "engine.json has another name": die_at_replace(1, done=False),
    "engine.json is there": die_at_replace(1, done=True),
    "before the rename": die_at_replace(2, done=False),
}


def die_after_key() -> Callable:
    """The store hashes the plan in the main thread; the first file, in a thread of the pool, is the last."""
    sha256 = engine_manifest.hashlib.sha256
    return lambda *data: sha256(*data) if threading.current_thread() is threading.main_thread() else die()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_builder_leaves_nothing_that_is_found(store, moment):
    builder = Builder(store, patch=MOMENTS[moment])
    assert builder.ends() == -signal.SIGKILL
    assert len(half_built(store)) == 1  # it was where we wanted it
    assert (store.find(PLAN), engines(store)) == (None, [])


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_build_after_a_killed_one_succeeds_and_cleans_up(store, moment):
    Builder(store, patch=MOMENTS[moment]).ends()
    folder = store.build_once(PLAN, compile_small)
    check_files(folder, read_manifest(folder))
    assert (engines(store), half_built(store)) == ([folder.name], [])


def test_a_builder_killed_while_compiling_leaves_nothing_that_is_found(store):
    builder = Builder(store, gate=FORK.Event())
    assert builder.tells() == "compiling"
    builder.process.kill()
    assert builder.ends() == -signal.SIGKILL
    assert (store.find(PLAN), engines(store)) == (None, [])
    assert store.build_once(PLAN, compile_small) == store.find(PLAN)
    assert half_built(store) == []


def test_a_builder_killed_after_the_rename_leaves_an_engine(store):
    assert Builder(store, patch=die_at_replace(2, done=True)).ends() == -signal.SIGKILL
    folder = store.build_once(PLAN, never)
    check_files(folder, read_manifest(folder))


def test_who_waits_for_a_killed_builder_builds(store):
    first = Builder(store, gate=FORK.Event())
    assert first.tells() == "compiling"
    second = Builder(store)
    assert second.tells().startswith("waiting for ")
    first.process.kill()
    assert second.tells() == "compiling"
    assert second.tells() == str(store.find(PLAN))
    assert (first.ends(), second.ends()) == (-signal.SIGKILL, 0)


def test_cleaning_up_after_a_killed_builder_keeps_the_lock(store):
    Builder(store, patch=MOMENTS["before the rename"]).ends()
    gate = FORK.Event()
    second = Builder(store, gate=gate)
    assert second.tells() == "compiling"
    third = Builder(store)
    assert third.tells().startswith("waiting for ")
    gate.set()
    assert (second.ends(), third.ends()) == (0, 0)


def test_the_next_build_removes_what_a_killed_builder_of_another_engine_left(store):
    Builder(store, patch=MOMENTS["before the rename"]).ends()
    other = store.build_once(OTHER_PLAN, compile_other)
    assert (engines(store), half_built(store)) == ([other.name], [])


def test_sigterm_leaves_nothing(store):
    builder = Builder(store, gate=FORK.Event())
    assert builder.tells() == "compiling"
    builder.process.terminate()
    assert builder.ends() == 128 + signal.SIGTERM
    assert (engines(store), half_built(store)) == ([], [])


def test_sigterm_means_what_it_did_after_a_build(store, stored):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_network_file_systems_leave_does_not_matter(store, stored):
    (store.root / ".building/.nfs000000000000001").touch()
    store.build_once(OTHER_PLAN, compile_other)


# ---- what a build leaves for the next one ----------------------------------------------------------------------------


def fail_with_a_rank_done(store: Store, plan: EnginePlan = PLAN) -> Path:
    """A build that fails after it has put something into its kept folder."""
    kept = store.kept_folder(plan)

    def fail(folder: Path) -> EngineManifest:
        (kept / "rank0").mkdir(parents=True)
        (kept / "rank0/rank0.engine").write_bytes(b"plan")
        raise CompileError("rank 1 failed")

    with pytest.raises(CompileError):
        store.build_once(plan, fail)
    return kept


def make_old(folder: Path) -> None:
    long_ago = time.time() - store_module.KEPT_SECONDS - 60
    os.utime(folder, (long_ago, long_ago))


def test_what_a_failed_build_has_finished_is_there_for_the_next(store):
    kept = fail_with_a_rank_done(store)
    assert half_built(store) == []

    def finish(folder: Path) -> EngineManifest:
        assert (kept / "rank0/rank0.engine").read_bytes() == b"plan"
        return compile_small(folder)

    store.build_once(PLAN, finish)
    assert not kept.exists()  # the engine has it now


def test_what_one_engine_has_kept_is_not_anothers(store):
    assert store.kept_folder(PLAN) != store.kept_folder(OTHER_PLAN)
    kept = fail_with_a_rank_done(store)
    store.build_once(OTHER_PLAN, compile_other)
    assert (kept / "rank0/rank0.engine").exists()


def test_a_forced_build_begins_anew(store):
    kept = fail_with_a_rank_done(store)

    def compile_looking(folder: Path) -> EngineManifest:
        assert not kept.exists()
        return compile_small(folder)

    store.build_once(PLAN, compile_looking, force=True)


def test_what_was_kept_for_a_week_goes_at_the_next_build(store):
    kept = fail_with_a_rank_done(store)
    make_old(kept)
    store.build_once(OTHER_PLAN, compile_other)
    assert not kept.exists()


def test_what_is_being_built_is_kept_however_old_it_is(store):
    kept = fail_with_a_rank_done(store)
    make_old(kept)
    gate = FORK.Event()
    builder = Builder(store, gate=gate, patch=lambda: setattr(store_module, "KEPT_SECONDS", 1e12))
    assert builder.tells() == "compiling"  # it has the lock now, and with its own patience left the folder alone
    store.build_once(OTHER_PLAN, compile_other)
    assert kept.exists()
    gate.set()
    assert builder.ends() == 0


def test_a_stored_engine_is_found_without_a_look_at_what_is_kept(store, stored):
    assert not (store.root / ".kept").exists()
    assert store.find(PLAN) == stored


# ---- damaged engines

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda engine: os.truncate(engine / "rank0/weights.bin", 10),
    "longer": lambda engine: os.truncate(engine / "tokenizer.json", 10),
    "file missing": lambda engine: (engine / "tokenizer.json").unlink(),
    "folder missing": lambda engine: shutil.rmtree(engine / "rank0"),
    "no engine.json": lambda engine: (engine / "engine.json").unlink(),
    "half an engine.json": lambda engine: os.truncate(engine / "engine.json", 100),
    "another's engine.json": lambda engine: write_manifest(engine, manifest_of(OTHER_PLAN)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_engine_is_not_found(store, stored, damage):
    DAMAGES[damage](stored)
    assert store.find(PLAN) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_engine_is_built_again(store, stored, damage):
    DAMAGES[damage](stored)
    assert store.build_once(PLAN, compile_small) == stored
    check_files(stored, read_manifest(stored))
    assert (engines(store), half_built(store)) == ([stored.name], [])


def test_why_an_engine_is_built_again_is_said(store, stored, caplog):
    os.truncate(stored / "rank0/weights.bin", 10)
    store.build_once(PLAN, compile_small)
    assert f"building again: {stored}/rank0/weights.bin has 10 bytes, and engine.json says 7000" in caplog.text


def test_force_cures_a_changed_byte(store, stored):
    (stored / "tokenizer.json").write_text("[]")
    with pytest.raises(ManifestError, match=r"tokenizer\.json has SHA-256 .* --force"):
        check_files(stored, read_manifest(stored))
    assert store.build_once(PLAN, compile_small, force=True) == stored
    check_files(stored, read_manifest(stored))


def test_a_forced_build_keeps_the_old_engine_until_it_is_done(store, stored):
    def compile_looking(folder: Path) -> EngineManifest:
        check_files(stored, read_manifest(stored))
        return compile_small(folder, content=b"new")

    store.build_once(PLAN, compile_looking, force=True)
    assert (stored / "rank0/weights.bin").read_bytes() == b"new"
    assert half_built(store) == []


def test_a_forced_build_that_fails_leaves_the_old_engine(store, stored):
    with pytest.raises(AssertionError):
        store.build_once(PLAN, never, force=True)
    assert store.find(PLAN) == stored


def test_who_has_the_old_engine_open_keeps_it(store, stored):
    with (stored / "rank0/weights.bin").open("rb") as weights:
        store.build_once(PLAN, lambda folder: compile_small(folder, content=b"new"), force=True)
        assert weights.read() == b"weights" * 1000


# ---- disks


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk."))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"this user cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def compile_too_much(folder: Path) -> EngineManifest:
    return compile_small(folder, content=bytes(2 << 20))


def compile_too_much_in_other_words(folder: Path) -> EngineManifest:
    """As OpenVINO does."""
    try:
        return compile_too_much(folder)
    except OSError:
        raise RuntimeError("basic_ios::clear: iostream error") from None


def compile_until_it_is_full(folder: Path) -> EngineManifest:
    manifest = compile_small(folder)
    with (folder / "rest.bin").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return manifest


@pytest.mark.parametrize("compile", [compile_too_much, compile_too_much_in_other_words, compile_until_it_is_full])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(small_disk, compile):
    store = Store(small_disk / "store")
    message = sentence(store.build_once, PLAN, compile)
    assert message.startswith(f"the engine store {store.root} is too full for this engine: 0 MB are free; make room")
    assert (engines(store), half_built(store)) == ([], [])


def test_a_disk_that_was_full_takes_the_next_engine(small_disk):
    store = Store(small_disk)
    sentence(store.build_once, PLAN, compile_too_much)
    assert store.build_once(PLAN, compile_small) == store.find(PLAN)


def test_a_compiler_may_fail_on_a_disk_with_room(store):
    with pytest.raises(RuntimeError, match="no memory"):
        store.build_once(PLAN, lambda folder: (_ for _ in ()).throw(RuntimeError("no memory")))


@pytest.fixture
def read_only(small_disk: Path) -> Store:
    """A store with one engine that nobody can write to."""
    store = Store(small_disk / "store")
    store.build_once(PLAN, compile_small)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return store


def test_engines_are_found_in_a_read_only_store(read_only):
    assert Store(read_only.root).build_once(PLAN, never) == read_only.folder_of(PLAN)


def test_a_read_only_store_takes_no_engine(read_only):
    message = sentence(read_only.build_once, OTHER_PLAN, never)
    assert message.startswith(f"the engine store {read_only.root} is on a read-only file system; choose another")


def test_a_store_cannot_be_made_on_a_read_only_disk(read_only):
    assert "is on a read-only file system" in sentence(Store, read_only.root.parent / "another")


@pytest.fixture
def nobody(store: Store, tmp_path: Path) -> Iterator[int]:
    """A user who may read everything and write nothing."""
    folders = [store.root, *store.root.rglob("*/"), tmp_path]
    before = {folder: folder.stat().st_mode for folder in folders}
    for parent in tmp_path.parents:
        if parent.owner() == store.root.owner() and not parent.stat().st_mode & 0o001 and os.geteuid() == 0:
            before[parent] = parent.stat().st_mode
    for folder in before:
        folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield os.geteuid()
    finally:
        os.seteuid(user)
        for folder, mode in before.items():
            folder.chmod(mode & 0o7777)


def test_a_store_that_this_user_may_not_write_is_one_sentence(store, stored, nobody):
    message = sentence(store.build_once, OTHER_PLAN, never)
    assert message.startswith(f"the engine store {store.root} may not be written by user {nobody} (no permission for ")


def test_engines_are_found_by_users_who_may_not_write(store, stored, nobody):
    assert Store(store.root).build_once(PLAN, never) == stored


def test_an_engine_that_this_user_may_not_read_is_not_built_again(store, stored):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    (stored / "engine.json").chmod(0)
    parents = [parent for parent in stored.parents if not parent.stat().st_mode & 0o001]
    for parent in parents:
        parent.chmod(parent.stat().st_mode | 0o001)
    os.seteuid(65534)
    try:
        assert "engine.json cannot be read: Permission denied" in sentence(store.build_once, PLAN, never)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_store_in_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    assert sentence(Store, tmp_path / name).startswith(f"the engine store {tmp_path / name} is not a folder; choose")


def test_a_file_system_without_locks_is_refused(store, monkeypatch):
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert "is on a file system without fcntl locks" in sentence(store.build_once, PLAN, never)
