"""What nvidia-smi says, in the words of fake ones: shell scripts that are first on PATH."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import gpus
import pytest
from gpus import Gpu, find_gpus, pin_environment

FakeNvidiaSmi = Callable[[str], None]
FOUR_NAMES = ("aa11", "aa22", "bb33", "bb44")  # UUIDs, shortened


@pytest.fixture
def fake_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvidiaSmi:
    """Puts a fake nvidia-smi, a shell script of the given lines, on a PATH without the real one."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def fake(script: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return fake


def test_each_gpu_is_named_as_its_node_label(fake_nvidia_smi: FakeNvidiaSmi):
    fake_nvidia_smi("echo '0, GPU-11, NVIDIA H100 80GB HBM3, 9.0, 81559'; echo '1, GPU-22, NVIDIA L4, 8.9, 23034'")
    assert find_gpus() == [
        Gpu(index=0, product="NVIDIA-H100-80GB-HBM3", compute_capability="9.0", memory_mib=81559),
        Gpu(index=1, product="NVIDIA-L4", compute_capability="8.9", memory_mib=23034),
    ]


def test_a_gpu_that_shares_the_machines_memory_has_no_size(fake_nvidia_smi: FakeNvidiaSmi):
    fake_nvidia_smi("echo '0, GPU-11, NVIDIA GB10, 12.1, [N/A]'")
    assert find_gpus() == [Gpu(index=0, product="NVIDIA-GB10", compute_capability="12.1", memory_mib=None)]


def test_it_is_asked_for_five_values_without_header_and_units(fake_nvidia_smi: FakeNvidiaSmi, tmp_path: Path):
    fake_nvidia_smi(f"echo $* > {tmp_path}/arguments")
    find_gpus()
    asked = (tmp_path / "arguments").read_text().split()
    assert asked == ["--query-gpu=index,uuid,name,compute_cap,memory.total", "--format=csv,noheader,nounits"]


def test_no_nvidia_smi_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == []
    assert not caplog.messages


@pytest.mark.parametrize("script", ["echo 'No devices were found'", ""])
def test_a_driver_without_gpus_is_no_gpu(fake_nvidia_smi: FakeNvidiaSmi, script: str):
    fake_nvidia_smi(script)
    assert find_gpus() == []


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            "echo 'Failed to initialize NVML'; echo 'Driver/library version mismatch'; exit 18",
            "nvidia-smi ends with 18 and says: Failed to initialize NVML Driver/library version mismatch; "
            "going on as if there were no GPU",
        ),
        ("echo broken >&2; exit 9", "nvidia-smi ends with 9 and says: broken; going on as if there were no GPU"),
        ("exit 1", "nvidia-smi ends with 1 and says: nothing; going on as if there were no GPU"),
    ],
)
def test_a_driver_that_fails_is_no_gpu_and_is_said(
    fake_nvidia_smi: FakeNvidiaSmi, caplog: pytest.LogCaptureFixture, script: str, sentence: str
):
    fake_nvidia_smi(script)
    assert find_gpus() == []
    assert caplog.messages == [sentence]


def test_a_program_that_cannot_be_run_is_no_gpu(
    fake_nvidia_smi: FakeNvidiaSmi, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fake_nvidia_smi("")
    (tmp_path / "nvidia-smi").write_text("not a program")
    assert find_gpus() == []
    assert "nvidia-smi cannot be run (Exec format error)" in caplog.text


def test_a_driver_that_hangs_is_no_gpu_after_a_while(
    fake_nvidia_smi: FakeNvidiaSmi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(gpus, "ANSWER_SECONDS", 0.2)
    fake_nvidia_smi("exec sleep 60")
    started = time.monotonic()
    assert find_gpus() == []
    assert time.monotonic() - started < 10
    assert "nvidia-smi does not answer within 0.2 s" in caplog.text


FOUR_GPUS = "; ".join(f"echo '{index}, GPU-{name}, NVIDIA L4, 8.9, 23034'" for index, name in enumerate(FOUR_NAMES))


@pytest.mark.parametrize(
    ("names", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 0 , 2 ", [0, 2]),
        ("GPU-aa22", [1]),
        ("GPU-bb33,GPU-bb44", [2, 3]),
        ("GPU-bb3", [2]),
        ("GPU-aa22,0", [1, 0]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,2", [0]),
        ("0,1,7,2", [0, 1]),
        ("0,,2", [0]),
        ("1,GPU-cc,2", [1]),
        ("0,GPU-bb,1", [0]),  # two begin like that
        ("MIG-aa11,0", []),
        ("0,1,0", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    fake_nvidia_smi: FakeNvidiaSmi, monkeypatch: pytest.MonkeyPatch, names: str | None, indices: list[int]
):
    fake_nvidia_smi(FOUR_GPUS)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert [gpu.index for gpu in find_gpus()] == indices


def test_a_process_is_pinned_by_the_order_that_nvidia_smi_counts_in(
    fake_nvidia_smi: FakeNvidiaSmi, monkeypatch: pytest.MonkeyPatch
):
    fake_nvidia_smi(FOUR_GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert pin_environment(find_gpus()) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3,1"}
