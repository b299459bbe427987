"""Whether this machine can train: versions, devices, cores, disk, shared memory, each with a plain remedy.

Every check is a function of plain values that returns a `Check`, so that a test can ask it about any machine.
"""

import importlib.metadata
import json
import locale
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from threetowers.files import cache_folder, nearest_folder

State = Literal["ok", "warn", "fail"]

PACKAGES = (
    "threetowers", "torch", "torchvision", "timm", "open_clip_torch", "transformers", "tokenizers", "safetensors",
    "pillow", "pyarrow", "simplejpeg",
)  # fmt: skip
SPEED_BYTES = 64_000_000
GIGABYTE = 10**9
_PROBE_SECONDS = 300  # a first import from a cold network disk takes minutes

# Importing torch and torchvision happens in other processes: a broken build must not end this command.
_TORCH_PROBE = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
    "devices": [[d.name, d.total_memory] for d in devices],
    "bf16": torch.cuda.is_bf16_supported() if devices else any(
        has for unit, has in getattr(torch.cpu, "get_capabilities", dict)().items() if "bf16" in unit
    ),
}))
"""
_TORCHVISION_PROBE = "import torchvision; print(torchvision.__version__)"


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it is, what was found, and what to do when it is not well."""

    name: str
    state: State
    found: str
    remedy: str = ""

    def text(self) -> str:
        line = f"{self.state:<5}{self.name:<19}{self.found}"
        return line + (f"\n{'':<24}→ {self.remedy}" if self.remedy else "")


def doctor(folder: Path) -> Iterator[Check]:
    """All checks of this machine in turn; speed and space are those of the folder. Writes 64 MB and removes them."""
    yield check_python(platform.python_version(), requirement_of("python"))
    versions = {name: installed(name) for name in PACKAGES}
    for name, version in versions.items():
        yield check_version(name, version, requirement_of(name), optional=name in _optional())
    torch, error = probe(_TORCH_PROBE)
    if torch is None:
        yield Check("torch import", "fail", error, "install torch again: pip install --force-reinstall torch")
        torch = {}
    vision, error = probe(_TORCHVISION_PROBE) if torch else (None, "torch cannot be imported")
    yield check_torchvision(
        str(torch.get("version")), versions["torchvision"], "" if vision is not None else error
    )
    yield check_devices(torch.get("devices", []), torch.get("cuda"), shutil.which("nvidia-smi") is not None)
    yield check_bf16(bool(torch.get("bf16")))
    yield check_threads(available_cores(), int(torch.get("threads", 0)), cpu_quota())
    weights = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    places = {"disk here": folder, "disk of the cache": cache_folder(), "disk of weights": weights}
    for name, place in places.items():
        yield check_space(name, str(place), shutil.disk_usage(nearest_folder(place)).free)
    yield check_speed(folder)
    yield check_shared_memory(Path("/dev/shm"))
    yield check_encoding(locale.getpreferredencoding(False), sys.getfilesystemencoding(), sys.stdout.encoding)


def installed(package: str) -> str | None:
    """The installed version of a distribution, None when there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires("threetowers") or []]
    except importlib.metadata.PackageNotFoundError:  # run from a source folder that is not installed
        return []


def _optional() -> set[str]:
    """The packages that only an extra asks for."""
    own = _requirements()
    needed = {entry.name for entry in own if entry.marker is None}
    return {name for name in PACKAGES if name not in needed} - {"threetowers"} if own else set()


def requirement_of(package: str) -> str:
    """What this package's own metadata demands of another one, such as `>=2.10`; empty when it demands nothing."""
    if package == "python":
        try:
            return importlib.metadata.metadata("threetowers")["Requires-Python"] or ""
        except (importlib.metadata.PackageNotFoundError, KeyError):
            return ""
    return next((str(entry.specifier) for entry in _requirements() if entry.name == package), "")


def check_python(version: str, demanded: str) -> Check:
    """The interpreter against what the package demands."""
    if not _fits(version, demanded):
        return Check("python", "fail", version, f"threetowers needs Python {demanded}")
    return Check("python", "ok", version)


def check_version(name: str, version: str | None, demanded: str, *, optional: bool) -> Check:
    """An installed version against what is demanded of it, such as `>=2.10`."""
    if version is None and optional:
        return Check(name, "ok", f"not installed (optional): pip install '{name}{demanded}'")
    if version is None:
        return Check(name, "fail", "not installed", f"pip install '{name}{demanded}'")
    if not _fits(version, demanded):
        remedy = f"threetowers needs {demanded}: pip install '{name}{demanded}'"
        return Check(name, "warn" if optional else "fail", version, remedy)
    return Check(name, "ok", version)


def _fits(version: str, demanded: str) -> bool:
    try:
        return Requirement(f"x{demanded}").specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True  # a local build, whose number cannot be compared


def probe(program: str) -> tuple[Any, str]:
    """The last line that a fresh Python prints, as JSON or text, or None and the last line of its error."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=_PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{type(error).__name__}: {error}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"ended with code {done.returncode} and said nothing"
    if done.returncode:
        return None, last
    try:
        return json.loads(last), ""
    except ValueError:
        return last, ""


def check_torchvision(torch: str, torchvision: str | None, error: str) -> Check:
    """Whether torchvision was built for the installed torch. error: what importing it says, empty when it works."""
    name, found = "torchvision fits", f"torch {torch}, torchvision {torchvision}"
    index = torch.partition("+")[2] or "cpu"
    remedy = (
        "the two come from different builds; install both from the same index: pip install --force-reinstall "
        f"torch torchvision --index-url https://download.pytorch.org/whl/{index}"
    )
    if torchvision is None:
        return Check(name, "fail", found, remedy)
    if error:
        return Check(name, "fail", f"{found}: {error}", remedy)
    return Check(name, "ok", found)


def check_devices(devices: Sequence[Sequence[Any]], cuda: str | None, driver: bool) -> Check:
    """devices: name and bytes of memory of each CUDA device. cuda: what torch was built for. driver: is one there."""
    if devices:
        text = ", ".join(f"{name} ({memory / GIGABYTE:.0f} GB)" for name, memory in devices)
        return Check("devices", "ok", text)
    if driver and not cuda:
        remedy = (
            "install a CUDA build of torch and torchvision, both from the same index (pytorch.org says which)"
        )
        return Check(
            "devices", "warn", "there is an NVIDIA driver, but this torch is for the CPU only", remedy
        )
    if driver:
        remedy = (
            "compare the CUDA version in nvidia-smi with torch's; update the driver, or take another torch"
        )
        return Check("devices", "warn", f"there is an NVIDIA driver, but torch (CUDA {cuda}) finds no device",
                     remedy)  # fmt: skip
    return Check("devices", "ok", "the CPU only; the small presets are made for it")


def check_bf16(native: bool) -> Check:
    """Whether the device has units for bf16; without, it is many times slower than fp32."""
    if native:
        return Check(
            "bf16", "ok", "the device multiplies it: --precision bf16-autocast trains faster than fp32"
        )
    return Check("bf16", "ok", "no units for it that torch can tell of: stay with fp32")


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """The cores that a container may use, None when nothing limits them."""
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such limit, or `max`
        return None


def check_threads(cores: int, threads: int, quota: float | None) -> Check:
    """torch's threads against the cores there are."""
    usable = min(float(cores), quota or cores)
    found = f"{cores} cores, {threads} torch threads" + (f", limited to {quota:g} cores" if quota else "")
    if threads > usable + 0.5:
        most = max(1, int(usable))
        remedy = f"more threads than cores slow each other down: export OMP_NUM_THREADS={most}"
        return Check("cores", "warn", found, remedy)
    return Check("cores", "ok", found)


def check_space(name: str, place: str, free: int) -> Check:
    """The room for checkpoints and weights at a place; free in bytes."""
    found = f"{free / GIGABYTE:.1f} GB free at {place}"
    if free < GIGABYTE:
        return Check(name, "fail", found, "no checkpoint fits; make room, or work on another disk")
    if free < 10 * GIGABYTE:
        remedy = "checkpoints and weights may not fit; `threetowers validate` says how much a run needs"
        return Check(name, "warn", found, remedy)
    return Check(name, "ok", found)


def check_speed(folder: Path, size: int = SPEED_BYTES) -> Check:
    """How fast the folder's disk writes (waiting until it is there) and reads; leaves nothing behind."""
    name = "disk speed"
    path = folder / f".threetowers-speed-{os.getpid()}"
    block = os.urandom(1_000_000)  # zeros would be compressed away by some file systems
    try:
        with path.open("wb", buffering=0) as file:
            start = time.perf_counter()
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter() - start
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # else memory is measured, not the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while file.read(len(block)):
                pass
            read = time.perf_counter() - start
    except OSError as error:
        return Check(
            name, "fail", f"{folder}: {error.strerror or error}", "work in a folder that can be written to"
        )
    finally:
        path.unlink(missing_ok=True)
    return judge_speed(size / written / 1e6, size / read / 1e6)


def judge_speed(write: float, read: float) -> Check:
    """write, read: megabytes per second."""
    found = f"writes {write:,.0f} MB/s, reads {read:,.0f} MB/s"
    if min(write, read) < 50:
        remedy = "training will wait for this disk; copy data and run folders to a local one"
        return Check("disk speed", "warn", found, remedy)
    return Check("disk speed", "ok", found)


def check_shared_memory(path: Path) -> Check:
    """Loader processes hand batches over in shared memory, and are killed when it is full."""
    try:
        status = os.statvfs(path)
    except (OSError, AttributeError):
        return Check("shared memory", "ok", "this system does not limit it")
    return judge_shared_memory(status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail)


def judge_shared_memory(size: int, free: int) -> Check:
    """What loader processes hand their batches over in; bytes."""
    found = f"{size / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB free"
    if free < GIGABYTE:
        remedy = "loader processes may die with a bus error: docker run --shm-size=8g, or train with --inputs.workers 0"
        return Check("shared memory", "warn", found, remedy)
    return Check("shared memory", "ok", found)


def check_encoding(preferred: str, files: str, output: str | None) -> Check:
    """Whether names and captions outside ASCII can be read and shown."""
    used = {"text": preferred, "file names": files, "output": output or "utf-8"}
    found = ", ".join(f"{what} {name}" for what, name in used.items())
    if any(name.lower().replace("-", "") != "utf8" for name in used.values()):
        remedy = "names and captions outside ASCII may be shown wrongly: export PYTHONUTF8=1 LC_ALL=C.UTF-8"
        return Check("encoding", "warn", found, remedy)
    return Check("encoding", "ok", found)


def tally(checks: Sequence[Check]) -> Mapping[str, int]:
    """The number of checks in each state."""
    return {state: sum(check.state == state for check in checks) for state in ("ok", "warn", "fail")}
