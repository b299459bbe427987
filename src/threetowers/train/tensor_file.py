"""A safetensors file written and hashed in one pass, without copies and without filling the page cache.

With the library's `save_file` the hash takes a second reading, and a checkpoint of gigabytes stays in the page cache,
where it displaces images that the run will read again. The library's `load_file` reads what is written here.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from threetowers.errors import CheckpointError
from threetowers.files import pack_header, tensor_entries

CHUNK = 32 << 20  # bytes in the page cache at most

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes contiguous tensors in host memory; returns the file's size and SHA-256 as they should be.

    metadata: for the header, texts by name.

    The last of it may still be on its way to the disk: the caller syncs. Raises OSError when the disk refuses, and
    CheckpointError for a dtype that the format does not have (https://github.com/huggingface/safetensors, Format).
    """
    names = sorted(
        tensors, key=lambda name: (-tensors[name].itemsize, name)
    )  # wide ones first keeps all aligned
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        pending = 0
        for block in (_header(names, tensors, metadata), *(_bytes(tensors[name]) for name in names)):
            for start in range(0, len(block), CHUNK):
                chunk = block[start : start + CHUNK]
                digest.update(chunk)
                file.write(chunk)
                size, pending = size + len(chunk), pending + len(chunk)
                if pending >= CHUNK:
                    _to_disk(file)
                    pending = 0
    return {"size": size, "sha256": digest.hexdigest()}


def _header(
    names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> memoryview:
    """The length of the header in 8 bytes, and its JSON, padded so that the tensors begin at a multiple of 8."""
    described = {}
    for name in names:
        value = tensors[name]
        if value.dtype not in DTYPES:
            raise CheckpointError(f"{name}: {value.dtype} cannot be saved; convert it to float32")
        described[name] = (DTYPES[value.dtype], list(value.shape), value.nbytes)
    entries, _ = tensor_entries(described)
    header = {"__metadata__": dict(metadata), **entries} if metadata else entries
    return memoryview(pack_header(json.dumps(header, separators=(",", ":"), ensure_ascii=False)))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _to_disk(file: IO[bytes]) -> None:
    """Waits for the disk and gives the memory of what it has back."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
