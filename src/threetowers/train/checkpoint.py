"""Checkpoints: written beside their place and renamed when complete, verified when they are read.

`checkpoints/step-00001200/` holds model.safetensors, optim.safetensors, state.json and MANIFEST.json with the size and
SHA-256 of each. Of a model that is cut up over several processes, each of them writes a file in the place of these two
(see shard_files.py). A checkpoint exists once its folder has its final name; there is no pointer to the latest one.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from threetowers.errors import CheckpointError
from threetowers.files import digest_file, sync_to_disk
from threetowers.processes import ALONE, Processes
from threetowers.towers.weights import load_strictly
from threetowers.train import shard_files
from threetowers.train.shards import is_sharded, own_part
from threetowers.train.tensor_file import write_tensors

SCHEMA = 1
WHOLE = ("model.safetensors", "optim.safetensors")
Snapshot = dict[str, dict[str, Tensor]]
"""The tensors of a checkpoint in host memory, by file name and by name."""


@dataclass
class Restored:
    """A verified checkpoint, and a line for each newer one that is damaged."""

    step: int
    state: dict[str, Any]
    folder: Path
    environment: dict[str, Any]
    passed_over: list[str]
    digest: str = ""
    """The manifest's own, which stands for all that is in the files."""


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, own: Snapshot | None = None) -> Snapshot:
    """The tensors of model and optimiser, contiguous in host memory.

    own: memory to copy them into, so that training can go on; what it lacks is added. Used again and again it spares
    the system from finding, and clearing, gigabytes at each save.
    """
    tensors = {"model.safetensors": model.state_dict(), "optim.safetensors": optimizer_tensors(optimizer)}
    if own is None:
        return {
            file: {name: value.detach().cpu().contiguous() for name, value in content.items()}
            for file, content in tensors.items()
        }
    return {
        file: {name: _copied(value, name, own.setdefault(file, {})) for name, value in content.items()}
        for file, content in tensors.items()
    }


def own_snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> tuple[Snapshot, dict[str, str]]:
    """What a process writes of a model that is cut up, in host memory, and the metadata of its file."""
    pieces, metadata = shard_files.own_pieces(model, optimizer_tensors(optimizer), rank)
    content = {name: value.detach().cpu().contiguous() for name, value in pieces.items()}
    return {shard_files.file_name(rank): content}, metadata


def _copied(value: Tensor, name: str, own: dict[str, Tensor]) -> Tensor:
    place = own.get(name)
    if place is None or (place.shape, place.dtype) != (value.shape, value.dtype):
        place = own[name] = torch.empty(value.shape, dtype=value.dtype)
    return place.copy_(value.detach())


def save(
    root: Path,
    step: int,
    tensors: Snapshot,
    state: dict[str, Any],
    environment: dict[str, Any],
    keep: int,
    spare: int | None = None,
    *,
    writers: Processes = ALONE,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the checkpoint of a step under root and removes older ones beyond `keep`.

    environment: what the arithmetic depended on, for the manifest. spare: a step whose checkpoint is not removed.
    writers: the processes that call this together, each with files of its own; the first of them does the rest.
    metadata: for the headers of the tensors' files. Raises OSError, in all writers, when the disk refuses one of them;
    what was there before is untouched then.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{writers.told(os.getpid)}-{step:08d}"
    with writers.failing_together():
        if writers.first:
            root.mkdir(parents=True, exist_ok=True)
            _need_room(root, tensors, writers.size)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
    try:
        with writers.failing_together():
            own = {
                name: _write_tensors(partial / name, content, metadata) for name, content in tensors.items()
            }
        files = {name: described for each in writers.exchange(own) for name, described in each.items()}
        with writers.failing_together():
            if writers.first:
                _write_json(partial / "state.json", {"step": step, **state})
                files["state.json"] = _describe(partial / "state.json")
                manifest = {"schema": SCHEMA, "step": step, "files": files, "environment": environment}
                _write_json(partial / "MANIFEST.json", {**manifest, "sha256": _digest(manifest)})
                sync_to_disk(partial)
                if final.exists():
                    _set_aside(final)
                os.rename(partial, final)  # noqa: PTH104 - the one commit point; tests put faults in its way
                sync_to_disk(root)
    except BaseException:
        if writers.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(root)[max(keep, 1) :] if writers.first else ():
        if spare is None or old.name != f"step-{spare:08d}":
            shutil.rmtree(old, ignore_errors=True)
    return final


def _need_room(root: Path, tensors: Snapshot, writers: int) -> None:
    """Raises OSError before anything is written when the disk cannot take it; writers: how many write as much."""
    needed = writers * sum(value.nbytes for content in tensors.values() for value in content.values()) + (
        1 << 20
    )
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free", str(root)
        )


def _write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    written = write_tensors(path, tensors, metadata)
    sync_to_disk(path)
    if path.stat().st_size != written["size"]:
        raise OSError(errno.EIO, "was not written whole", str(path))
    return written


def _write_json(path: Path, values: dict[str, Any]) -> None:
    content = _as_text(values)
    path.write_bytes(content)
    sync_to_disk(path)
    if path.stat().st_size != len(content):
        raise OSError(errno.EIO, "was not written whole", str(path))


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under root, newest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)


def find(root: Path) -> Restored | None:
    """The newest checkpoint under root that verifies; None when there is none at all.

    Damaged newer ones are renamed, so that nothing writes over them. Raises CheckpointError when there are some and
    not one verifies: starting anew is the user's decision.
    """
    damaged: dict[Path, str] = {}
    for folder in checkpoints(root):
        try:
            state, environment = verify(folder)
        except CheckpointError as error:
            damaged[folder] = str(error)
            continue
        for other in damaged:
            _set_aside(other)
        digest = digest_file(folder / "MANIFEST.json")
        return Restored(int(state["step"]), state, folder, environment, list(damaged.values()), digest)
    if damaged:
        raise CheckpointError(
            f"{root}: no checkpoint is intact. {'; '.join(damaged.values())}. Give --fresh to start this run again"
        )
    return None


def verify(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint's state and environment, after every file has been compared with the manifest.

    Raises CheckpointError.
    """
    try:
        content = (folder / "MANIFEST.json").read_bytes()
        manifest = json.loads(content)
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        if content != _as_text(manifest) or manifest["sha256"] != _digest(rest):
            raise CheckpointError(f"{folder.name}: MANIFEST.json is not what was written")
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{folder.name}: schema {manifest['schema']!r}, this version reads {SCHEMA}"
            )
        for name in sorted({*manifest["files"], "state.json"}):
            if _describe(folder / name) != manifest["files"][name]:
                raise CheckpointError(
                    f"{folder.name}: {name} is not what was written (size or SHA-256 differs)"
                )
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if folder.name != f"step-{state['step']:08d}" or manifest["step"] != state["step"]:
            raise CheckpointError(f"{folder.name}: holds another step ({state['step']})")
        environment: dict[str, Any] = dict(manifest["environment"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.name}: damaged ({type(error).__name__}: {error})") from None
    return state, environment


def restore(found: Restored, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a verified checkpoint's tensors into the model and the optimiser, strictly."""
    try:
        if is_sharded(model) or not _is_whole(found.folder):
            tensors = shard_files.read(found.folder, model)
            moments = {name: tensors.pop(name) for name in list(tensors) if shard_files.is_moment(name)}
            moments = {name: own_part(value).detach() for name, value in moments.items()}
        else:
            tensors, moments = (load_file(found.folder / name) for name in WHOLE)
        load_strictly(model, tensors, found.folder)
        load_optimizer_tensors(optimizer, moments)
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{found.folder}: does not fit this configuration ({error})") from None


def restore_model(root: Path, step: int, model: nn.Module) -> None:
    """Puts the model of one step's checkpoint into `model`; raises CheckpointError when it is missing or damaged."""
    load_strictly(model, read_model(root, step), root / f"step-{step:08d}")


def read_model(root: Path, step: int) -> dict[str, Tensor]:
    """The whole weights of one step's checkpoint, in one process; raises CheckpointError as `restore_model` does."""
    folder = root / f"step-{step:08d}"
    verify(folder)
    if _is_whole(folder):
        return load_file(folder / WHOLE[0])
    return shard_files.read(folder, nn.Module(), lambda name: not shard_files.is_moment(name))


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint holds tensors whole, and not the rows that each process had."""
    return (folder / WHOLE[0]).is_file()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `parameter/moment`."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; raises KeyError for a name that is left over."""
    rest = dict(tensors)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            own = {key for key in rest if key.rpartition("/")[0] == name}
            optimizer.state.pop(parameter, None)
            if own:  # without, it had no gradient yet
                optimizer.state[parameter] = {
                    key.rpartition("/")[2]: _laid_out_as(parameter, rest.pop(key)) for key in sorted(own)
                }
    if rest:
        raise KeyError(f"moments of unknown parameters: {sorted(rest)[:4]}")


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment in its parameter's memory format; the fused optimiser walks both by address."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _as_text(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode()


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(_as_text(values)).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": digest_file(path)}


def _set_aside(folder: Path) -> None:
    """Renames a step's folder to `damaged-…`; where that cannot be done it stays as it is."""
    number = sum(1 for _ in folder.parent.glob(f"damaged-{folder.name}*"))
    with contextlib.suppress(OSError):
        folder.rename(folder.with_name(f"damaged-{folder.name}" + (f"-{number}" if number else "")))


def sweep(root: Path) -> None:
    """Removes what saves of dead processes left; only for who holds the folder's lock."""
    for partial in root.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def discard(root: Path) -> None:
    """Removes every checkpoint under root: the user asked for a fresh start."""
    for folder in checkpoints(root):
        shutil.rmtree(folder)
