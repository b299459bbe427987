"""Foreign PyTorch checkpoints as safetensors. This is the one place that opens a pickle, and it runs no code in it.

    threetowers convert ViT-B-32.pt --out ViT-B-32.safetensors

`torch.load(weights_only=True)` builds tensors and plain containers and refuses every other object by name. What comes
out fits `pair.weights`, `timm:NAME@FILE` and `open_clip:NAME@FILE`.
"""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import convert_to_custom_text_state_dict
from packaging.version import Version
from torch import Tensor

from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.weights import write_safetensors

SAFE_SINCE = Version("2.10")
"""The first torch whose weights_only reader is trusted here."""
NESTS = ("state_dict", "model_state_dict", "model", "module", "ema", "model_ema")
"""Keys under which trainers keep the weights, in the order in which they are looked for."""
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name."""


@dataclass(frozen=True)
class Converted:
    """What was written, and what was left out."""

    out: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """A few lines for people."""
        head = (
            f"{self.out}: {self.num_tensors} tensors, {self.num_parameters / 1e6:,.2f} M numbers, "
            f"{self.num_bytes / 1e6:,.1f} MB, {', '.join(self.dtypes)}"
        )
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


def convert(path: Path, out: Path) -> Converted:
    """Reads a .pt, .pth, .bin or .ckpt file and writes its weights as safetensors.

    CLIP checkpoints in open_clip's older layout become its CustomTextCLIP layout. Raises UsageError for an `out` that
    is there already, and CheckpointError for a file that holds no weights or asks to run code.
    """
    if out.exists():
        raise UsageError(f"--out: {out} is there already; name another file")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out: {out} should end in .safetensors, by which loaders know it")
    notes: list[str] = []
    state = _tensors(_weights_only(path), path, notes)
    if "text_projection" in state and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
        notes.append("laid out as open_clip's CustomTextCLIP (visual.*, text.*)")
    tensors = _on_their_own(state)
    write_safetensors(out, tensors, sync=True)
    return Converted(
        out,
        len(tensors),
        sum(value.numel() for value in tensors.values()),
        out.stat().st_size,
        tuple(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})),
        tuple(notes),
    )


def _weights_only(path: Path) -> Any:
    if Version(torch.__version__).release < SAFE_SINCE.release:
        raise UsageError(
            f"convert: torch {torch.__version__} is too old to open foreign files; {SAFE_SINCE} or newer"
        )
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: is safetensors already")
    try:
        archive = zipfile.is_zipfile(path)
        if archive and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise CheckpointError(
                f"{path}: is a TorchScript program, which holds code. Ask its publisher for a state dict, or name the "
                "model as open_clip:NAME@TAG"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0]
        )
        raise CheckpointError(
            f"{path}: is no file of plain weights, and nothing in it was run ({reason.strip()}). Ask its publisher "
            "for a state dict or safetensors"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
        zipfile.BadZipFile,
    ) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch checkpoint ({line}); fetch it again"
        ) from None


def _tensors(content: Any, path: Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors by name, out of whatever a trainer saved around them; `notes` says what was done."""
    where = "the file"
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        where, content = f"{nest!r}", content[nest]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, no weights by name")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(map(str, list(content)[:8]))
        raise CheckpointError(f"{path}: holds no tensors by name (its keys: {keys or 'none'})")
    notes.append(f"weights taken from {where}")
    left = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if left:
        notes.append(f"left out, no tensors: {', '.join(left[:8])}" + (" …" if len(left) > 8 else ""))
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
            notes.append(f"{wrapper!r} taken off every name")
    return state


def _on_their_own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, value in state.items():
        own = value.detach().contiguous()
        storage = own.untyped_storage().data_ptr()
        result[name] = own.clone() if storage in seen else own
        seen.add(storage)
    return result
