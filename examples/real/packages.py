"""Packages of pictures and weights, fetched by the registries' own clients and checked against pinned digests."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CACHE = Path("data/packages")


@dataclass(frozen=True)
class Package:
    """A release of a package: its registry, name, version, the SHA-256 of its file, and its licence."""

    registry: Literal["npm", "pypi", "debian"]
    name: str
    version: str
    sha256: str
    licence: str


def fetch(package: Package) -> Path:
    """The folder that holds the contents of a package; fetched and unpacked on first use.

    Exits with a sentence when its client is missing or fails, or when the file is not the one that was pinned.
    """
    folder = CACHE / f"{package.name.replace('/', '-').lstrip('@')}-{package.version.replace(':', '.')}"
    if folder.is_dir():
        return folder
    download = CACHE / ".download"
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir(parents=True)
    print(f"fetching {package.name} {package.version} ({package.licence})", flush=True)
    (file,) = _download(package, download)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        sys.exit(
            f"{package.name} {package.version}: the SHA-256 of its file is {digest}, and not {package.sha256}"
        )
    partial = CACHE / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if package.registry == "npm":
        with tarfile.open(file) as archive:
            archive.extractall(partial, filter="data")
    elif package.registry == "pypi":
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(partial)
    else:
        _run(["dpkg-deb", "--extract", str(file), str(partial)])
    shutil.rmtree(download)
    partial.rename(folder)
    return folder


def _download(package: Package, folder: Path) -> list[Path]:
    name, version = package.name, package.version
    commands = {
        "npm": ["npm", "pack", f"{name}@{version}", "--silent"],
        "pypi": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"],
        "debian": ["apt-get", "download", f"{name}={version}"],
    }
    _run(commands[package.registry], folder)
    return list(folder.iterdir())


def _run(command: list[str], folder: Path = Path()) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(
            f"{command[0]}: there is no such program; it is the client of the registry that holds this package"
        )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
