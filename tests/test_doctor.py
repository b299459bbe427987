"""What `threetowers doctor` reports on working and on broken machines."""

import subprocess
import sys
from pathlib import Path

import pytest

from threetowers import cli
from threetowers.commands import doctor
from threetowers.commands.doctor import Check

REMEDY = "install both from the same index"


def test_a_real_run_finds_this_machine_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code, lines
    found = {line[5:24].strip(): line[:5].strip() for line in lines if not line.startswith(" ")}
    assert {"python", "torch", "torchvision fits", "devices", "cores", "disk speed", "encoding"} <= set(found)
    assert lines[-1].endswith(" 0 fail")
    assert not list(tmp_path.iterdir()), "the speed test removes what it wrote"


@pytest.mark.parametrize(
    ("version", "demanded", "optional", "state"),
    [
        ("2.15.0+cpu", ">=2.10", False, "ok"),
        ("2.9.1", ">=2.10", False, "fail"),
        ("2.11.0.dev20260101", ">=2.10", False, "ok"),
        (None, ">=2.10", False, "fail"),
        (None, ">=5.5", True, "ok"),
        ("4.0", ">=5.5", True, "warn"),
        ("built-by-hand", ">=2.10", False, "ok"),
        ("1.0", "", False, "ok"),
    ],
)
def test_versions(version: str | None, demanded: str, optional: bool, state: str) -> None:
    check = doctor.check_version("torch", version, demanded, optional=optional)
    assert check.state == state
    assert bool(check.remedy) == (state != "ok")
    if state != "ok":
        assert f"pip install 'torch{demanded}'" in check.remedy


def test_what_is_demanded_stands_in_the_packages_own_metadata() -> None:
    assert doctor.requirement_of("torch").startswith(">=2.")
    assert doctor.requirement_of("pyarrow").startswith(">="), "an extra's demand counts too"
    assert doctor.requirement_of("python").startswith(">=3.")
    assert doctor.requirement_of("nothing-of-that-name") == ""
    assert doctor.installed("nothing-of-that-name") is None
    assert "pyarrow" in doctor._optional()
    assert "torch" not in doctor._optional()


def test_python() -> None:
    assert doctor.check_python("3.10.4", ">=3.11").state == "fail"
    assert doctor.check_python("3.13.0", ">=3.11").state == "ok"


def test_torchvision_of_another_build_is_named_with_its_remedy() -> None:
    error = "RuntimeError: operator torchvision::nms does not exist"
    check = doctor.check_torchvision("2.15.0+cpu", "0.29.2", error)
    assert check.state == "fail"
    assert error in check.found
    assert REMEDY in check.remedy
    assert check.remedy.endswith("/whl/cpu")
    assert doctor.check_torchvision("2.15.0+cu132", "0.29.2", error).remedy.endswith("/whl/cu132")
    assert doctor.check_torchvision("2.15.0", None, "").state == "fail"
    assert doctor.check_torchvision("2.15.0+cpu", "0.29.2+cpu", "").state == "ok"


def test_a_torchvision_that_cannot_be_imported_does_not_take_the_doctor_down(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "torchvision"
    broken.mkdir(parents=True)
    error = "raise RuntimeError('operator torchvision::nms does not exist')"
    (broken / "__init__.py").write_text(error, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "threetowers.cli", "doctor", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(broken.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "nms does not exist" in done.stdout
    assert REMEDY in done.stdout
    assert "disk speed" in done.stdout, "the checks after it are made all the same"
    assert "Traceback" not in done.stderr


def test_probes_answer_and_fail_without_raising() -> None:
    assert doctor.probe("print('{\"a\": 1}')") == ({"a": 1}, "")
    assert doctor.probe("print('0.29.2+cpu')") == ("0.29.2+cpu", "")
    assert doctor.probe("raise ValueError('so')") == (None, "ValueError: so")
    value, error = doctor.probe("import os; os._exit(9)")
    assert value is None
    assert "9" in error


def test_devices() -> None:
    assert "H200 (141 GB)" in doctor.check_devices([["H200", 141 * 10**9]], "13.0", True).found
    assert doctor.check_devices([], None, False).state == "ok"
    assert "CUDA build" in doctor.check_devices([], None, True).remedy
    assert "driver" in doctor.check_devices([], "13.0", True).remedy


def test_bf16_is_recommended_where_the_device_has_it() -> None:
    assert "--precision bf16-autocast" in doctor.check_bf16(True).found
    assert "fp32" in doctor.check_bf16(False).found


def test_cores(tmp_path: Path) -> None:
    assert doctor.check_threads(8, 8, None).state == "ok"
    assert doctor.check_threads(8, 1, None).state == "ok"
    assert doctor.check_threads(64, 32, 2.0).remedy.endswith("OMP_NUM_THREADS=2")
    assert doctor.check_threads(2, 8, None).state == "warn"
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor.cpu_quota(tmp_path / "cpu.max") == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.cpu_quota(tmp_path / "cpu.max") is None
    assert doctor.cpu_quota(tmp_path / "none") is None


def test_disk(tmp_path: Path) -> None:
    assert [doctor.check_space("disk", "/x", free * 10**8).state for free in (5, 50, 500)] == [
        "fail", "warn", "ok",
    ]  # fmt: skip
    assert doctor.judge_speed(400.0, 20.0).state == "warn"
    assert doctor.judge_speed(400.0, 200.0).state == "ok"
    assert doctor.check_speed(tmp_path / "not there").state == "fail"
    assert doctor.check_speed(tmp_path, 2_000_000).state in ("ok", "warn")
    assert not list(tmp_path.iterdir())


def test_shared_memory_and_encoding() -> None:
    small = doctor.judge_shared_memory(64 * 2**20, 64 * 2**20)
    assert small.state == "warn"
    assert "--shm-size" in small.remedy
    assert doctor.judge_shared_memory(8 * 10**9, 8 * 10**9).state == "ok"
    assert doctor.check_shared_memory(Path("/not there")).state == "ok"
    assert doctor.check_encoding("UTF-8", "utf-8", None).state == "ok"
    assert doctor.check_encoding("ANSI_X3.4-1968", "utf-8", "utf-8").state == "warn"


def test_a_finding_is_one_line_and_its_remedy() -> None:
    assert Check("disk", "ok", "fine").text() == f"ok   {'disk':<19}fine"
    assert Check("disk", "fail", "full", "make room").text().splitlines()[1].strip() == "→ make room"
    checks = [Check("a", "ok", ""), Check("b", "fail", ""), Check("c", "ok", "")]
    assert doctor.tally(checks) == {"ok": 2, "warn": 0, "fail": 1}
