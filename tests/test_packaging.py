"""The sdist and the wheel: what is in them, and that the wheel runs the demo without the source tree."""

import email
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import threetowers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "threetowers"

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    """The output of a command that knows nothing of the source tree; fails with all of it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the tracked files, and the wheel made from that sdist."""
    copy = tmp_path_factory.mktemp("source") / "threetowers"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "data", "build", "dist")
    copy.mkdir()
    for entry in ROOT.iterdir():
        if entry.is_dir() and entry.name in ("src", "tests", "docs", "examples", "benchmarks"):
            # what a run left behind is not copied; under src, data/ is a package
            patterns = ignored if entry.name != "src" else shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(entry, copy / entry.name, ignore=patterns)
        elif entry.is_file() and not entry.name.startswith("."):
            shutil.copy(entry, copy)
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, copy, cwd=dist)
    return dist


def test_the_sdist_has_what_the_project_has(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
    }
    wanted |= {
        "docs/README.md",
        "docs/figures/methods-light.svg",
        "docs/claims.md",
        "tests/conftest.py",
    }
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert wanted <= names, sorted(wanted - names)


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        described = email.message_from_bytes(archive.read(metadata))
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert names == {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert described["Name"] == "threetowers"
    assert described["Version"] == threetowers.__version__
    assert described["License-Expression"] == "Apache-2.0"


def test_the_wheel_runs_the_demo_in_a_clean_environment(built: Path, tmp_path: Path) -> None:
    """The environment sees the installed libraries through a .pth file, which does not bring in the source tree."""
    clean, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    venv.create(clean, with_pip=True)
    (wheel,) = built.glob("*.whl")
    python = clean / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=work)
    (packages,) = clean.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    place = run(python, "-c", "import threetowers; print(threetowers.__file__)", cwd=work)
    assert Path(place.strip()).is_relative_to(packages)

    command = clean / "bin" / "threetowers"
    assert run(command, "--version", cwd=work).strip() == f"threetowers {threetowers.__version__}"
    printed = run(command, "demo", "--steps", "4", "--device", "cpu", cwd=work)
    assert "mean R@1" in printed
    page = (work / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    assert (PACKAGE / "report" / "style.css").read_text(encoding="utf-8").strip() in page
