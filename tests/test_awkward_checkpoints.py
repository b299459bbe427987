"""Checkpoints as trainers write them: what is beside the weights, around them, and before their names."""

import argparse
import collections
import contextlib
import datetime
import os
import pathlib
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.checkpoints import Settings, own_class
from threetowers.commands.convert import INERT, convert
from threetowers.errors import CheckpointError, UsageError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}


def assert_weights(path: Path) -> None:
    read = load_file(path)
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


BESIDE: dict[str, Any] = {
    "namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("runs/a"), seeds=[1, 2]),
    "simple namespace": types.SimpleNamespace(lr=0.1),
    "path": pathlib.Path("runs/a"),
    "windows path": pathlib.PureWindowsPath("runs/a"),
    "float64": np.float64(0.5),
    "int64": np.int64(3),
    "float32": np.float32(0.5),
    "bool": np.bool_(True),
    "text": np.str_("abc"),
    "array": np.arange(4),
    "random state": np.random.RandomState(0).get_state(),
    "counts by default": collections.defaultdict(int, {"a": 1}),
    "lists by default": collections.defaultdict(list, {"a": [np.float64(1)]}),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("abca"),
    "time": datetime.datetime(2025, 1, 2, 3, 4),
    "day": datetime.date(2025, 1, 2),
    "duration": datetime.timedelta(hours=2),
}


@pytest.mark.parametrize("name", BESIDE)
def test_plain_things_beside_weights_do_no_harm(name: str, tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "args": BESIDE[name], "best": [BESIDE[name]]}
    torch.save(content, tmp_path / "own.pt")
    done = convert(tmp_path / "own.pt", tmp_path / "own.safetensors")
    assert_weights(tmp_path / "own.safetensors")
    assert "weights taken from 'state_dict'" in done.text()


@pytest.mark.filterwarnings("error")
def test_another_pickle_protocol_is_refused_with_a_remedy(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS}, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"(?i)unsupported operand.*\n.*torch.load"):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors")


class Calls:
    """Asks to call a function with arguments when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._asked = function, arguments

    def __reduce__(self) -> Any:
        return self._asked


def hostile(marker: Path) -> dict[str, Any]:
    command = f"touch {marker}"
    return {
        "system": Calls(os.system, command),
        "eval": Calls(eval, f"__import__('os').system({command!r})"),
        "getattr": Calls(getattr, "", "join"),
        "in a namespace": argparse.Namespace(hook=Calls(os.system, command)),
        "in an array": np.array([Calls(os.system, command)], dtype=object),
        "as a default": collections.defaultdict(os.getcwd, {"a": 1}),
        "by import": Calls(__import__, "this"),
    }


@pytest.mark.parametrize("name", hostile(Path()))
def test_what_asks_to_run_code_is_refused_beside_plain_things(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for protocol in (2, 4):
        content = {"state_dict": WEIGHTS, "args": BESIDE["namespace"], "more": hostile(marker)[name]}
        torch.save(content, tmp_path / "evil.pt", pickle_protocol=protocol)
        with pytest.raises(CheckpointError, match="nothing in it was run"):
            convert(tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert not marker.exists() and not (tmp_path / "out.safetensors").exists()


def test_the_list_of_plain_things_is_short_and_known() -> None:
    """A class belongs there only when nobody can make it run code by what he puts into it."""
    names = {each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__name__}" for each in INERT}
    modules = {name.rpartition(".")[0] for name in names}
    assert modules <= {
        "argparse", "types", "collections", "builtins", "datetime", "pathlib", "pathlib._local", "numpy",
        "numpy.dtypes", "numpy._core.multiarray", "numpy.core.multiarray",
    }  # fmt: skip
    assert {name for name in names if name.startswith("builtins.")} == {
        "builtins.dict", "builtins.list", "builtins.int", "builtins.float",
    }  # fmt: skip


def test_whoever_wrote_a_file_with_a_class_of_his_own_is_told_how_to_write_it_anew(tmp_path: Path) -> None:
    own_class(tmp_path)
    with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
        convert(tmp_path / "own.pt", tmp_path / "own.safetensors")
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2 and "kit.checkpoints.Settings" in str(caught.value)
    with contextlib.chdir(tmp_path):
        exec("import torch\n" + "\n".join(line.strip() for line in lines), {"Settings": Settings})
    convert(tmp_path / "own-weights.pt", tmp_path / "own.safetensors")


NESTED: dict[str, tuple[dict[str, Any], str]] = {
    "averaged beside": ({"model": WEIGHTS, "model_ema": WEIGHTS}, "'model'; others are there: model_ema"),
    "averaged alone": ({"model_ema": {"module": WEIGHTS}, "epoch": 3}, "'module'"),
    "a tensor beside": ({"state_dict": WEIGHTS, "step": torch.tensor(3)}, "'state_dict'"),
    "an optimiser beside": ({"model": WEIGHTS, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}, "'model'"),
    "nest in nest": ({"model": {"state_dict": WEIGHTS}}, "'state_dict'"),
}


@pytest.mark.parametrize("name", NESTED)
def test_nests_of_weights_are_all_named(name: str, tmp_path: Path) -> None:
    content, words = NESTED[name]
    torch.save(content, tmp_path / "x.pt")
    assert f"weights taken from {words}" in convert(tmp_path / "x.pt", tmp_path / "x.safetensors").text()
    assert_weights(tmp_path / "x.safetensors")


def test_another_nest_is_taken_by_its_key(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in WEIGHTS.items()}
    torch.save({"state_dict": other, "model_ema": {"module": WEIGHTS}, "net": WEIGHTS}, tmp_path / "x.pt")
    for key in ("model_ema", "net"):
        convert(tmp_path / "x.pt", tmp_path / f"{key}.safetensors", key)
        assert_weights(tmp_path / f"{key}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'ema'.*: state_dict, model_ema, net; name one with --key state_dict"
    ):
        convert(tmp_path / "x.pt", tmp_path / "no.safetensors", "ema")
    torch.save({"net": WEIGHTS, "epoch": 3}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match=r"no tensors by name.*name one with --key net"):
        convert(tmp_path / "y.pt", tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "visual.trunk.", "module.model.", "_orig_mod.module."]
)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_what_stands_before_every_name_is_taken_off(prefix: str, ending: str, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": value for name, value in WEIGHTS.items()}
    path = tmp_path / f"in.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    assert "taken off every name" in convert(path, tmp_path / "out.safetensors").text()
    assert_weights(tmp_path / "out.safetensors")


def test_the_counter_of_an_average_does_not_keep_the_prefix_on(tmp_path: Path) -> None:
    state = {"n_averaged": torch.tensor(9), **{f"module.{name}": value for name, value in WEIGHTS.items()}}
    torch.save(state, tmp_path / "x.pt")
    assert "n_averaged" in convert(tmp_path / "x.pt", tmp_path / "x.safetensors").text()
    assert_weights(tmp_path / "x.safetensors")


def test_safetensors_without_a_prefix_are_left_alone(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "in.safetensors")
    with pytest.raises(UsageError, match=r"safetensors already.*module\., "):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_a_plain_pickle_with_numpy_numbers_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"best": np.float64(1)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"holds no tensors|cannot be read"):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
