"""The comparison end to end on small real files."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.runs import Config
from kit.towers import byte_tower
from threetowers.compare import runs as compare_module
from threetowers.compare import showcase
from threetowers.compare.comparison import compare
from threetowers.compare.showcase import ThirdChecks, third_checks
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError, NonFiniteError, UsageError
from threetowers.report.page import write_report
from threetowers.report.tables import ranking
from threetowers.report.terminal import how_to_export, text_table
from threetowers.run import thirds as thirds_module
from threetowers.train.loop import train
from threetowers.world.write import write_world

OPTIONS = CompareConfig(methods=("baseline", "lit", "3t"), seeds=(0, 1), lrs=(1e-3, 3e-3))


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "shapes"
    write_world(folder, num_train=160, num_val=24, num_test=32, num_labelled=96)
    return folder


def prepared(tiny_config: Config, world: Path, tower: str) -> RunConfig:
    config = tiny_config(
        data=str(world), classes=str(world / "objects" / "test"), third=(f"mine={tower}",), steps=3
    )
    return replace(config, embeddings=None)


def test_a_comparison_trains_all_continues_and_repeats_nothing(
    tiny_config: Config, small_world: Path, timm_tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = prepared(tiny_config, small_world, timm_tower)
    trained: list[str] = []
    limit = 3

    def counted(job_config: RunConfig, folder: Path, **options: Any) -> Any:
        if len(trained) == limit:
            raise KeyboardInterrupt
        trained.append(folder.name)
        return train(job_config, folder, **options)

    monkeypatch.setattr(compare_module, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(config, OPTIONS, tmp_path)
    limit = 1000
    result = compare(config, OPTIONS, tmp_path)
    assert result is not None
    assert len(trained) == len(set(trained)) == 3 * (2 + 1), (
        "two learning rates with the first seed, one more seed"
    )
    said = capsys.readouterr().out
    tests = re.findall(r"^  retrieval on \d+ test images", said, re.MULTILINE)
    assert said.count("  validation mean_r@1 ") == 6 and len(tests) == 3, "trials show no test figures"
    again = compare(config, OPTIONS, tmp_path)
    assert again is not None and again["results"] == result["results"] and len(trained) == 9

    written = json.loads((tmp_path / "compare.json").read_text())
    assert {(m["method"], m["third"]) for m in written["methods"]} == {
        ("baseline", ""),
        ("lit", "mine"),
        ("3t", "mine"),
    }
    for method in written["methods"]:
        assert set(method["lr_trials"]) == {"0.001", "0.003"}
        assert method["lr_trials"][f"{method['lr']:g}"] == max(method["lr_trials"].values())
    flags = {m["method"]: m["third_at_inference"] for m in written["methods"]}
    assert flags == {"baseline": False, "lit": True, "3t": False}
    params = {m["method"]: m["trainable_params"] for m in written["methods"]}
    assert params["lit"] < params["baseline"] < params["3t"]
    keys = {(r["method"], r["seed"], f"{r['task']}/{r['metric']}") for r in written["results"]}
    assert ("3t", 1, "combination/mean_r@1") in keys and ("lit", 0, "zero_shot/top1") in keys
    for row in written["combination"]:
        assert row["ends"]["main"] == row["test"][0] and row["ends"]["third"] == row["test"][-1]
        assert row["chosen"] == row["test"][row["alphas"].index(row["alpha"])]
        assert row["control"]["test"][0] == row["references"]["baseline"]
    exact = [claim for claim in written["claims"] if claim["details"].get("runs")]
    assert [(claim["id"], claim["verdict"], claim["details"]["runs"]) for claim in exact] == [
        ("C4", "held", "2 of 2"),
        ("C6", "held", "2 of 2"),
        ("C6", "held", "2 of 2"),
    ], "both seeds are checked"
    assert next(claim for claim in written["claims"] if claim["id"] == "C5")["verdict"] == "not tested"
    assert "No winner can be named yet" in text_table(written) and "--steps" in text_table(written)
    words = how_to_export(written, tmp_path).split("threetowers export ")[1].split()
    assert (Path(words[0]) / "model.safetensors").is_file() and words[1:3] == ["--to", "open_clip"]
    assert "seed0-lr" in words[0] and Path(words[0]).name.startswith(f"{ranking(written)[0][0]}-")
    for example in written["examples"]:
        for answer in example["answers"]:
            assert len(answer["items"]) == 5
            assert all(
                item["image"] is None or (tmp_path / item["image"]).is_file() for item in answer["items"]
            )
    (third,) = written["thirds"]
    assert third["name"] == "mine" and third["width"] > 0 and third["image"]["size"] == 48
    assert third["pretrained"] is None and third["num_parameters"] > 1e5
    page = write_report(tmp_path)
    assert page.is_file() and "http://" not in page.read_text().replace("http://www.w3.org", "")
    assert "reads images of 48 × 48 pixels" in page.read_text()


def test_a_trial_that_diverges_counts_as_0_and_ends_nothing(
    tiny_config: Config, small_world: Path, timm_tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(tiny_config, small_world, timm_tower)
    too_high = {3e-3}

    def breaks(job_config: RunConfig, folder: Path, **options: Any) -> Any:
        if job_config.optim.lr in too_high:
            folder.mkdir(parents=True, exist_ok=True)
            raise NonFiniteError("the loss is not finite")
        return train(job_config, folder, **options)

    monkeypatch.setattr(compare_module, "train", breaks)
    options = replace(OPTIONS, methods=("baseline", "lit"))
    result = compare(config, options, tmp_path)
    assert result is not None
    for method in result["methods"]:
        assert method["lr"] == 1e-3 and method["lr_trials"]["0.003"] == 0
    assert "the lowest was best for baseline, LiT (mine)" in " ".join(text_table(result).split())
    monkeypatch.setattr(compare_module, "train", None)
    assert compare(config, options, tmp_path) is not None, "what diverged is not tried again"
    monkeypatch.setattr(compare_module, "train", breaks)
    too_high.add(1e-3)
    with pytest.raises(
        NonFiniteError, match=r"baseline: .* any of the learning rates 0\.001, 0\.003; give lower"
    ):
        compare(config, options, tmp_path / "other")
    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        compare(config, replace(options, lrs=(3e-3,)), tmp_path / "third")


def test_comparisons_that_cannot_be_run_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--third"):
        compare(tiny_config(third=()), OPTIONS, tmp_path)
    with pytest.raises(UsageError, match="--seeds names one twice"):
        compare(tiny_config(), replace(OPTIONS, seeds=(0, 0)), tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        compare(tiny_config(third=("timm:local-dir:/nowhere",)), OPTIONS, tmp_path)
    assert not (tmp_path / "runs").exists(), "nothing was trained before the tower was looked at"
    with pytest.raises(UsageError, match="--margin 2 is a share"):
        compare(tiny_config(), replace(OPTIONS, margin=2.0), tmp_path)
    with pytest.raises(UsageError, match="at least one"):
        compare(tiny_config(), replace(OPTIONS, lrs=()), tmp_path)


def test_runs_of_other_settings_in_the_same_folder_are_refused(
    tiny_config: Config, small_world: Path, timm_tower: str, tmp_path: Path
) -> None:
    config = prepared(tiny_config, small_world, timm_tower)
    options = CompareConfig(methods=("baseline",), lrs=(1e-3,))
    compare(config, options, tmp_path)
    with pytest.raises(CheckpointError, match=r"steps: 3 → 4"):
        compare(replace(config, steps=4), options, tmp_path)


def test_a_run_is_checked_for_a_third_tower_that_training_touched(
    tiny_config: Config, small_world: Path, timm_tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(prepared(tiny_config, small_world, timm_tower), run)
    described = json.loads((run / "model.json").read_text())

    def checked(**third: Any) -> ThirdChecks:
        thirds = [described["thirds"][0] | third]
        (run / "model.json").write_text(json.dumps(described | {"thirds": thirds}))
        return third_checks(run)

    assert described["thirds"][0]["had_gradient"] is False
    assert checked() == (True, True)
    assert checked(fingerprint="another") == (True, False)
    assert checked(had_gradient=True) == (True, False)
    del described["thirds"][0]["had_gradient"]
    assert checked() == (True, True), "a run of an earlier version"
    monkeypatch.setattr(showcase, "restore_trained", lambda model, folder: None)
    assert checked() == (False, True), "other weights beside the third tower than without it"


def test_a_third_tower_of_texts_is_compared_by_its_own_sides_and_refused_for_lit(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thirds_module, "load_frozen", byte_tower)
    monkeypatch.setattr(compare_module, "load_frozen", byte_tower)
    config = tiny_config(third=("words=hf-text:tiny",), steps=3, embeddings=None)
    with pytest.raises(UsageError, match=r"image tower of lit .* reads texts"):
        compare(config, replace(OPTIONS, seeds=(0,), lrs=(1e-3,)), tmp_path)
    options = replace(OPTIONS, methods=("baseline", "3t"), seeds=(0,), lrs=(1e-3,))
    result = compare(config, options, tmp_path)
    assert result is not None
    (row,) = result["combination"]
    folder = tmp_path / "runs" / "3t-words-seed0-lr0.001"
    stored = json.loads((folder / "evaluation.json").read_text())["combination"]["third"]
    assert row["ends"] == {"main": stored["ends"][0], "third": stored["ends"][1]}
    ends = next(claim for claim in result["claims"] if claim["text"].startswith("The combination's ends"))
    assert ends["verdict"] == "held" and ends["details"] == {"runs": "1 of 1"}
