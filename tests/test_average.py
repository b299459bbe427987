"""Averages of runs' weights are runs, and only runs that fit each other are averaged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.runs import Config, assert_same_weights, weights, with_vit
from threetowers import cli
from threetowers.config import StartConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.export.open_clip import export_open_clip
from threetowers.files import digest_file
from threetowers.run.average import average_runs
from threetowers.run.finished import load_run
from threetowers.settings import read_config
from threetowers.towers.weights import write_safetensors
from threetowers.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("module")


@pytest.fixture
def runs(folder: Path, tiny_config: Config) -> tuple[Path, Path]:
    """Two runs of 3T from the same start, of different lengths."""
    for name, steps in (("a", 2), ("b", 4)):
        if not (folder / name).exists():
            train(tiny_config(steps=steps), folder / name)
    return folder / "a", folder / "b"


def test_every_weight_is_the_weighted_sum(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = average_runs(runs, (0.25, 0.75), tmp_path / "out")
    first, second, found = weights(runs[0]), weights(runs[1]), weights(out)
    assert found.keys() == first.keys() and {"img", "txt", "heads", "third_norms", "log_scale"} <= {
        key.partition(".")[0] for key in found
    }
    for key, value in found.items():
        expected = 0.25 * first[key].double() + 0.75 * second[key].double()
        assert value.dtype == first[key].dtype
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=0, atol=1e-7)
    assert any(not torch.equal(first[key], second[key]) for key in found)
    described = json.loads((out / "model.json").read_text(encoding="utf-8"))
    assert [(each["run"], each["weight"]) for each in described["averaged"]] == [
        (str(runs[0]), 0.25),
        (str(runs[1]), 0.75),
    ]


def test_an_average_is_a_run_that_is_evaluated_and_exported(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = average_runs(runs, (), tmp_path / "out")
    assert read_config(out / "config.toml") == read_config(runs[0] / "config.toml")
    assert evaluate_run(out).sections["test"]
    export_open_clip(out, tmp_path / "exported")
    texts = ["a red square", ""]
    between = load_run(out).encode_text(texts)
    assert not torch.allclose(between, load_run(runs[0]).encode_text(texts), atol=1e-6)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_the_ends_are_the_runs_themselves(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert_same_weights(average_runs(runs, (1.0, 0.0), tmp_path / "first"), runs[0])
    assert_same_weights(average_runs(runs, (0.0, 1.0), tmp_path / "second"), runs[1])
    assert_same_weights(average_runs((runs[0],) * 3, (), tmp_path / "thrice"), runs[0])


def test_a_start_and_what_was_tuned_from_it_are_averaged(tiny_config: Config, tmp_path: Path) -> None:
    config = with_vit(tiny_config(method="baseline", third=(), steps=2))
    train(config, tmp_path / "start")
    start = StartConfig(image=f"file:{tmp_path / 'start'}", text=f"file:{tmp_path / 'start'}")
    train(replace(config, start=start), tmp_path / "tuned")
    out = average_runs([tmp_path / "start", tmp_path / "tuned"], (0.5, 0.5), tmp_path / "out")
    assert load_run(out).encode_text(["a"]).shape == (1, 24)


def test_counts_are_those_of_the_first_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """BatchNorm counts batches in an integer."""
    changed = []
    for index, run in enumerate(runs):
        shutil.copytree(run, tmp_path / run.name)
        state = weights(run) | {"img.count": torch.tensor([3 + index])}
        changed.append(rewritten(tmp_path / run.name, state))
    found = weights(average_runs(changed, (0.5, 0.5), tmp_path / "out"))
    assert found["img.count"].tolist() == [3] and found["img.count"].dtype == torch.int64


def rewritten(run: Path, state: dict[str, torch.Tensor]) -> Path:
    """The run with other weights, and a model.json that knows them."""
    write_safetensors(run / "model.safetensors", state)
    described = json.loads((run / "model.json").read_text(encoding="utf-8"))
    described["sha256"] = digest_file(run / "model.safetensors")
    (run / "model.json").write_text(json.dumps(described), encoding="utf-8")
    return run


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "network": (
        {"pair": {"text": {"context_length": 16, "width": 32, "heads": 4, "layers": 1}}},
        "the networks",
    ),
    "method": (
        {"method": "baseline", "third": ()},
        "the objective, and with it the heads and the third towers",
    ),
    "vocabulary": ({"pair": {"vocab_size": 310}}, "the networks"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_runs_that_do_not_fit_are_refused_with_what_differs(
    name: str, runs: tuple[Path, Path], tiny_config: Config, tmp_path: Path
) -> None:
    changes, differs = OTHERS[name]
    config = tiny_config(steps=1)
    changes = changes | ({"pair": replace(config.pair, **changes["pair"])} if "pair" in changes else {})
    train(replace(config, **changes), tmp_path / "other")
    with pytest.raises(UsageError, match=f"other: cannot be averaged with .*a, because {differs} differ"):
        average_runs([runs[0], tmp_path / "other"], (), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("what", ["tokenizer", "preprocessing", "shapes", "damaged", "unfinished"])
def test_what_model_json_or_the_files_show_is_refused(
    what: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    expected: tuple[type[Exception], str] = (UsageError, "the tokenizer differ")
    if what == "tokenizer":
        rules = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
        rules["model"]["merges"] = rules["model"]["merges"][:-1]
        (other / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    elif what == "preprocessing":
        described = json.loads((other / "model.json").read_text(encoding="utf-8"))
        described["image"]["mean"][0] = 0.1
        (other / "model.json").write_text(json.dumps(described), encoding="utf-8")
        expected = UsageError, "the preprocessing of images differ"
    elif what == "shapes":
        rewritten(other, weights(other) | {"more": torch.ones(1)})
        expected = CheckpointError, "other names or shapes"
    elif what == "damaged":
        write_safetensors(other / "model.safetensors", weights(runs[0]))
        expected = CheckpointError, "SHA-256 differs"
    else:
        (other / "model.json").unlink()
        expected = CheckpointError, r"model\.json"
    with pytest.raises(expected[0], match=expected[1]):
        average_runs([runs[0], other], (), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1.0,), "1 for 2 runs"),
        ((0.5, 0.6), "sum 1; it is 1.1"),
        ((-0.5, 1.5), "at least 0"),
        ((float("nan"), 1.0), "sum"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    given: tuple[float, ...], message: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        average_runs(runs, given, tmp_path / "out")


def test_one_run_and_a_folder_that_holds_something_are_refused(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="at least two"):
        average_runs(runs[:1], (), tmp_path / "out")
    with pytest.raises(UsageError, match="something is there already"):
        average_runs(runs, (), runs[0])


def test_runs_of_different_seeds_are_averaged_with_a_warning(
    runs: tuple[Path, Path], tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(method="baseline", third=(), steps=1, seed=1), tmp_path / "one")
    train(tiny_config(method="baseline", third=(), steps=1, seed=1), tmp_path / "same")
    shutil.copy(tmp_path / "one" / "tokenizer.json", tmp_path / "same" / "tokenizer.json")
    average_runs([tmp_path / "one", tmp_path / "same"], (), tmp_path / "quiet")
    assert "different seeds" not in capsys.readouterr().err
    config = tmp_path / "same" / "config.toml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("\nseed = 1\n", "\nseed = 2\n"), encoding="utf-8"
    )
    average_runs([tmp_path / "one", tmp_path / "same"], (), tmp_path / "out")
    assert "different seeds" in capsys.readouterr().err


def test_a_third_tower_that_has_moved_is_the_same(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    described = json.loads((other / "model.json").read_text(encoding="utf-8"))
    described["thirds"][0]["spec"] = "timm:local-dir:elsewhere"
    (other / "model.json").write_text(json.dumps(described), encoding="utf-8")
    average_runs([runs[0], other], (), tmp_path / "out")
    described["thirds"][0]["fingerprint"] = "another"
    (other / "model.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(UsageError, match="the third towers differ"):
        average_runs([runs[0], other], (), tmp_path / "second")


def test_the_command_line(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        cli.main(["average", *map(str, runs), "--weights", "0.25", "0.75", "--out", str(out)])
    assert not stop.value.code and str(out) in capsys.readouterr().out
    assert_same_weights(out, average_runs(runs, (0.25, 0.75), tmp_path / "again"))
