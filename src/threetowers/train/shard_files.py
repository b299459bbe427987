"""The tensors of a checkpoint of which each process writes its own rows, in the layout of torch.distributed.checkpoint.

Process r writes one safetensors file with its rows of every tensor; rank 0 also writes what is not cut up. The file's
header says where each piece begins, as `HuggingFaceStorageWriter` writes it, so that `HuggingFaceStorageReader`, which
is used here, and torch's `consolidate_safetensors_files` read it. The reader gives any process any rows, of these files
and of those that hold tensors whole. No metadata is pickled.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from threetowers.train.shards import cut_parameters, first_row, of_rows


def file_name(rank: int) -> str:
    """The file of a process's rows, named as torch's own writer names it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def own_pieces(
    model: nn.Module, moments: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a process writes of a cut model and of its optimiser's state, and the metadata of its file.

    moments: by `parameter/moment`, with the rows that this process has.
    """
    cut = cut_parameters(model)
    pieces: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, value in {**model.state_dict(), **moments}.items():
        parameter = cut.get(_parameter(name))
        rows = value.to_local() if isinstance(value, DTensor) else value
        shared = parameter is not None and rows.ndim == parameter.ndim
        if (rank and not shared) or (shared and not rows.numel()):
            continue
        pieces[name] = rows
        offsets[name] = {"saved_offsets": [0] * rows.ndim}
        if shared and parameter is not None:
            offsets[name]["saved_offsets"][0] = first_row(parameter)
    return pieces, {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}


def read(
    folder: Path, model: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: DTensors with this process's rows where the model is cut up, else whole.

    wanted: of a name, whether it is read. Every process may call it without the others.
    """
    reader = HuggingFaceStorageReader(str(folder))
    cut = cut_parameters(model)
    tensors: dict[str, Tensor] = {}
    for name, described in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(described, TensorStorageMetadata)
        parameter = cut.get(_parameter(name))
        if not wanted(name):
            continue
        if parameter is not None and described.size == parameter.shape:
            tensors[name] = of_rows(torch.empty_like(parameter.to_local(), device="cpu"), parameter)
        else:
            tensors[name] = torch.empty(described.size, dtype=described.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loading in one process
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def is_moment(name: str) -> bool:
    """Whether a tensor of a checkpoint is the optimiser's, and not the model's."""
    return "/" in name


def _parameter(name: str) -> str:
    """The parameter that a tensor is, or whose moment it is."""
    return name.rpartition("/")[0] if is_moment(name) else name
