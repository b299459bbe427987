"""The file of tensors that checkpoints are made of, against the safetensors library's own."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from threetowers.errors import CheckpointError
from threetowers.train import tensor_file
from threetowers.train.tensor_file import DTYPES, write_tensors

SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(SHAPES, st.sampled_from(sorted(DTYPES, key=str))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.integers(1, 40))
def test_it_is_the_librarys_file_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[list[int], torch.dtype]], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    tensors = {name: (torch.randn(shape) * 50).to(dtype) for name, (shape, dtype) in wanted.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "CHUNK", chunk)
        written = write_tensors(folder / "ours", tensors)
    content = (folder / "ours").read_bytes()
    assert written == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    save_file(tensors, folder / "library")
    ours, library = load_file(folder / "ours"), load_file(folder / "library")
    assert ours.keys() == library.keys() == tensors.keys()
    for name, value in library.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
        assert torch.equal(_bits(ours[name]), _bits(value))
    assert int.from_bytes(content[:8], "little") % 8 == 0, "the tensors begin at a multiple of 8"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"phase: torch.complex64 cannot be saved; convert it to float32"
    ):
        write_tensors(tmp_path / "x", {"phase": torch.zeros(2, dtype=torch.complex64)})
