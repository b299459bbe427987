"""The command line: precedence, refusals on one screen, exit codes."""

from pathlib import Path

import pytest

from threetowers import cli
from threetowers.commands.arguments import TrainArguments, run_arguments
from threetowers.recipes import PRESETS
from threetowers.settings import read_config, replace_nested


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def parsed(words: list[str]) -> TrainArguments:
    return run_arguments(TrainArguments, words, "train")[1]


def test_flags_come_before_the_file_and_the_file_before_its_preset(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('preset = "tiny"\nsteps = 7\nbatch_size = 9\n[optim]\nlr = 0.5\n')
    arguments = parsed([str(tmp_path / "run.toml"), "--batch-size", "5", "--optim.weight-decay", "0.3"])
    expected = replace_nested(
        PRESETS["tiny"](), {"steps": 7, "batch_size": 5, "optim": {"lr": 0.5, "weight_decay": 0.3}}
    )
    assert arguments.run == expected, (
        "one nested flag leaves its siblings as the file and the preset have them"
    )


def test_a_named_model_brings_its_own_towers(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('preset = "tiny"\n[pair]\nmodel = "ViT-B-32"\ntext = {layers = 2}\n')
    for words in (["tiny", "--pair.model", "ViT-B-32"], [str(tmp_path / "run.toml")]):
        pair = parsed(words).run.pair
        assert (pair.model, pair.vision) == ("ViT-B-32", {})
        assert pair.text == ({} if words[0] == "tiny" else {"layers": 2})
    assert parsed(["tiny", "--steps", "3"]).run.pair == PRESETS["tiny"]().pair
    assert parsed(["vit-b-32", "--pair.model", "ViT-B-16"]).run.pair.model == "ViT-B-16"


def test_everyday_flags() -> None:
    words = [
        "tiny",
        "--data",
        "x.csv",
        "--third",
        "timm:a",
        "--method",
        "lit",
        "--steps",
        "3",
        "--seed",
        "4",
        "--out",
        "o",
    ]
    arguments = parsed(words)
    config = arguments.run
    assert (config.data, config.third, config.method, config.steps, config.seed) == (
        "x.csv",
        ("timm:a",),
        "lit",
        3,
        4,
    )
    assert arguments.out == Path("o")
    assert parsed(["tiny", "--third", "none"]).run.thirds() == {}


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["trian"], 2, ["did you mean `train`"]),
        (["train"], 2, ["preset", "tiny"]),
        (["train", "tinny"], 2, ["did you mean `tiny`"]),
        (["train", "nowhere.toml"], 2, ["nowhere.toml", "no such file"]),
        (["train", "tiny", "--stepz", "3"], 2, ["--stepz"]),
        (["train", "tiny", "--steps", "many"], 2, ["steps"]),
        (["train", "tiny", "--method", "clip"], 2, ["clip"]),
        (["train", "tiny", "--method", "baseline"], 2, ["--data"]),
        (["train", "tiny", "--data", "/nowhere.csv", "--method", "baseline"], 3, ["/nowhere.csv"]),
        (["train", "tiny", "--data", "x.csv"], 2, ["--third"]),
        (["train", "tiny", "--data", "x", "--third", "timm:a", "timm:b"], 2, ["NAME=SPEC"]),
        (["evaluate", "/nowhere"], 3, ["model.json"]),
        (["export", "/nowhere", "--to", "onnnx", "--out", "x"], 2, ["onnnx", "did you mean `onnx`"]),
        (["compare", "tiny", "--data", "."], 2, ["--third"]),
    ],
)
def test_mistakes_are_one_screen_with_the_remedy_and_the_right_exit_code(
    words: list[str], code: int, parts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    got, out, err = run(words, capsys)
    assert got == code, err
    for part in parts:
        assert part in out + err
    assert "Traceback" not in err and len((out + err).splitlines()) < 25


def test_train_evaluate_export_from_the_command_line(
    photos: Path,
    timm_tower: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "train",
        "tiny",
        "--data",
        str(photos),
        "--third",
        timm_tower,
        "--steps",
        "3",
        "--batch-size",
        "16",
    ]
    words += ["--inputs.val-fraction", "0.2", "--inputs.test-fraction", "0.2"]
    code, out, err = run(words, capsys)
    assert code == 0, err
    assert "α" in out and "retrieval on" in out
    (folder,) = (tmp_path / "runs").glob("tiny-*")
    assert read_config(folder / "config.toml").steps == 3
    assert "training 3t: 3/3 steps" in err
    code, out, err = run(["train", *words[1:]], capsys)
    assert code == 0 and "training" not in err, "a finished run is not trained again"
    code, out, _ = run(["evaluate", str(folder), "--data", str(photos)], capsys)
    assert code == 0 and "retrieval on 96 test images" in out
    code, out, _ = run(["export", str(folder), "--out", str(tmp_path / "e")], capsys)
    assert code == 0 and "local-dir:" in out and (tmp_path / "e" / "open_clip_config.json").is_file()
