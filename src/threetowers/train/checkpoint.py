"""Checkpoints that can be trusted: written beside, verified when read, never half there.

`checkpoints/step-00001200/` holds model.safetensors, optim.safetensors, state.json and MANIFEST.json with the size and
SHA-256 of each. A checkpoint exists from the moment its folder has its name; there is no pointer to the latest one.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from threetowers.errors import CheckpointError

SCHEMA = 1


@dataclass
class Restored:
    """A verified checkpoint: what it holds, and a line for each newer one that had to be passed over."""

    step: int
    state: dict[str, Any]
    folder: Path
    passed_over: list[str]


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes the checkpoint of a step under root and removes older ones beyond `keep`.

    Raises OSError when the disk refuses; what was there before is untouched then.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{os.getpid()}-{step:08d}"
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_file(_contiguous(model.state_dict()), partial / "model.safetensors")
        save_file(_contiguous(optimizer_tensors(optimizer)), partial / "optim.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        for name in files:
            _sync(partial / name)
        manifest = {"schema": SCHEMA, "step": step, "files": files}
        (partial / "MANIFEST.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync(partial / "MANIFEST.json")
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)  # the same step of a run that continues from an older checkpoint
        partial.rename(final)
        _sync(root)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(root)[max(keep, 1) :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under root, newest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)


def find(root: Path) -> Restored | None:
    """The newest checkpoint under root that verifies; None when there is none at all.

    Raises CheckpointError when there are some and not one verifies: starting anew is the user's decision.
    """
    passed_over: list[str] = []
    for folder in checkpoints(root):
        try:
            state = verify(folder)
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        return Restored(int(state["step"]), state, folder, passed_over)
    if passed_over:
        raise CheckpointError(
            f"{root}: no checkpoint is intact. {'; '.join(passed_over)}. Give --fresh to start this run again"
        )
    return None


def verify(folder: Path) -> dict[str, Any]:
    """The checkpoint's state.json, after every file has been compared with the manifest; raises CheckpointError."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{folder.name}: schema {manifest['schema']!r}, this version reads {SCHEMA}"
            )
        for name, expected in manifest["files"].items():
            if _describe(folder / name) != expected:
                raise CheckpointError(
                    f"{folder.name}: {name} is not what was written (size or SHA-256 differs)"
                )
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.name}: damaged ({error})") from None
    return state


def restore(found: Restored, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a verified checkpoint's tensors into the model and the optimiser, strictly."""
    try:
        model.load_state_dict(load_file(found.folder / "model.safetensors"))
        load_optimizer_tensors(optimizer, load_file(found.folder / "optim.safetensors"))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{found.folder}: does not fit this configuration ({error})") from None


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
            if not own:
                continue  # it never had a gradient
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


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def _describe(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(root: Path) -> None:
    """Removes every checkpoint under root: the user asked for a fresh start."""
    for folder in checkpoints(root):
        shutil.rmtree(folder)
