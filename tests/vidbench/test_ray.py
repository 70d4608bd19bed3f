"""Sweeps in a Ray cluster: each kind of machine has its run, in which every point is once, whatever dies meanwhile.

The rules are tried on a cluster of straw, whose nodes die and join at random; a real one, on this machine, shows that
Ray behaves as the straw does.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from vidbench.engine import MachineKind, Progress, Terms, runs
from vidbench.records import Environment, Measurement
from vidbench.results import load
from vidbench.sweep import Point, RequestError

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

from ray.cluster_utils import Cluster  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402

from vidbench.engine import ray as engine  # noqa: E402

VIDBENCH = [sys.executable, "-m", "vidbench.cli"]
TERMS = Terms("cpu", ("fp32",), {}, timeout_s=60, seconds=0.02)


def point(case: int, implementation: str = "library") -> Point:
    return Point("conv3d", "op", implementation, case={"clip_length": case})


TURNS = [
    (point(case, implementation), number)
    for number in (1, 2)
    for case in range(6)
    for implementation in ("reference", "library", "compiled")
]


class StrawCluster:
    """Stands for the module `ray`: deputies die at random, nodes die and join."""

    def __init__(self, seed: int, machines: tuple[str, ...], deaths: float = 0.0, deadly: Point | None = None) -> None:
        self.random, self.deaths, self.deadly = random.Random(seed), deaths, deadly
        self.alive: dict[str, str] = {}
        for machine in machines:
            self.join(machine)
        self.at_work: dict[Any, tuple[Any, ...]] = {}
        self.killed: set[Any] = set()
        self.losses: Counter[tuple[str, int]] = Counter()

    def join(self, machine: str) -> None:
        self.alive[f"{self.random.randrange(16**56):056x}"] = machine

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": node, "Alive": True, "NodeManagerHostname": f"host{node}", "Resources": {"CPU": 4.0}}
            for node in self.alive
        ]

    def remote(self, kind: type) -> Any:
        assert kind is engine.Deputy
        cluster = self

        class Method:
            def __init__(self, deputy: Any) -> None:
                self.deputy = deputy

            def remote(self, *arguments: Any) -> object:
                assert self.deputy not in {work[0] for work in cluster.at_work.values()}, "one turn at a time"
                answer = object()
                cluster.at_work[answer] = (self.deputy, *arguments)
                return answer

        class Straw:
            def options(self, *, num_cpus: float, num_gpus: float, scheduling_strategy: Any) -> Any:
                assert (num_cpus, num_gpus) == (4.0, 0), "the whole node"
                self.node = scheduling_strategy.node_id
                return self

            def remote(self, *_: Any) -> Any:
                self.describe = self.take = Method(self)
                return self

        return Straw()

    def wait(self, answers: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        one = self.random.choice(answers)
        return [one], [other for other in answers if other is not one]

    def get(self, answer: object) -> Any:
        deputy, *arguments = self.at_work.pop(answer)
        assert deputy not in self.killed
        describing = len(arguments) == 1
        dies = not describing and (self.random.random() < self.deaths or arguments[0] == self.deadly)
        if not describing and dies:
            self.losses[(arguments[0].key, arguments[1])] += 1
        if dies and self.random.random() < 0.5 and deputy.node in self.alive:  # its node as well; another one joins
            self.join(self.alive.pop(deputy.node))
        if dies:
            raise RayActorError
        if describing:
            return MachineKind(Environment(self.alive[deputy.node], torch="2.13"), {"conv3d": ("library",)})
        return Measurement(*arguments, "ok")

    def kill(self, deputy: Any) -> None:
        self.killed.add(deputy)

    def is_initialized(self) -> bool:
        return True


def carried_out(
    cluster: StrawCluster, monkeypatch: pytest.MonkeyPatch, todo: list[Any]
) -> tuple[list[MachineKind], list[Any], list[str]]:
    """The kinds, the steps and what was told."""
    monkeypatch.setattr(engine, "ray", cluster)
    monkeypatch.setattr(engine, "LOOK_S", 0.0)
    monkeypatch.setattr(engine, "PATIENCE_S", 0.2)
    told: list[str] = []
    with engine.RayEngine(TERMS, told.append) as crew:
        kinds = crew.kinds()
        return kinds, list(crew.carry_out(todo[: len(kinds)])), told


@pytest.mark.parametrize("seed", range(20))
def test_whatever_dies_every_turn_is_done_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = StrawCluster(seed, ("A", "B", "A", "A"), deaths=0.2)
    kinds, steps, _ = carried_out(cluster, monkeypatch, [TURNS, TURNS])
    assert [kind.environment.machine for kind in kinds] in (["A", "B"], ["B", "A"])
    done = Counter((step.kind, step.point.key, step.round) for step in steps if step.measurement)
    assert done == {(kind, turn.key, number): 1 for kind in (0, 1) for turn, number in TURNS}
    for step in steps:
        if step.measurement is not None and step.measurement.status == "crashed":
            assert cluster.losses[step.point.key, step.round] >= 3
            assert "was lost 3 times" in step.measurement.reason
    assert sum(cluster.losses.values()) > 5


def test_a_point_that_always_kills_is_given_up_after_three_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = point(2, "library")
    cluster = StrawCluster(0, ("A", "A"), deadly=deadly)
    _, steps, told = carried_out(cluster, monkeypatch, [TURNS])
    statuses = {(s.point.key, s.round): s.measurement.status for s in steps if s.measurement}
    assert {key for key, status in statuses.items() if status == "crashed"} == {(deadly.key, 1), (deadly.key, 2)}
    assert len(statuses) == len(TURNS)
    assert cluster.losses == {(deadly.key, 1): 3, (deadly.key, 2): 3}
    assert sum("was lost" in line for line in told) == 6


def test_what_is_compared_is_measured_on_one_node_and_all_nodes_have_work(monkeypatch: pytest.MonkeyPatch) -> None:
    _, steps, _ = carried_out(StrawCluster(1, ("A", "A", "A")), monkeypatch, [TURNS])
    nodes = defaultdict(set)
    for step in steps:
        nodes[step.round, step.point.case["clip_length"]].add(step.node)
    assert {len(where) for where in nodes.values()} == {1}
    assert len(set.union(*nodes.values())) == 3


def test_a_sweep_without_a_node_left_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = StrawCluster(0, ("A",), deadly=point(0))
    cluster.join = lambda machine: None  # type: ignore[method-assign]
    with pytest.raises(RequestError, match=r"no A is left in the cluster: add one, and --resume"):
        carried_out(cluster, monkeypatch, [TURNS])


def test_each_kind_of_machine_measures_the_whole_sweep_into_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "ray", StrawCluster(3, ("GPU X", "CPU (y) × 2", "GPU X")))
    monkeypatch.setattr(engine, "LOOK_S", 0.0)
    axes = {"clip_length": (2, 4), "batch_size": (1,), "implementation": ("library",), "in_channels": (3,)}
    seen: list[Progress] = []
    wanted: dict[str, Any] = {"engine": "ray", "axes": axes, "out": tmp_path, "progress": seen.append}
    done = runs("conv3d", rounds=2, **wanted)
    assert {run.folder: run.environment.machine for run in done} == {
        tmp_path / "gpu-x": "GPU X",
        tmp_path / "cpu-y-2": "CPU (y) × 2",
    }
    first, second = ({(m.point.key, m.round) for m in run.measurements} for run in done)
    assert first == second
    assert {number for _, number in first} == {1, 2}
    assert seen[-1].done == seen[-1].total == 2 * len(first)
    seen.clear()
    again = runs("conv3d", rounds=3, resume=True, **wanted)
    assert {one.round for one in seen} == {3}
    assert {len(run.measurements) for run in again} == {len(first) // 2 * 3}


def test_nodes_of_a_kind_agree_or_the_odd_ones_are_refused_by_name() -> None:
    usual = MachineKind(Environment("A × 2", torch="2.13", git_commit="abc"), {})
    odd = MachineKind(replace(usual.environment, torch="2.12", git_commit="def"), {})
    other = MachineKind(Environment("B", torch="2.12"), {})
    kinds = engine.kinds_of([odd, usual, other, usual])
    assert [(kind.environment.torch, kind.folder) for kind in kinds] == [("2.13", "a-2"), ("2.12", "b")]
    assert engine.kind_among(kinds, usual.environment) == 0
    assert engine.kind_among(kinds, other.environment) == 1
    said = str(engine.kind_among(kinds, odd.environment))
    assert "torch is '2.12', not '2.13'" in said
    assert "git_commit is 'def', not 'abc'" in said
    assert "--resume" in str(engine.kind_among(kinds, Environment("C")))


def test_places_are_whole_nodes_or_single_gpus() -> None:
    def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeID": f"id-{name}", "Alive": alive, "NodeManagerHostname": name, "Resources": resources}

    nodes = [node("head"), node("big", CPU=64.0, GPU=2.0), node("small", CPU=8.0), node("gone", alive=False, CPU=8.0)]
    assert [place[1:] for place in engine.places(nodes, "cpu")] == [(0, "big", 64.0, 0), (0, "small", 8.0, 0)]
    assert [place[1:] for place in engine.places(nodes, "cuda")] == [(0, "big/0", 32.0, 1), (1, "big/1", 32.0, 1)]


# --- a real cluster ---------------------------------------------------------------------------------------------------

MODELS = '''
"""Models whose first run is awaited by a test."""

import os, signal, time
from pathlib import Path
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, clip):
        return self.head(clip.mean((2, 3, 4)))

class WaitsOnce(Tiny):
    """Its first run does not end."""

    def forward(self, clip):
        if not Path("waited").exists():
            Path("waited").touch()
            time.sleep(3600)
        return super().forward(clip)

class WaitsForSignal(Tiny):
    """Does not end before a file is there."""

    def forward(self, clip):
        Path("waits").touch()
        while not Path("go").exists():
            time.sleep(0.1)
        return super().forward(clip)

class KillsItsDeputy(Tiny):
    """Kills the process whose server's worker it is."""

    def forward(self, clip):
        stat = Path(f"/proc/{os.getppid()}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        time.sleep(3600)
'''


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes on this machine, and a head that takes no work."""
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
    try:
        for _ in range(2):
            made.add_node(**small)
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def workplace(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models lie, and nothing is installed."""
    (tmp_path / "cluster_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_a_node_that_dies_costs_nothing(cluster: Cluster, workplace: Path) -> None:
    seen: list[Progress] = []

    def kill_who_waits() -> None:
        while not (workplace / "waited").exists():
            time.sleep(0.02)
        begun = [one.node for one in seen if one.point.workload.endswith("WaitsOnce") and not one.measurement]
        (victim,) = (node for node in cluster.worker_nodes if node.node_id[:6] in {name[-6:] for name in begun[:1]})
        cluster.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill_who_waits, daemon=True)
    killer.start()
    told: list[str] = []
    done = runs(
        "models",
        engine="ray",
        models=["cluster_models:Tiny", "cluster_models:WaitsOnce"],
        axes={"clip_length": (1, 2, 3, 4, 5), "batch_size": (1, 2), "input_size": (8,)},
        rounds=2,
        seconds=0.02,
        out=workplace / "runs",
        progress=seen.append,
        tell=told.append,
    )
    killer.join(10)
    assert not killer.is_alive()
    (run,) = done
    points = {m.point.key for m in run.measurements}
    assert len(points) == 20
    assert Counter((m.point.key, m.round) for m in run.measurements) == {
        (key, number): 1 for key in points for number in (1, 2)
    }
    assert {(m.status, m.reason) for m in run.measurements} == {("ok", "")}
    assert run.environment.threads == 1, "OMP_NUM_THREADS is that of the driver"
    assert sum("was lost" in line for line in told) == 1
    assert (seen[-1].done, seen[-1].total) == (40, 40)
    begun = Counter((one.point.key, one.round) for one in seen if one.measurement is None)
    assert sorted(begun.values()) == [*[1] * 39, 2], "the dead node's point was begun again, and no other"
    assert len({one.node for one in seen}) == 2, "both nodes had work"


@pytest.mark.slow
def test_interrupting_keeps_what_is_measured_and_resuming_does_the_rest(workplace: Path) -> None:
    command = [
        *VIDBENCH, "sweep", "models", "--engine", "ray", "--model", "cluster_models:Tiny", "--model",
        "cluster_models:WaitsForSignal", "--axis", "clip_length=1", "--axis", "batch_size=1", "--axis", "input_size=8",
        "--out", "runs", "--resume",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (workplace / "waits").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert said.splitlines()[-1].endswith("add --resume --out runs to go on")
    assert "Traceback" not in said
    kept = {path: path.read_bytes() for path in workplace.glob("runs/*/measurements.jsonl")}
    (workplace / "go").touch()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (folder,) = {str(path.parent.relative_to(workplace)) for path in kept}
    assert ended.stdout == f"{folder}: 2 ok\nnext: vidbench report {folder}\n"
    for path, before in kept.items():
        assert path.read_bytes().startswith(before)
        assert len(load(path.parent).measurements) == 2


@pytest.mark.slow
def test_a_point_that_kills_its_deputy_is_a_row(workplace: Path) -> None:
    done = runs(
        "models",
        engine="ray",
        models=["cluster_models:KillsItsDeputy", "cluster_models:Tiny"],
        axes={"clip_length": (1,), "batch_size": (1,), "input_size": (8,)},
        out=workplace / "runs",
    )
    for run in done:
        found = {m.point.workload.partition(":")[2]: (m.status, m.reason) for m in run.measurements}
        assert found["Tiny"] == ("ok", "")
        status, reason = found["KillsItsDeputy"]
        assert status == "crashed"
        assert reason.startswith("its node was lost 3 times, at last ")
        assert reason.endswith(": its process has died")


@pytest.mark.slow
def test_a_model_that_no_node_has_is_one_line(workplace: Path) -> None:
    with pytest.raises(RequestError) as error:
        runs("models", engine="ray", models=["cluster_models:Absent"], out=workplace / "runs")
    assert "cluster_models has no 'Absent'" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (workplace / "runs").exists()


# --- none -------------------------------------------------------------------------------------------------------------


def sweep_with_ray(before: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; {before}\n"
        "sys.argv = 'vidbench sweep models --model nowhere:model --engine ray'.split()\n"
        "from vidbench.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environ}
    )


def refused(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_without_ray_one_line_says_how_to_install_it() -> None:
    said = refused(sweep_with_ray("sys.modules['ray'] = None"))
    assert said == "vidbench: error: --engine ray needs ray: pip install 'vidbench[ray]'\n"


def test_a_cluster_that_does_not_answer_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = refused(sweep_with_ray(RAY_ADDRESS=address))
    assert f"no Ray cluster at RAY_ADDRESS={address}" in said
    assert "ray start --head" in said


def test_without_a_cluster_none_is_started() -> None:
    def found() -> bool:
        return any("gcs_server" in (process.info["name"] or "") for process in psutil.process_iter(["name"]))

    there_was_one = found()
    ended = sweep_with_ray()
    if there_was_one or (found() and "there is none" not in ended.stderr):
        pytest.skip("another Ray cluster runs on this machine")
    said = refused(ended)
    assert "joins a running Ray cluster, and there is none" in said
    assert "ray start --head" in said
    assert not found()
