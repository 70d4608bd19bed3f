"""The command line as a shell sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def vidbench(*arguments: str, cwd: Path = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidbench.cli", *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sweep quik", "unknown suite 'quik': did you mean 'quick'?"),
        ("sweep quick --axis clip_lenth=8", "unknown axis 'clip_lenth': did you mean 'clip_length'?"),
        ("sweep quick --axis clip_length=0", "axis clip_length='0' is not a positive integer"),
        (
            "sweep quick --axis clip_length=8 --axis clip_length=16",
            "axis 'clip_length' is given twice: join its values with commas",
        ),
        ("sweep quick --dtype fp31", "unknown dtype 'fp31': did you mean"),
        ("sweep quick --device gpu", "unknown device 'gpu'"),
        ("sweep conv3d --implementation libary", "unknown implementation 'libary': did you mean 'library'?"),
        ("sweep models --model c3", "unknown model 'c3': did you mean 'c3d'?"),
        ("sweep models --model user_models:nothing", "user_models has no 'nothing'"),
        ("sweep quick --resume", "--resume needs --out DIR"),
        ("sweep models --input nowhere.mp4", "nowhere.mp4"),
        ("sweep models --input test_cli.py", "test_cli.py"),
        ("report nowhere", "no run at nowhere"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(command: str, said: str) -> None:
    ended = vidbench(*command.split())
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("vidbench: error: ")
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr


def test_what_cannot_be_shown_is_escaped() -> None:
    ended = vidbench("sweep", "qu\nick\x1b[31m")
    assert ended.returncode == 2
    assert ended.stderr.startswith(r"vidbench: error: unknown suite 'qu\nick\x1b[31m'")
    assert ended.stderr.count("\n") == 1


def test_a_folder_of_any_name_can_be_printed(tmp_path: Path) -> None:
    name = b"caf\xe9"  # no UTF-8
    ended = subprocess.run([sys.executable, "-m", "vidbench.cli", "report", name], capture_output=True, check=False,
                           cwd=tmp_path)  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"vidbench: error: no run at caf")
    assert b"Traceback" not in ended.stderr


def test_an_interrupt_before_a_command_is_at_work_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidbench import cli

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.LISTINGS, cli.Topic.suites, interrupted)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["vidbench", "list", "suites"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130  # 1 would say that something became worse


@pytest.mark.parametrize("command", ["sweep", "nothing", "sweep quick --rounds 0", "sweep quick --nothing"])
def test_bad_usage_is_exit_code_2(command: str) -> None:
    ended = vidbench(*command.split())
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_a_missing_device_is_exit_code_2() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    ended = vidbench("sweep", "conv3d", "--device", "cuda")
    assert ended.returncode == 2
    assert "device 'cuda' is not there" in ended.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in vidbench("--debug", "sweep", "quik").stderr


def test_help_and_version() -> None:
    assert vidbench("--version").stdout.startswith("vidbench 0.")
    ended = vidbench("--help")
    assert ended.returncode == 0
    assert {"sweep", "report", "list"} <= set(ended.stdout.split())


@pytest.mark.parametrize("command", ["--help", "report --help", "sweep --help", "list suites", "list models"])
def test_light_commands_import_nothing_heavy(command: str) -> None:
    code = (
        "import sys; sys.argv = ['vidbench', *sys.argv[1:]]\n"
        "from vidbench.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'numpy', 'vidkernels'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True, cwd=HERE
    )
    assert ended.stderr.strip() == "[]"


def test_a_listing_in_a_pipe_has_a_line_for_each_row() -> None:
    from vidbench.models import MODELS

    lines = vidbench("list", "models").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(MODELS)


@pytest.mark.parametrize("topic", ["suites", "axes", "ops", "implementations", "models", "tasks"])
def test_list_speaks_json(topic: str) -> None:
    rows = json.loads(vidbench("list", topic, "--format", "json").stdout)
    assert rows
    assert len({tuple(row) for row in rows}) == 1, "every row has the same columns"


def test_from_sweep_to_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = vidbench(
        *f"sweep conv3d --axis clip_length=2,4 --axis batch_size=1 --axis in_channels=4 --axis out_channels=4 --axis "
        f"input_size=8 --axis kernel_size=3 --axis memory_format=contiguous --axis stride=1 --implementation "
        f"reference,library --out {out}".split()
    )
    assert ended.returncode == 0, ended.stderr
    assert f"next: vidbench report {out}" in ended.stdout
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("[1/")
    assert all(" ms" in line for line in lines)
    ended = vidbench("report", str(out))
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.strip()) == out / "report" / "report.html"
    assert {p.name for p in (out / "report").iterdir()} >= {"report.html", "report.md", "measurements.csv", "figures"}


def test_a_folder_that_holds_another_sweep_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = f"--axis clip_length=4 --axis input_size=8 --model user_models:tiny --out {out}"
    assert vidbench("sweep", "models", *small.split()).returncode == 0
    before = (out / "measurements.jsonl").read_bytes()
    again = vidbench("sweep", "models", *small.split())
    other = vidbench("sweep", "models", *small.replace("=4", "=5").split(), "--resume")
    for ended in (again, other):
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1
    assert (out / "measurements.jsonl").read_bytes() == before
    resumed = vidbench("sweep", "models", *small.split(), "--resume")
    assert resumed.returncode == 0
    assert (out / "measurements.jsonl").read_bytes() == before
