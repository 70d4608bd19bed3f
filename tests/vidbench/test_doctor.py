"""What the doctor finds on machines that are made up of files, and in noise whose size is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vidbench import doctor
from vidbench.cli import app
from vidbench.doctor import Finding, Load
from vidbench.gate import SIDES
from vidbench.noise import Noise, noise_of, robust_deviation, tells
from vidbench.nvml import Settings
from vidbench.records import DeviceState

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


@pytest.mark.parametrize(("used", "level"), [(0.02, None), (0.3, "fair"), (1.2, "poor")])
def test_others_at_work_are_named(used: float, level: str | None) -> None:
    found = list(doctor.others(Load(used, ("make (120%)",) if used > 1 else ())))
    assert [one.level for one in found] == ([level] if level else [])
    if used > 1:
        assert "others use 1.2 processors: make (120%)" in found[0].found


def test_little_memory_and_a_containers_limit(tmp_path: Path) -> None:
    limited = machine(tmp_path, {"sys/fs/cgroup/memory.max": str(2**30), "sys/fs/cgroup/memory.current": str(2**29)})
    (found,) = doctor.memory(limited, available=2**40)
    assert found.level == "fair"
    assert found.found.startswith("0.5 of 1.0 GiB free")
    (found,) = doctor.memory(tmp_path / "elsewhere", available=64 * 2**30)
    assert found.level == "good"


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
    found = noise_of(sides(process=0.01, shared=0.05), "cpu", 0.5, 10.0)
    assert found.sample == pytest.approx(0.001, rel=0.3)
    assert found.process == pytest.approx(math.hypot(0.01, 0.05), rel=0.2)
    # A change is a process less the mean of two: √1.5 of one's deviation, and nothing of what all share.
    assert found.turn == pytest.approx(0.01 * math.sqrt(1.5), rel=0.2)
    assert found.steal == pytest.approx(0.05)


def test_a_robust_deviation_is_that_of_a_normal_distribution_whatever_lies_far_off() -> None:
    values = list(np.random.default_rng(1).normal(3.0, 0.2, 2001)) + [1e9] * 20
    assert robust_deviation(values) == pytest.approx(0.2, rel=0.1)


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
