"""Weights from files: safetensors alone, loaded strictly."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from threetowers.errors import CheckpointError
from threetowers.files import disk_errors, writing_aside

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Loads the weights; every missing, unexpected or misshapen key is an error that lists them.

    Raises CheckpointError.
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
        raise CheckpointError(f"{source}: these weights do not fit the model ({listing})")
    module.load_state_dict(state)


def _first(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def refuse_pickle(path: str | Path) -> None:
    """Raises CheckpointError for a file of the formats that hold pickled objects."""
    if Path(path).suffix in PICKLES:
        raise CheckpointError(
            f"{path}: only safetensors are read. `threetowers convert {path} --out "
            f"{Path(path).with_suffix('.safetensors').name}` writes them, without running anything in the file"
        )


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises CheckpointError when it is missing, damaged or of another kind."""
    refuse_pickle(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); fetch or write it again"
        ) from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, sync: bool = False) -> None:
    """Writes tensors as a safetensors file that appears whole or not at all.

    sync: wait until it is on the disk. Raises OSError, naming the file, when the disk refuses.
    """
    with writing_aside(path, sync=sync) as temporary, disk_errors(temporary):
        save_file(dict(tensors), temporary)
