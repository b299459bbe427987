"""The comparison end to end on small real files, and the claims on figures that are known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.runs import Config
from kit.towers import byte_tower
from threetowers.compare import runs as compare_module
from threetowers.compare.claims import Measured, claims
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.retrieval import Ranks
from threetowers.report.page import write_report
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
    tiny_config: Config, small_world: Path, timm_tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    by_id = {(c["id"], c["text"][:20]): c for c in written["claims"]}
    assert next(c for key, c in by_id.items() if key[0] == "C6")["held"] is True
    assert next(c for key, c in by_id.items() if key[0] == "C5")["held"] is None
    for example in written["examples"]:
        for answer in example["answers"]:
            assert len(answer["items"]) == 5
            assert all(
                item["image"] is None or (tmp_path / item["image"]).is_file() for item in answer["items"]
            )
    page = write_report(tmp_path)
    assert page.is_file() and "http://" not in page.read_text().replace("http://www.w3.org", "")


def test_comparisons_that_cannot_be_run_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--third"):
        compare(tiny_config(third=()), OPTIONS, tmp_path)
    with pytest.raises(UsageError, match="--seeds names one twice"):
        compare(tiny_config(), replace(OPTIONS, seeds=(0, 0)), tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        compare(tiny_config(third=("timm:local-dir:/nowhere",)), OPTIONS, tmp_path)
    assert not (tmp_path / "runs").exists(), "nothing was trained before the tower was looked at"
    with pytest.raises(UsageError, match="at least one"):
        compare(tiny_config(), replace(OPTIONS, lrs=()), tmp_path)


def measured(value: float, **more: float) -> Measured:
    metrics = {f"retrieval/{name}": value for name in ("i2t_r@1", "t2i_r@1", "mean_r@1")}
    ids = torch.arange(100)
    rank = (ids >= round(100 * value)).long()
    ranks = {"main": Ranks(rank, rank, ids, ids)}
    for name, other in more.items():
        metrics[f"{name}/mean_r@1"] = other
        rank = (ids >= round(100 * other)).long()
        ranks[name] = Ranks(rank, rank, ids, ids)
    return Measured(metrics, ranks, 0.4)


def figures(
    base: float, lit: float, three: float, noise: float = 0.01, seeds: int = 3
) -> dict[tuple[str, str], Any]:
    steps = [noise * (seed - 1) for seed in range(seeds)]
    rest = {"combination": three + 0.1, "third": lit, "control": three + 0.02}
    return {
        ("baseline", ""): {s: measured(base + e) for s, e in enumerate(steps)},
        ("lit", "t"): {s: measured(lit + e) for s, e in enumerate(steps)},
        ("3t", "t"): {s: measured(three + 2 * e, **rest) for s, e in enumerate(steps)},
    }


def held(rows: list[dict[str, Any]], id: str) -> list[bool | None]:
    return [row["held"] for row in rows if row["id"] == id]


def test_claims_hold_exactly_when_every_interval_excludes_zero() -> None:
    rows = claims(figures(0.3, 0.35, 0.6), ["t"], True, True)
    assert held(rows, "C1") == [True, True] and held(rows, "C4") == [True, True]
    assert held(rows, "C2") == [None], "no classification was measured"
    rows = claims(figures(0.3, 0.62, 0.6), ["t"], True, True)
    assert held(rows, "C1") == [True, False]
    rows = claims(figures(0.3, 0.58, 0.6, noise=0.05), ["t"], True, True)
    assert held(rows, "C1") == [True, False], "a mean above is not enough"
    assert held(claims(figures(0.3, 0.35, 0.6), ["t"], False, True), "C4")[0] is False, "ends must be equal"
    assert held(rows, "C6") == [True] and held(claims({}, ["t"], True, None), "C6") == [None]


def test_the_mismatched_tower_has_its_own_claims() -> None:
    runs = {(m, "mismatched" if t else ""): v for (m, t), v in figures(0.4, 0.2, 0.41).items()}
    rows = claims(runs, ["mismatched"], True, True)
    assert held(rows, "C3") == [True, True] and held(rows, "C1") == []
    runs = {(m, "mismatched" if t else ""): v for (m, t), v in figures(0.4, 0.5, 0.3).items()}
    assert held(claims(runs, ["mismatched"], True, True), "C3") == [False, False]


def test_one_seed_is_said_and_uses_the_queries() -> None:
    rows = claims(figures(0.2, 0.3, 0.7, seeds=1), ["t"], True, True)
    assert held(rows, "C1") == [True, True]
    assert {row["note"] for row in rows if row["id"] == "C1"} == {"one seed"}


def test_missing_methods_are_not_tested_rather_than_guessed() -> None:
    runs = {key: value for key, value in figures(0.3, 0.35, 0.6).items() if key[0] != "lit"}
    rows = claims(runs, ["t"], True, True)
    assert held(rows, "C1") == [True, None]


def test_runs_of_other_settings_in_the_same_folder_are_refused(
    tiny_config: Config, small_world: Path, timm_tower: str, tmp_path: Path
) -> None:
    config = prepared(tiny_config, small_world, timm_tower)
    options = CompareConfig(methods=("baseline",), lrs=(1e-3,))
    compare(config, options, tmp_path)
    with pytest.raises(CheckpointError, match=r"steps: 3 → 4"):
        compare(replace(config, steps=4), options, tmp_path)


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
    assert (
        next(c for c in result["claims"] if c["id"] == "C4")["figures"]["ends equal the two systems"]
        == "True"
    )
