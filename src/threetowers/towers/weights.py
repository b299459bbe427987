"""Weights from files: safetensors alone, loaded strictly."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from threetowers.errors import CheckpointError
from threetowers.files import disk_errors, writing_aside

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".pkl")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_forward_module.")
"""What FSDP, activation checkpointing, torch.compile and DeepSpeed put before the names of a module, at any depth."""

POSITIONS = ("pos_embed", "positional_embedding", "position_embedding.weight", "position_embeddings.weight")


def unwrapped(state: Mapping[str, Tensor], expected: Iterable[str]) -> tuple[dict[str, Tensor], str]:
    """The weights without the prefix before every name that keeps them from fitting, and that prefix.

    expected: the names that the model has. A prefix ends in a dot, such as `module.`, `_orig_mod.` or `visual.trunk.`.
    It is taken off when more names fit without it than with it and with any other; else the weights come back as they
    are, with an empty prefix. WRAPPERS in the midst of names are taken out too.
    """
    names = set(expected)
    plain, prefix = _without_prefix(state, names)
    inner = without_inner_wrappers(plain)
    return (inner, prefix) if prefix or inner.keys() == plain.keys() else _without_prefix(inner, names)


def _without_prefix(state: Mapping[str, Tensor], names: set[str]) -> tuple[dict[str, Tensor], str]:
    first, last = min(state, default=""), max(state, default="")
    dotted = [first[: place + 1] for place, letter in enumerate(first) if letter == "."]
    prefixes = [
        prefix for prefix in dotted if last.startswith(prefix)
    ]  # in sorted order all between them have it too
    fits = {prefix: sum(key.removeprefix(prefix) in names for key in state) for prefix in ["", *prefixes]}
    best = max(fits, key=lambda prefix: fits[prefix])
    if not best or list(fits.values()).count(fits[best]) > 1:
        return dict(state), ""
    return {key.removeprefix(best): value for key, value in state.items()}, best


def without_inner_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without WRAPPERS in the midst of their names; as they are where two names would become one."""
    names = list(state)
    for wrapper in WRAPPERS:
        names = [name.replace(f".{wrapper}", ".") for name in names]
    return dict(zip(names if len(set(names)) == len(state) else state, state.values(), strict=True))


def say_unwrapped(prefix: str, source: str | Path) -> None:
    """Says on standard error which prefix was taken off every name, if any was."""
    if prefix:
        print(f"note: {source}: {prefix!r} stands before every name and was taken off", file=sys.stderr)


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], source: str | Path, *, other_size: str = ""
) -> None:
    """Loads the weights; every missing, unexpected or misshapen key is an error that lists them.

    other_size: what to do when the weights are for images or texts of another size. Raises CheckpointError.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if missing or unexpected or misshapen:
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        listing = "; ".join(f"{word}: {_first(keys)}" for word, keys in parts if keys)
        remedy = _inner_part(state, own.keys())
        if not remedy and not missing and any(key.split(" ")[0].endswith(POSITIONS) for key in misshapen):
            remedy = ". The position embedding is that of another size of image or length of text"
            remedy += f": {other_size}" if other_size else ""
        raise CheckpointError(f"{source}: these weights do not fit the model ({listing}){remedy}")
    module.load_state_dict(dict(state))


def _inner_part(state: Mapping[str, Tensor], expected: Iterable[str]) -> str:
    """A sentence about the prefix behind which all the names of a model stand, among others; empty without one."""
    names = sorted(expected, key=len)
    ends = f".{names[-1]}" if names else "."
    prefixes = [key.removesuffix(ends[1:]) for key in state if key.endswith(ends)]
    whole = [prefix for prefix in prefixes if all(prefix + name in state for name in names)]
    if not whole:
        return ""
    others = sum(not key.startswith(whole[0]) for key in state)
    found = " and ".join(repr(prefix) for prefix in whole)
    return f". The model's weights stand behind {found}, beside {others} others: write them alone to a file"


def _first(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def refuse_pickle(path: str | Path) -> None:
    """Raises CheckpointError for a file of the formats that hold pickled objects."""
    if Path(path).suffix in PICKLES:
        raise CheckpointError(
            f"{path}: only safetensors are read. `threetowers convert {path} --out "
            f"{Path(path).with_suffix('.safetensors').name}` writes them, without running anything in the file"
        )


def no_weights(path: Path) -> str:
    """What a file is that cannot hold weights, and what to do about it; empty when its first bytes do not tell."""
    if path.is_dir():
        return "is a folder; name the file with the weights in it"
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    text = head.lstrip().lower()
    if not head:
        return "is empty; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, which only names the weights; `git lfs pull` in its folder fetches them"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return (
            "is a web page, such as the answer to a wrong address or a missing login; fetch the file itself"
        )
    if path.name.endswith(".index.json"):
        return "lists the files that hold the weights; name the first of these"
    if text.startswith((b"{", b"[")):
        return "is text in JSON, without weights; name or fetch the file that holds them"
    if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        return "is an archive; unpack it, and name the file in it"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file, which Keras writes; save the weights from there as safetensors"
    is_pickle = head.startswith((b"PK", b"\x80\x02"))
    if is_pickle and path.suffix == ".safetensors":
        return "is a PyTorch checkpoint, whatever its name says; rename it to .pt, and `threetowers convert` reads it"
    if head[8:10] == b'{"' and path.suffix != ".safetensors":
        return "is a safetensors file, whatever its name says; rename it to .safetensors"
    return ""


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises CheckpointError when it is missing, damaged or of another kind."""
    refuse_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        if not Path(path).exists():
            raise CheckpointError(f"{path}: no such file") from None
        if found := no_weights(Path(path)):
            raise CheckpointError(f"{path}: {found}") from None
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); fetch or write it again"
        ) from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, sync: bool = False) -> None:
    """Writes tensors as a safetensors file that appears whole or not at all.

    sync: wait until it is on the disk. Raises OSError, naming the file, when the disk refuses.
    """
    with writing_aside(path, sync=sync) as temporary, disk_errors(temporary):
        save_file(dict(tensors), temporary)
