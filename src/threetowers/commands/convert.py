"""Foreign PyTorch checkpoints as safetensors. This is the one place that opens a pickle, and it runs no code in it.

    threetowers convert ViT-B-32.pt --out ViT-B-32.safetensors

`torch.load(weights_only=True)` builds tensors and plain containers and refuses every other object by name. What comes
out fits `pair.weights`, `timm:NAME@FILE` and `open_clip:NAME@FILE`.
"""

import argparse
import datetime
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import convert_to_custom_text_state_dict
from packaging.version import Version
from torch import Tensor

from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.weights import (
    WRAPPERS,
    no_weights,
    read_safetensors,
    without_inner_wrappers,
    write_safetensors,
)

SAFE_SINCE = Version("2.10")
"""The first torch whose weights_only reader is trusted here."""
NESTS = ("state_dict", "model_state_dict", "model", "module", "ema", "model_ema")
"""Keys under which trainers keep the weights, in the order in which they are looked for."""
PREFIXES = ("module.", "model.", "visual.trunk.", *WRAPPERS)
"""What DataParallel, Lightning, open_clip's timm towers and WRAPPERS put before every name."""
REASONS = ("GLOBAL", "nsupported", "Can only build")
"""Words of the line in which torch says what it refuses."""
PART = re.compile(r"(.+-)\d{5}(-of-(\d{5})\..+)")
"""The name of one of the files over which transformers spreads large models."""


def _without_default(factory: object = None) -> dict[Any, Any]:
    """A `defaultdict` without what it calls for a missing key."""
    return {}


_MAKERS: tuple[Any, ...] = (np.float64().__reduce__()[0], np.empty(0).__reduce__()[0])
INERT: list[Any] = [
    argparse.Namespace, types.SimpleNamespace, (_without_default, "collections.defaultdict"), dict, list, int, float,
    datetime.datetime, datetime.date, datetime.timedelta,
    *((kind, f"{module}.{name}")
      for module in ("pathlib", "pathlib._local")
      for name, kind in (("PosixPath", pathlib.PurePosixPath), ("WindowsPath", pathlib.PureWindowsPath),
                         ("PurePosixPath", pathlib.PurePosixPath), ("PureWindowsPath", pathlib.PureWindowsPath))),
    *((make, f"numpy.{core}.multiarray.{make.__name__}")
      for core in ("_core", "core")
      for make in _MAKERS),
    np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdUSM"),
]  # fmt: skip
"""What trainers keep beside weights: settings, paths, times, numbers of NumPy. Making one of these runs no code that
the file names. Everything else is refused."""


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


def convert(path: Path, out: Path, key: str | None = None) -> Converted:
    """Reads a .pt, .pth, .bin or .ckpt file, or safetensors whose names have to change, and writes safetensors.

    key: under which the weights are, where there are several. CLIP checkpoints in open_clip's older layout become its
    CustomTextCLIP layout. Raises UsageError for an `out` that is there already, and CheckpointError for a file that
    holds no weights or asks to run code.
    """
    if out.exists():
        raise UsageError(f"--out: {out} is there already; name another file")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out: {out} should end in .safetensors, by which loaders know it")
    notes: list[str] = []
    safe = path.suffix == ".safetensors"
    parts = _parts(path)
    contents = [read_safetensors(part) if safe else _weights_only(part) for part in parts]
    whole = contents[0]
    for more in contents[1:]:
        whole = {**whole, **more}
    state = _tensors(whole, path, key, notes)
    if len(parts) > 1:
        notes.append(f"joined from {len(parts)} files")
    if "text_projection" in state and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
        notes.append("laid out as open_clip's CustomTextCLIP (visual.*, text.*)")
    if safe and len(notes) == 1 and len(parts) == 1:
        raise UsageError(
            f"{path}: is safetensors already, and its names are not all behind one of {', '.join(PREFIXES)}"
        )
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


def _parts(path: Path) -> list[Path]:
    """All files of the model of which this is one; raises CheckpointError when some are missing."""
    found = PART.fullmatch(path.name)
    if not found:
        return [path]
    paths = [path.with_name(f"{found[1]}{number:05}{found[2]}") for number in range(1, int(found[3]) + 1)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: is one of {len(paths)} files of a model, and {len(missing)} are not beside it, such as "
            f"{missing[0]}; fetch them"
        )
    return paths


def _weights_only(path: Path) -> Any:
    if Version(torch.__version__).release < SAFE_SINCE.release:
        raise UsageError(
            f"convert: torch {torch.__version__} is too old to open foreign files; {SAFE_SINCE} or newer"
        )
    try:
        if found := path.exists() and no_weights(path):
            raise CheckpointError(f"{path}: {found}")
        archive = zipfile.is_zipfile(path)
        members = zipfile.ZipFile(path).namelist() if archive else []
        if archive and not any(name.endswith("data.pkl") for name in members):
            raise CheckpointError(f"{path}: is an archive; unpack it, and name the file in it")
        if any(name.endswith("/constants.pkl") for name in members):
            raise CheckpointError(
                f"{path}: is a TorchScript program, which holds code. Ask its publisher for a state dict, or name the "
                "model as open_clip:NAME@TAG"
            )
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected pickle protocol"
            )  # what it cannot read is refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        said = str(error).replace("WeightsUnpickler error: ", "").splitlines()
        reason = next((line for line in said if any(word in line for word in REASONS)), said[0])
        reason = reason.partition(". Please use")[0]  # torch advises to trust it
        raise CheckpointError(
            f"{path}: is no file of plain weights, and nothing in it was run ({reason.strip()}). Ask its publisher "
            "for a state dict or safetensors. If you wrote it yourself, and only then, write the weights alone where "
            "its classes are installed; this runs what is in it:\n"
            f"  content = torch.load({str(path)!r}, weights_only=False)\n"
            f"  torch.save(content['state_dict'], {path.stem + '-weights.pt'!r})  # or the key that holds the weights"
        ) from None
    except (
        RuntimeError,
        MemoryError,
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


def _tensors(content: Any, path: Path, key: str | None, notes: list[str]) -> dict[str, Tensor]:
    """The tensors by name, out of whatever a trainer saved around them; `notes` says what was done.

    key: where they are; None: in the first of NESTS that holds some.
    """
    where, others = "the file", list[str]()
    while isinstance(content, Mapping):
        nests = [str(name) for name, value in content.items() if _holds_weights(value)]
        nest = key if key is not None else next((name for name in NESTS if name in nests), None)
        if nest is None:
            break
        if nest not in nests:
            raise CheckpointError(f"{path}: --key: nothing named {nest!r} holds weights{_to_choose(nests)}")
        others += [name for name in nests if name != nest]
        where, content, key = f"{nest!r}", content[nest], None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, no weights by name")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(map(str, list(content)[:8]))
        raise CheckpointError(
            f"{path}: holds no tensors by name (its keys: {keys or 'none'}){_to_choose(nests)}"
        )
    notes.append(
        f"weights taken from {where}" + (f"; others are there{_to_choose(others)}" if others else "")
    )
    left = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if left:
        notes.append(f"left out, no tensors: {', '.join(left[:8])}" + (" …" if len(left) > 8 else ""))
    for name, value in state.items():
        if value.is_meta or value.is_quantized or value.layout is not torch.strided:
            kind = "empty (meta)" if value.is_meta else "quantised" if value.is_quantized else "sparse"
            raise CheckpointError(
                f"{path}: the tensor {name} is {kind}, which safetensors cannot hold; save the model with plain weights"
            )
    if "n_averaged" in state and len(state) > 1:
        del state["n_averaged"]
        notes.append("left out: n_averaged, which counts the steps of an average of weights")
    while wrapper := next((each for each in PREFIXES if all(name.startswith(each) for name in state)), ""):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
        notes.append(f"{wrapper!r} taken off every name")
    inner = without_inner_wrappers(state)
    if inner.keys() != state.keys():
        notes.append("wrappers such as _fsdp_wrapped_module taken out of the midst of names")
    return inner


def _holds_weights(value: Any) -> bool:
    """Whether a trainer's entry is a state dict, or has one under a key of NESTS."""
    if not isinstance(value, Mapping):
        return False
    tensors = any(isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items())
    return tensors or any(_holds_weights(value.get(name)) for name in NESTS)


def _to_choose(nests: list[str]) -> str:
    return f": {', '.join(nests[:8])}; name one with --key {nests[0]}" if nests else ""


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
