"""Containers of the images, as a platform runs them: an engine is built, served, loaded and stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from containers import ROOT, ServerContainer, docker, make_image

VOLUME = "/var/lib/triton-trtllm"
CHECKPOINT = ROOT / "scripts/demo_checkpoint/demo-gpt2"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def baked(image: Callable[[str], str], volume: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server-cpu image with the demo model's repository in it."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "LICENSE", ".dockerignore", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    for name in ("containerfiles", "scripts", "model_repo", "build", "clients"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True)
    (checkout / "out/image").mkdir(parents=True)
    carrier = docker("create", "--volume", f"{volume}:{VOLUME}", image("builder")).strip()
    try:
        docker("cp", f"{carrier}:{VOLUME}/demo-gpt2", str(checkout / "out/image"))
    finally:
        docker("rm", carrier)
    yield make_image("server-cpu", checkout, "--build-arg REPOSITORIES=out/image", tag="baked")
    docker("image", "rm", "triton-trtllm/server-cpu:baked")


def test_a_baked_image_answers_on_a_read_only_root(start_container, baked: str):
    server = ServerContainer(start_container, baked, "/models/demo-gpt2")
    server.wait_until_ready()
    assert server.generate("demo-gpt2", text_input=PROMPT, max_tokens=8)["text_output"] == " Paris."
    command = server.container.execute("cat", "/proc/1/cmdline").split("\0")
    assert command[1] == "/opt/triton-trtllm/scripts/serve.py"  # no shell is process 1


def test_docker_stop_lets_a_stream_finish_and_the_container_ends_with_0(start_container, baked: str):
    server = ServerContainer(start_container, baked, "/models/demo-gpt2")
    server.wait_until_ready()
    body = {"text_input": PROMPT, "max_tokens": 1000, "end_id": -1, "stream": True}
    with ThreadPoolExecutor(1) as thread, server.open("/v2/models/demo-gpt2/generate_stream", body) as stream:
        events = [stream.readline()]
        exit_code = thread.submit(server.container.stop)
        while "serve: ending" not in server.container.log():
            time.sleep(0.05)
        signalled = time.monotonic()
        events += stream.readlines()
        seconds_after_the_signal = time.monotonic() - signalled
    last = json.loads([event for event in events if event.startswith(b"data:")][-1].removeprefix(b"data:"))
    assert last["finish_reason"] == "length"
    assert exit_code.result() == 0
    assert seconds_after_the_signal > 0.2, "the stream was over before the signal came, so the test shows nothing"


def test_what_the_builder_left_in_a_volume_is_served_read_only(start_container, image, volume: str):
    options = ["--volume", f"{volume}:{VOLUME}:ro"]
    server = ServerContainer(start_container, image("server-cpu"), f"{VOLUME}/demo-gpt2", options=options)
    server.wait_until_ready()
    assert server.generate("demo-gpt2", text_input=PROMPT, max_tokens=8)["text_output"] == " Paris."
    result = docker(
        *("run", "--rm", "--network", "host", "--read-only", image("client"), "--url", f"127.0.0.1:{server.grpc_port}"),
        *("--concurrency", "4", "--requests", "20"),
    )
    assert "20 sent, 20 ok, 0 failed" in result


def test_store_and_repository_of_one_volume_share_the_engine_s_files(image, volume: str):
    """One copy on disk, which belongs to the builder's user."""
    find = ["--entrypoint", "find", image("builder"), VOLUME, "-name", "openvino_model.bin", "-printf", "%i %U %G\n"]
    found = docker("run", "--rm", "--volume", f"{volume}:{VOLUME}", *find).splitlines()
    assert len(found) == 2
    assert found[0] == found[1]
    assert found[0].endswith(" 1000 1000")


def test_too_little_shared_memory_is_one_sentence(start_container, image, volume: str):
    options = ["--volume", f"{volume}:{VOLUME}:ro", "--shm-size", "8m"]
    server = ServerContainer(start_container, image("server-cpu"), f"{VOLUME}/demo-gpt2", options=options)
    assert server.container.wait() == 2
    assert server.container.log() == (
        f"serve: /dev/shm has 8.0 MiB free, and the 4 models of {VOLUME}/demo-gpt2 need 16 MiB there; "
        "give the container more: docker run --shm-size 64m, or in Kubernetes an emptyDir of medium Memory, "
        "mounted at /dev/shm\n"
    )


def test_a_container_without_a_model_says_what_is_missing(start_container, image):
    container = start_container(image("server-cpu"), "/models/demo-gpt2")
    assert container.wait() == 2
    assert "/models/demo-gpt2 is not a folder; build a repository" in container.log()


def test_the_image_for_gpus_builds_and_serves_beside_nvidia_s_tritonserver(image, empty_volume: str, start_container):
    """On a base image that stands in for NVIDIA's; the engine needs no GPU and no library."""
    docker(
        *("run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", "--entrypoint", "python3"),
        *(
            "--volume",
            f"{empty_volume}:{VOLUME}",
            "--volume",
            f"{CHECKPOINT}:/checkpoint/demo-gpt2:ro",
            image("server"),
        ),
        *("build/engines.py", "--model", "/checkpoint/demo-gpt2", "--served-name", "demo", "--engine", "synthetic"),
        *("--synthetic", "tokens_per_second=200", "--cache-dir", f"{VOLUME}/store", "--output", f"{VOLUME}/demo"),
    )
    options = ["--volume", f"{empty_volume}:{VOLUME}:ro"]
    server = ServerContainer(start_container, image("server"), f"{VOLUME}/demo", "--benchmark", options=options)
    server.wait_until_ready()
    assert server.generate("demo", text_input=PROMPT, max_tokens=8)["num_output_tokens"] == 8
    processes = server.container.execute("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'").splitlines()
    assert "/opt/tritonserver/bin/tritonserver" in processes
    assert server.container.stop() == 0


def test_the_image_for_gpus_keeps_what_its_base_image_has_and_adds_what_it_lacks(image):
    ask = "from importlib.metadata import version; print(version('jinja2'), version('psutil'))"
    versions = docker("run", "--rm", "--entrypoint", "python3", image("server"), "-c", ask).split()
    assert versions == ["3.1.5", "7.2.2"]  # the base image's own; constraints.txt's


def test_another_tensorrt_llm_than_the_expected_one_is_refused(image):
    image("server")
    with pytest.raises(AssertionError, match=r"the base image has TensorRT-LLM 1\.2\.1, not 9\.9; use another BASE"):
        make_image("server", ROOT, "--force-rm --build-arg TENSORRT_LLM=9.9", tag="refused")


def test_packages_that_would_replace_the_base_image_s_are_refused(image, tmp_path: Path):
    """Here transformers is missing, and wants a newer tokenizers than is there."""
    image("server")
    file = tmp_path / "Containerfile"
    file.write_text(
        "FROM triton-trtllm/nvidia-base:test\n"
        "RUN pip uninstall --quiet --yes transformers && pip install --quiet --no-cache-dir tokenizers==0.20.3\n"
    )
    docker("build", "--network", "host", "--tag", "triton-trtllm/nvidia-base:older", "--file", str(file), str(tmp_path))
    try:
        with pytest.raises(AssertionError, match="would replace tokenizers of the base image; use the base image"):
            make_image("server", ROOT, "--force-rm --build-arg BASE=triton-trtllm/nvidia-base:older", tag="refused")
    finally:
        docker("image", "rm", "triton-trtllm/nvidia-base:older")
