"""What a person meets on the first day: files that are not fine, folders given twice, a Hub out of reach."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kit.runs import TINY_INPUTS, Config, with_vit
from threetowers import cli
from threetowers.compare.runs import _Schedule, make_job
from threetowers.config import CompareConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.export.open_clip import export_open_clip
from threetowers.run import setup
from threetowers.run.setup import describe_data, open_data
from threetowers.towers import hub
from threetowers.towers.frozen.load import load_frozen
from threetowers.train import loop
from threetowers.train.loop import train


@pytest.fixture
def own(photos: Path, tmp_path: Path) -> Path:
    """A copy of the folder of photos."""
    shutil.copytree(photos.parent, tmp_path / "own")
    return tmp_path / "own"


def test_a_run_is_not_written_among_the_photos(own: Path, photos: Path, tiny_config: Config) -> None:
    before = sorted(own.iterdir())
    with pytest.raises(UsageError, match=r"this folder holds data \(.* and more\); give another one"):
        train(tiny_config(steps=2), own)
    assert sorted(path for path in own.iterdir() if path.name != ".lock") == before


def test_an_export_is_not_written_among_the_photos_but_again_over_itself(
    own: Path, tiny_config: Config, tmp_path: Path
) -> None:
    train(tiny_config(steps=2), tmp_path / "run")
    before = sorted(own.iterdir())
    with pytest.raises(UsageError, match="this folder holds data"):
        export_open_clip(tmp_path / "run", own)
    assert sorted(own.iterdir()) == before
    folder = export_open_clip(tmp_path / "run", tmp_path / "exported")
    shutil.copyfile(own / "000.png", folder / "000.png")  # of a model card, for example
    export_open_clip(tmp_path / "run", folder)


def test_files_that_are_missing_are_named_before_training(own: Path, tiny_config: Config) -> None:
    config = tiny_config(
        data=str(own / "captions.csv"),
        inputs=replace(TINY_INPUTS, max_bad_share=1.0, test_fraction=0.0, val_fraction=0.0),
    )
    (own / "050.png").unlink()
    said = describe_data(config)
    assert ", 1 problem (missing file: 1)\n" in said and "  050.png: missing file (captions.csv:52: " in said
    for number in range(4):
        (own / f"00{number}.png").unlink()
    setup._open_splits.cache_clear()
    said = describe_data(config)
    assert ", 5 problems (missing file: 5)\n" in said and said.count(".png: missing file") == 3
    assert "  and 2 more\n" in said


def test_missing_files_of_the_test_part_are_named_too(own: Path, tiny_config: Config) -> None:
    config = tiny_config(data=str(own / "captions.csv"), inputs=replace(TINY_INPUTS, max_bad_share=1.0))
    *_, test = open_data(config)
    (own / test.record(0).id).unlink()
    setup._open_splits.cache_clear()
    said = describe_data(config)
    assert "/test: 1 problem (missing file: 1)\n" in said and test.record(0).id in said


def test_validate_decodes_every_image_of_a_small_folder(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (3, 77):
        (own / f"0{number:02d}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", "tiny", "--data", str(own / "captions.csv"), "--method", "baseline"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "images: 96 of 96 decoded" in said and "2 bad (2.1%)" in said
    assert "003.png: not an image" in said and "077.png: not an image" in said


def test_training_says_what_it_could_not_use_and_that_it_was_finished(
    own: Path, timm_tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "003.png").write_bytes(b"no picture")
    words = ["train", "tiny", "--data", str(own / "captions.csv"), "--third", timm_tower]
    words += [
        "--steps",
        "8",
        "--inputs.val-fraction",
        "0",
        "--inputs.test-fraction",
        "0.2",
        "--inputs.max-bad-share",
        "0.5",
    ]
    said = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--out", str(tmp_path / "run")])
        assert ended.value.code == 0
        said.append(capsys.readouterr())
    assert "samples could not be embedded" in said[0].err
    assert "bad_samples.jsonl names them and says why" in said[0].err
    assert "was finished before" not in said[0].out
    assert "this run was finished before; --fresh True trains it again" in said[1].out


def test_few_test_images_are_said(tiny_config: Config) -> None:
    assert "test images tell only large differences apart" in describe_data(tiny_config())


def test_help_may_be_read_in_part() -> None:
    """`threetowers compare --help | head -1` ends without a complaint."""
    program = "from threetowers.cli import main; main(['compare', 'tiny', '--help'])"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def lookup(host: str, *rest: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        load_frozen("timm:test_vit")
    assert time.monotonic() - start < 20  # the Hub's own tries take a minute
    assert "cannot be reached" in str(raised.value) and "timm:NAME@FILE or timm:local-dir:DIR" in str(
        raised.value
    )
    assert asked and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("config", "form"), [({"architecture": "x"}, "timm:local-dir:"), ({"model_type": "vit"}, "hf:"), ({}, "")]
)
def test_a_folder_given_as_a_tower_is_told_its_form(
    config: dict[str, str], form: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError) as raised:
        load_frozen(str(tmp_path))
    assert (f"is a folder; write {form}{tmp_path}" in str(raised.value)) == bool(form)
    with pytest.raises(UsageError, match="is a folder; write timm:local-dir:"):
        load_frozen(f"timm:{tmp_path}")


def test_a_comparison_says_how_many_runs_there_are(tiny_config: Config, tmp_path: Path) -> None:
    def plan(options: CompareConfig) -> str:
        config = tiny_config(method="baseline")
        keys, thirds = [("baseline", ""), ("lit", "third")], {"third": "timm:x"}
        make = partial(make_job, config, thirds, out=tmp_path)
        return _Schedule(keys, options, make).plan()

    assert plan(CompareConfig(lrs=(1e-3, 2e-3, 4e-3), seeds=(0, 1, 2))) == (
        "10 runs: 2 methods, each with 3 learning rates with the first seed, then 2 more at the best one"
    )
    assert (
        plan(CompareConfig(lrs=(1e-3,), seeds=(0, 1)))
        == "4 runs: 2 methods, each with one learning rate, 2 seeds"
    )
    assert (
        plan(CompareConfig(lrs=(1e-3, 2e-3), seeds=(0,)))
        == "4 runs: 2 methods, each with 2 learning rates, one seed"
    )


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code, *capsys.readouterr()


def test_validate_is_short_where_all_is_well_and_tells_more_on_request(
    own: Path, timm_tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", "tiny", "--data", str(own), "--third", timm_tower]
    words += ["--inputs.caption-columns", "caption_0"]
    code, short, _ = answer(words, capsys)
    assert code == 0 and len([line for line in short.splitlines() if "note: " not in line]) <= 10, short
    for part in (
        "images in column `path`",
        "images to train on",
        "96 of 96 decoded",
        "1.0 per image",
        "needs: about",
    ):
        assert part in short
    assert short.endswith("\nvalid\n")
    code, long, _ = answer([*words, "--details", "True"], capsys)
    assert code == 0 and len(long.splitlines()) > 20
    for part in (
        "are cut at",
        "are training captions too",
        "head txt@third",
        "trains: ",
        "step: loss",
        "disk: ",
    ):
        assert part in long and part not in short


def test_what_is_not_well_is_shown_without_asking(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (own / "captions.csv").read_text(encoding="utf-8").splitlines()
    rows[1:] = [f"{row.split(',')[0]},a square,{'a very ' * 30}long text" for row in rows[1:]]
    (own / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    _, said, _ = answer(["validate", "tiny", "--data", str(own), "--method", "baseline"], capsys)
    assert "50.0% are cut at the context length, 100.0% occur more than once" in said
    assert "test captions: 100.0% are equal to one of another image" in said
    assert "test captions: 100.0% are training captions too" in said


def without_torch(words: list[str]) -> str:
    """What a command answers to a mistake in a process of its own, which may not have imported torch by then."""
    program = (
        f"import sys\nfrom threetowers.cli import main\ntry:\n    main({words!r})\n"
        "except SystemExit as ended:\n    assert ended.code in (2, 3), ended.code\n"
        "assert 'torch' not in sys.modules, 'torch is there'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


RUN = ["tiny", "--third", "timm:resnet18", "--data"]
STORE = ["--tower", "timm:resnet18", "--out", "store", "--data"]


@pytest.mark.parametrize(
    "words", [["validate", *RUN], ["train", *RUN], ["compare", *RUN], ["advise", *RUN], ["embed", *STORE]]
)
def test_wrong_columns_are_refused_before_torch_is_imported(own: Path, words: list[str]) -> None:
    """Of a folder with a table, by a name that is given and by a header that is not recognised."""
    flag = "--caption-columns" if words[0] == "embed" else "--inputs.caption-columns"
    said = without_torch([*words, str(own), flag, "nope"])
    assert "captions.csv: there is no column `nope`. Its columns: path, caption_0, caption_1" in said
    rows = [f"{number},{number * number}" for number in range(30)]
    (own / "captions.csv").write_text("\n".join(["a,b", *rows]), encoding="utf-8")
    said = without_torch([*words, str(own)])
    assert "captions.csv: no column holds paths of images. Name it as image_column. Its columns: a, b" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", *RUN[:-1]], "data: say what to train on"),
        (["train", *RUN, "pohtos"], "pohtos: there is no such file or folder"),
        (["train", *RUN, "photos", "--steps", "0"], "steps: 0 is out of range"),
    ],
)
def test_other_first_mistakes_are_refused_before_torch_is_imported(words: list[str], says: str) -> None:
    assert says in without_torch(words)


@pytest.mark.parametrize(
    ("flag", "given", "better"),
    [
        ("--methods", "baseline,3t", "baseline 3t"),
        ("--seeds", "0,1", "0 1"),
        ("--lrs", "1e-3,", "1e-3"),
        ("--optim.betas", "0.9,0.98", "0.9 0.98"),
        ("--objective.weights", "1,1,1", "1 1 1"),
    ],
)
def test_commas_between_values_are_told_to_be_spaces(
    flag: str, given: str, better: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([flag, given], [f"{flag}={given}"]):
        code, _, said = answer(["compare", "tiny", *words], capsys)
        assert code == 2 and said.endswith(f"several values are separated by spaces: {flag} {better}\n")


def test_commas_between_columns_are_told_to_be_spaces(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "tiny", "--data", str(own), "--inputs.caption-columns", "caption_0,caption_1"]
    words += ["--method", "baseline"]
    code, _, said = answer(words, capsys)
    assert code == 2 and "separated by spaces: caption_0 caption_1" in said


def test_an_export_says_in_short_sentences_what_to_know(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(with_vit(tiny_config(steps=1, method="baseline")), tmp_path / "run")
    for form in ("open_clip", "transformers", "onnx"):
        capsys.readouterr()
        out = str(tmp_path / form)
        code, said, notes = answer(["export", str(tmp_path / "run"), "--to", form, "--out", out], capsys)
        assert code == 0 and said.startswith(
            f"written to {out}, where README.md shows its use. Load it with "
        )
        card = Path(out, "README.md").read_text(encoding="utf-8")
        for line in notes.splitlines():
            kind, _, text = line.partition(": ")
            assert kind in ("note", "checked") and max(map(len, text.split(". "))) < 120, line
            if kind == "note":
                assert text.endswith(".") and f"- {text}\n" in card and len(text) < 220, line
        assert notes.count("note: ") >= 1


@pytest.mark.parametrize(
    ("changes", "minutes", "says"),
    [
        ({}, 0.0, r"4/4 steps, [\d.]+/s, in \d+ s · loss .*"),
        ({}, 1e-9, r"1/4 steps, [\d.]+/s, \d+ s left"),
        (
            {"eval_every_steps": 1, "keep_best": "val/mean_r@1", "patience": 1},
            0.0,
            r"2/2 steps, [\d.]+/s, in \d+ s · ended early: no better val/mean_r@1 in 1 validations",
        ),
    ],
)
def test_a_short_run_off_a_terminal_tells_steps_rate_and_time(
    changes: dict[str, Any], minutes: float, says: str, tiny_config: Config, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also one that is stopped, or that ends because it does not get better."""
    monkeypatch.setattr(loop, "validate", lambda *_: {"val/mean_r@1": 0.5})
    config = tiny_config(steps=4, log_every_steps=100, method="baseline", **changes)
    train(config, tmp_path / "run", max_minutes=minutes)
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training baseline: ")]
    assert len(shown) == 1 and re.fullmatch(f"training baseline: {says}", shown[0]), shown
