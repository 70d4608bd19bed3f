"""What is installed: both packages typed and whole, and a foreign package `kernels` undisturbed."""

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import vidbench
import vidkernels


def test_versions_agree() -> None:
    assert metadata.version("vidbench") == vidbench.__version__


def test_both_packages_are_typed() -> None:
    for package in (vidbench, vidkernels):
        assert package.__file__ is not None
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_the_reports_page_is_installed_with_its_parts() -> None:
    folder = Path(str(vidbench.__file__)).parent / "report"
    assert {"page.html.j2", "page.css", "page.js", "explore.js", "vendored"} <= {path.name for path in folder.iterdir()}
    assert {path.name for path in (folder / "vendored").iterdir()} == {"plotly-gl2d.min.js", "plotly.LICENSE"}


def test_the_command_is_installed() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="vidbench")
    assert script.value == "vidbench.cli:main"
    (plugin,) = metadata.entry_points(group="pytest11", name="vidbench")
    assert plugin.value == "vidbench.pytest_plugin"


def test_a_foreign_package_named_kernels_keeps_working(tmp_path: Path) -> None:
    """Hugging Face publishes one; ours installs `vidkernels` alone."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'")
    code = "import kernels, vidkernels, vidbench; print(kernels.whose, len(vidkernels.OPS))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert ended == ["theirs", str(len(vidkernels.OPS))]


def test_importing_starts_nothing_heavy(tmp_path: Path) -> None:
    """No triton, no compiler, no device, no drawing when the packages are imported."""
    code = (
        "import sys, vidbench, vidbench.results, vidbench.suites; assert 'torch' not in sys.modules\n"
        "import vidkernels, torch; assert not torch.cuda.is_initialized()\n"
        "print(sorted({'triton', 'matplotlib', 'pandas', 'cv2', 'av', 'sklearn', 'fvcore'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_no_module_is_left_out_of_the_wheel() -> None:
    root = Path(__file__).parents[1]
    for package, source in (("vidbench", root / "vidbench"), ("vidkernels", root / "kernels" / "vidkernels")):
        found = importlib.util.find_spec(package)
        assert found is not None
        assert found.origin is not None
        installed = Path(found.origin).parent
        names = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert names <= {path.relative_to(installed) for path in installed.rglob("*")}
