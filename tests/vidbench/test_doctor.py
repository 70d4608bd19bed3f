"""What the doctor finds on machines that are made up of files, and in noise whose size is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from vidbench import doctor
from vidbench.cli import app
from vidbench.compare import FALSE_DISCOVERY_RATE
from vidbench.doctor import Finding, Load
from vidbench.gate import LOOKS, SIDES
from vidbench.measure import steal_since
from vidbench.noise import Noise, noise_of, robust_deviation, tells
from vidbench.nvml import Settings
from vidbench.records import DeviceState
from vidbench.significance import Effect
from vidbench.sweep import RequestError

PLAIN = {"proc/cpuinfo": "processor : 0\nmodel name\t: Xeon 9000\nflags\t\t: fpu avx512f\n"}


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def by_name(found: Iterable[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in found}


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def test_a_machine_as_it_should_be_is_a_plain_fact(tmp_path: Path) -> None:
    found = by_name(doctor.processor(machine(tmp_path, PLAIN), threads=4))
    assert set(found) == {"processor"}
    assert found["processor"].found.startswith("Xeon 9000: 4 of ")
    assert (found["processor"].level, found["processor"].remedy) == ("good", "")


@pytest.mark.parametrize(
    ("files", "threads", "name", "level", "found", "remedy"),
    [
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 4, "container", "poor", "2.5 of 4", "OMP_NUM_THREADS=2"),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1, "container", "poor", "0.5 of 4", "start the container"),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            4, "container", "poor", "1 of 4", "OMP_NUM_THREADS=1",
        ),
        ({}, 9, "threads", "poor", "9 threads on 4", "OMP_NUM_THREADS=4"),
        ({"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave"}, 4, "governor", "fair", "powersave",
         "several rounds"),
        ({"sys/devices/system/cpu/intel_pstate/no_turbo": "0"}, 4, "turbo", "fair", "on", "no_turbo"),
        ({"sys/devices/system/cpu/cpufreq/boost": "1"}, 4, "turbo", "fair", "on", "cpufreq/boost"),
        ({"proc/cpuinfo": "flags\t: fpu hypervisor\n"}, 4, "virtual machine", "fair", "host", "vidbench gate"),
        ({"sys/devices/system/node/node0/x": "", "sys/devices/system/node/node1/x": ""}, 4, "NUMA", "fair", "2 nodes",
         "numactl"),
    ],
)  # fmt: skip
def test_what_speaks_against_a_machine_is_told_with_a_remedy(
    tmp_path: Path, files: dict[str, str], threads: int, name: str, level: str, found: str, remedy: str
) -> None:
    said = by_name(doctor.processor(machine(tmp_path, {**PLAIN, **files}), threads=threads))
    assert set(said) == {"processor", name}
    assert said[name].level == level
    assert found in said[name].found
    assert remedy in said[name].remedy


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/cpu.max": "max 100000"},
        {"sys/fs/cgroup/cpu.max": "800000 100000"},
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance"},
        {"sys/devices/system/cpu/intel_pstate/no_turbo": "1"},
        {"sys/devices/system/node/node0/x": ""},
    ],
)
def test_what_does_no_harm_is_not_told(tmp_path: Path, files: dict[str, str]) -> None:
    assert set(by_name(doctor.processor(machine(tmp_path, {**PLAIN, **files}), threads=4))) == {"processor"}


def test_a_containers_limit_is_no_harm_once_its_remedy_is_taken(tmp_path: Path) -> None:
    limited = machine(tmp_path, {**PLAIN, "sys/fs/cgroup/cpu.max": "250000 100000"})
    assert set(by_name(doctor.processor(limited, threads=2))) == {"processor"}


@pytest.mark.parametrize("value", ["0", "1"])
def test_nvidias_override_is_told_whatever_it_says(value: str) -> None:
    assert by_name(doctor.software({"NVIDIA_TF32_OVERRIDE": value}))["NVIDIA_TF32_OVERRIDE"].level == "poor"
    assert "NVIDIA_TF32_OVERRIDE" not in by_name(doctor.software({"NVIDIA_TF32_OVERRIDE": ""}))


def test_a_variable_that_changes_what_is_measured_is_poor() -> None:
    found = by_name(doctor.software({"TRITON_INTERPRET": "1", "CUDA_LAUNCH_BLOCKING": "0"}))
    assert found["TRITON_INTERPRET"].level == "poor"
    assert found["TRITON_INTERPRET"].remedy == "unset TRITON_INTERPRET"
    assert "CUDA_LAUNCH_BLOCKING" not in found
    assert "torch" in found["versions"].found


def test_missing_parts_are_named_with_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_importable", lambda module: module not in ("av", "ray"))
    found = by_name(doctor.software({}))["optional parts"]
    assert found.found == "not installed: video (video files); ray (sweeps on a cluster)"
    assert found.remedy.startswith('pip install "vidbench[video,ray]"')


@pytest.mark.parametrize(
    ("used", "threads", "level"),
    [
        (0.02, 4, None), (0.3, 4, "fair"), (1.2, 4, "poor"),
        (0.9, 3, None), (1.2, 3, "fair"), (1.6, 3, "poor"),  # one of four is theirs
        (1.4, 1, "fair"), (0.5, 1, None),  # there is room, but they take the memory's bandwidth
    ],
)  # fmt: skip
def test_others_at_work_are_named_where_it_is_felt(used: float, threads: int, level: str | None) -> None:
    found = list(doctor.others(Load(used, ("make (120%)",) if used > 1 else ()), threads))
    assert [one.level for one in found] == ([level] if level else [])
    if used > 1:
        assert f"others use {used:.1f} of 4 processors: make (120%)" in found[0].found


def test_only_the_processors_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    percents = [10.0, 20.0, 0.0, 0.0, 100.0, 100.0]
    monkeypatch.setattr(doctor.psutil, "cpu_percent", lambda interval, percpu: percents)
    assert doctor.load(0.0).processors == pytest.approx(0.3)


def test_little_memory_and_a_containers_limit(tmp_path: Path) -> None:
    limited = machine(tmp_path, {"sys/fs/cgroup/memory.max": str(2**30), "sys/fs/cgroup/memory.current": str(2**29)})
    (found,) = doctor.memory(limited, available=2**40)
    assert found.level == "fair"
    assert found.found.startswith("0.5 of 1.0 GiB free")
    (found,) = doctor.memory(tmp_path / "elsewhere", available=64 * 2**30)
    assert found.level == "good"


def test_files_that_the_kernel_would_let_go_are_free_memory(tmp_path: Path) -> None:
    limit, used, stat = str(2**30), str(2**30), f"active_file 1\ninactive_file {2**29}\ntotal_inactive_file {2**28}\n"
    names = ("memory.max", "memory.current", "memory.stat")
    v2 = machine(
        tmp_path / "v2", dict(zip((f"sys/fs/cgroup/{name}" for name in names), (limit, used, stat), strict=True))
    )
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    files = dict(zip((f"sys/fs/cgroup/memory/{name}" for name in names), (limit, used, stat), strict=True))
    v1 = machine(tmp_path / "v1", files)
    for root, free in ((v2, "0.5"), (v1, "0.2")):
        (found,) = doctor.memory(root, available=2**40)
        assert found.found.startswith(f"{free} of 1.0 GiB free")


def test_a_gpu_that_is_held_back_hot_shared_or_a_slice() -> None:
    state = DeviceState(3, clock_limits={"hw_thermal": 2, "sw_power_cap": 3}, temperature_c=91.0, other_processes=2)
    found = by_name(doctor.gpu_state(state))
    assert {name: one.level for name, one in found.items()} == {
        "throttling": "poor", "temperature": "fair", "others": "fair",
    }  # fmt: skip
    assert "2 other processes" in found["others"].found
    assert not list(doctor.gpu_state(DeviceState(3, temperature_c=40.0, other_processes=0)))
    settings = by_name(doctor.gpu_settings(Settings(300.0, 700.0, persistent=False, sliced=True)))
    assert "300 W instead of 700 W" in settings["power limit"].found
    assert settings["MIG"].level == "fair"
    assert settings["persistence"].remedy.endswith("nvidia-smi -pm 1")
    assert not list(doctor.gpu_settings(Settings(700.0, 700.0, persistent=True)))
    assert not list(doctor.gpu_settings(Settings()))


def test_what_holds_a_clock_down_has_a_remedy_of_its_own() -> None:
    hot, power = (
        next(doctor.gpu_state(DeviceState(1, clock_limits={limit: 1}))) for limit in ("hw_thermal", "hw_power_brake")
    )
    assert hot.remedy.startswith("let it cool")
    assert "power supply" in power.remedy
    assert "cool," not in power.remedy


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU, and what was asked of it, in order."""
    asked: list[str] = []
    properties = SimpleNamespace(name="H9", total_memory=2**36, major=9, minor=0)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(doctor.torch, "empty", lambda *_, device: asked.append("context"))
    monkeypatch.setattr(doctor, "watch", lambda _: asked.append("NVML"))
    return asked


@pytest.mark.parametrize(
    ("there", "said"), [(True, "NVML does not start, or does not know this GPU"), (False, "no nvidia-ml-py")]
)
def test_a_gpu_has_a_context_before_nvml_is_asked_and_its_silence_a_reason(
    a_gpu: list[str], monkeypatch: pytest.MonkeyPatch, there: bool, said: str
) -> None:
    monkeypatch.setattr(doctor, "_importable", lambda _: there)
    assert by_name(doctor.gpu())["state"].found.endswith(said)
    assert a_gpu == ["context", "NVML"]


def test_a_gpu_that_cannot_be_used_is_a_finding(a_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, device: str) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might")

    monkeypatch.setattr(doctor.torch, "empty", busy)
    (found,) = doctor.gpu()
    assert (found.level, found.found) == (
        "poor", "torch cannot use it: CUDA error: all CUDA-capable devices are busy or unavailable",
    )  # fmt: skip


def test_noise_that_cannot_be_measured_loses_no_other_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> Noise:
        raise RequestError("device 'cuda' is not there")

    monkeypatch.setattr(doctor, "noise", refuse)
    *others, last = doctor.examine("cuda")
    assert {"software", "processor"} <= {one.topic for one in others}
    assert (last.topic, last.level) == ("noise", "poor")
    assert "device 'cuda' is not there" in last.found


def sides(process: float, shared: float, rounds: int = 200) -> dict[tuple[str, str], list[list[float]]]:
    """Logarithms of samples with a known deviation of processes, and of what all sides of a round share."""
    rng = np.random.default_rng(0)
    together = shared * rng.standard_normal(rounds)
    return {
        ("point", side): [
            list(moment + process * rng.standard_normal() + 0.001 * rng.standard_normal(15)) for moment in together
        ]
        for side in SIDES
    }


def test_noise_between_processes_is_told_from_what_they_share() -> None:
    found = noise_of(sides(process=0.01, shared=0.05), "cpu", 0.05)
    assert found.sample == pytest.approx(0.001, rel=0.3)
    assert found.process == pytest.approx(math.hypot(0.01, 0.05), rel=0.2)
    # A change is a process less the mean of two: √1.5 of one's deviation, and nothing of what all share.
    assert found.turn == pytest.approx(0.01 * math.sqrt(1.5), rel=0.2)
    assert found.steal == pytest.approx(0.05)


class Times(NamedTuple):
    """As psutil has them."""

    user: float
    steal: float


def test_what_the_hypervisor_took_is_a_share_of_all_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidbench.measure.psutil.cpu_times", lambda: Times(19.5, 1.5))
    assert steal_since(Times(10.0, 1.0)) == pytest.approx(0.05)
    assert steal_since(Times(10.0, 2.0)) == 0.0, "a counter that went back"
    assert steal_since(Times(19.5, 1.5)) == 0.0, "no time passed"


def test_a_robust_deviation_is_that_of_a_normal_distribution_whatever_lies_far_off() -> None:
    values = list(np.random.default_rng(1).normal(3.0, 0.2, 2001)) + [1e9] * 20
    assert robust_deviation(values) == pytest.approx(0.2, rel=0.1)


def test_a_change_that_is_told_is_found_nine_times_in_ten() -> None:
    quiet, rounds, points = Noise("cpu", 0.001, 0.01, 0.01, 0.0, 6), 20, 10
    told = math.log1p(tells(quiet, rounds, points))
    rng = np.random.default_rng(0)
    level = FALSE_DISCOVERY_RATE / len(LOOKS) / points
    found = 0
    for _ in range(2000):
        changes = rng.normal(told, quiet.turn, rounds)
        error = float(np.std(changes, ddof=1)) / math.sqrt(rounds)
        found += Effect(float(np.mean(changes)), error, rounds - 1).p < level
    assert found / 2000 == pytest.approx(0.9, abs=0.04)


def test_more_rounds_tell_smaller_changes_and_noise_is_judged() -> None:
    quiet, loud = (Noise("cpu", 0.001, process, process, 0.0, 6) for process in (0.005, 0.2))
    assert tells(quiet, 20) < tells(quiet, 12) < tells(loud, 12)
    assert by_name(doctor.of_noise(quiet))["same code twice"].level == "good"
    assert by_name(doctor.of_noise(loud))["same code twice"].level == "poor"
    stolen = Noise("cpu", 0.001, 0.005, 0.005, 0.07, 6)
    assert "7%" in by_name(doctor.of_noise(stolen))["steal"].found


def test_the_command_tells_the_same_in_text_and_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        Finding("software", "versions", "good", "torch 2"),
        Finding("processor", "turbo", "fair", "on", "several rounds"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda device, noisy: said)
    text = CliRunner().invoke(app, ["doctor", "--no-noise"])
    assert text.exit_code == 0
    assert "✓ versions: torch 2" in text.stdout
    assert "! turbo: on\n      → several rounds" in text.stdout
    assert text.stdout.rstrip().endswith("1 fair: see the arrows")
    found = json.loads(CliRunner().invoke(app, ["doctor", "--no-noise", "--format", "json"]).stdout)
    assert [(one["name"], one["level"]) for one in found] == [("versions", "good"), ("turbo", "fair")]


def test_this_machine_is_examined() -> None:
    found = doctor.examine("cpu", noisy=False)
    assert {"software", "processor", "memory", "GPU"} <= {one.topic for one in found}
    assert all(one.found for one in found)
    assert all(one.remedy for one in found if one.level == "poor")
