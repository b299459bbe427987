"""The analysis of finished runs end to end, against plain computations, and its page."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kit.runs import TINY_INPUTS, TINY_PAIR, Config
from kit.towers import ByteTokenizer, byte_tower
from threetowers.compare import analysed_run
from threetowers.compare.analysis import analyse
from threetowers.config import OptimConfig, RunConfig
from threetowers.data.transforms import fixed_view
from threetowers.errors import CheckpointError, DataError, UsageError
from threetowers.evaluate.agreement import count
from threetowers.evaluate.evaluation import evaluate_run, open_labelled
from threetowers.evaluate.retrieval import ranks_from_features
from threetowers.evaluate.similarity import cka, effective_rank, modality_gap, neighbour_overlap, uniformity
from threetowers.evaluate.statistics import t_interval
from threetowers.evaluate.zero_shot import class_embeddings, label_ranks
from threetowers.objective.losses import unit
from threetowers.report.analysis import analysis_html, headline, read_analysis, write_analysis
from threetowers.report.analysis_plots import titles
from threetowers.report.examples import pictures
from threetowers.run import thirds as thirds_module
from threetowers.run.finished import load_run
from threetowers.run.setup import prepare
from threetowers.settings import read_config
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.weights import read_safetensors
from threetowers.train.loop import train
from threetowers.world.write import write_world

Analysis = dict[str, Any]
METHODS = {"baseline": ("baseline", 0), "lit": ("lit", 0), "3t": ("3t", 0), "3t-again": ("3t", 1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, timm_tower: str) -> dict[str, Path]:
    """Four short runs on a small built-in world, with their checkpoints; the last one is not evaluated."""
    place = tmp_path_factory.mktemp("analysis")
    world = place / "shapes"
    write_world(world, num_train=96, num_val=24, num_test=32, num_labelled=0)
    config = RunConfig(
        data=str(world), classes=str(world / "objects" / "test"), third=(f"mine={timm_tower}",), steps=6,
        batch_size=16, checkpoint_every_steps=3, keep_checkpoints=9, device="cpu", pair=TINY_PAIR,
        inputs=TINY_INPUTS, optim=OptimConfig(lr=3e-3, warmup_steps=2),
    )  # fmt: skip
    found = {}
    for name, (method, seed) in METHODS.items():
        found[name] = place / "runs" / name
        train(replace(config, method=method, seed=seed), found[name])  # type: ignore[arg-type]
        if name != "3t-again":
            evaluate_run(found[name])
    return found


@pytest.fixture(scope="module")
def out(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return analyse(list(folders.values()), tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def analysis(out: Path) -> Analysis:
    found: Analysis = json.loads((out / "analysis.json").read_text())
    return found


def run_of(analysis: Analysis, name: str) -> dict[str, Any]:
    return next(run for run in analysis["runs"] if run["name"] == name)


def pair_of(rows: list[dict[str, Any]], a: str, b: str) -> dict[str, Any]:
    return next(row for row in rows if (row["a"], row["b"]) == (a, b))


def stored(folder: Path, view: str) -> Tensor:
    """A view of the test pairs, read from the evaluation's file: each image with its first caption."""
    tensors = read_safetensors(folder / "features.safetensors")
    owner = tensors["test/text_image"].tolist()
    rows = [owner.index(image) for image in sorted(set(owner))]
    return tensors[f"test/{view}"][rows] if view.startswith("txt") else tensors[f"test/{view}"]


def test_views_are_compared_on_pairs_of_an_image_and_its_first_caption(
    folders: dict[str, Path], analysis: Analysis
) -> None:
    run = run_of(analysis, "3t")
    names = [row["view"] for row in run["views"]]
    third = "third_mine"
    assert names == ["img", "txt", f"img@{third}", f"{third}@img", f"txt@{third}", f"{third}@txt", third]
    assert len(run["similarity"]) == 21 and analysis["num_pairs"] == 32 and analysis["neighbours"] == 10
    x, y = stored(folders["3t"], "img"), stored(folders["3t"], f"txt@{third}")
    row = pair_of(run["similarity"], "img", f"txt@{third}")
    assert (row["cka_linear"], row["cka"]) == pytest.approx(cka(x, y))
    assert row["overlap"] == neighbour_overlap(x, y)
    img = next(row for row in run["views"] if row["view"] == "img")
    assert img["effective_rank"] == pytest.approx(effective_rank(x.double() - x.double().mean(0)))
    assert img["uniformity"] == pytest.approx(uniformity(x)) and img["width"] == 24
    rows = {(row["a"], row["b"]): row for row in run["rows"]}
    assert list(rows) == [("img", "txt"), (f"img@{third}", f"{third}@img"), (f"txt@{third}", f"{third}@txt")]
    assert rows["img", "txt"]["gap"] == pytest.approx(modality_gap(x, stored(folders["3t"], "txt")))
    assert [(found["a"], found["b"]) for found in run["maps"]] == list(rows)
    assert all(len(found["of_a"]) == len(found["of_b"]) == 32 for found in run["maps"])
    assert [row["view"] for row in run_of(analysis, "baseline")["views"]] == ["img", "txt"]
    assert [row["view"] for row in run_of(analysis, "lit")["views"]] == ["img", "txt", third]


def test_every_run_is_compared_with_the_frozen_tower(folders: dict[str, Path], analysis: Analysis) -> None:
    folder = folders["3t"]
    setup = prepare(read_config(folder / "config.toml"), folder, saved_tokenizer=folder)
    index = read_safetensors(folder / "features.safetensors")["test/index"].numpy()
    frozen = unit(setup.thirds.stores(setup.test)["third_mine"].rows(index))
    compared = {row["run"]: row for row in analysis["references"]}
    assert set(compared) == set(METHODS)
    for name, row in compared.items():
        assert row["reference"] == "mine"
        for view in ("img", "txt"):
            expected = cka(stored(folders[name], view), frozen)
            assert row[f"{view}-reference"]["cka"] == pytest.approx(expected.debiased, abs=1e-6)
    assert compared["lit"]["img-reference"]["overlap"] > compared["baseline"]["img-reference"]["overlap"]
    figures = {(row["label"], row["pair"], row["metric"]): row for row in analysis["methods"]}
    both = figures["3T (mine)", "img-txt", "cka"]
    mean, low, high = t_interval([compared[name]["img-txt"]["cka"] for name in ("3t", "3t-again")])
    assert (both["num"], both["mean"], both["low"], both["high"]) == pytest.approx((2, mean, low, high))
    one = figures["LiT (mine)", "txt-reference", "overlap"]
    assert (one["num"], one["low"]) == (1, None)


def test_agreement_is_that_of_the_ranks_and_of_the_chosen_combination(
    folders: dict[str, Path], analysis: Analysis
) -> None:
    tensors = read_safetensors(folders["3t"] / "features.safetensors")
    evaluation = json.loads((folders["3t"] / "evaluation.json").read_text())
    answers = tensors["test/text_image"], tensors["test/text_group"]
    main = ranks_from_features(tensors["test/img"], tensors["test/txt"], *answers)
    side = ranks_from_features(tensors["test/third_mine@txt"], tensors["test/txt@third_mine"], *answers)
    run = run_of(analysis, "3t")
    for place, direction in enumerate(("i2t", "t2i")):
        row = next(row for row in run["agreement"] if row["direction"] == direction)
        counts = count(main.hits()[place], side.hits()[place])
        assert [row[name] for name in counts._fields] == list(counts)
        assert row["tower"] == "mine" and row["alpha"] == evaluation["combination"]["third_mine"]["alpha"]
    combined = np.mean([row["accuracy"]["combined"] for row in run["agreement"]])
    assert combined == pytest.approx(evaluation["combination"]["third_mine"]["chosen"])
    assert run_of(analysis, "lit")["agreement"] == [] == run_of(analysis, "baseline")["agreement"]
    for example in run["examples"]:
        wrong = "tower" if example["right"] == "main" else "main"
        assert example["answers"][example["right"]]["rank"] == 1 < example["answers"][wrong]["rank"]
        assert example["answers"][wrong]["text"] not in example["captions"]


def test_classes_are_those_of_the_heads(
    folders: dict[str, Path], analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, third = folders["3t"], "third_mine"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    rows = run_of(analysis, "3t")["classes"]
    num = sum(row[each] for row in rows for each in ("both", "first", "second", "neither"))
    right = sum(row["both"] + row["first"] for row in rows)
    assert num == 32 and right / num == pytest.approx(evaluation["zero_shot"]["top1"])

    # what is classified, against the finished run's own towers and head weights
    compared: list[tuple[Tensor, ...]] = []

    def watched(*given: Tensor) -> Tensor:
        compared.append(given)
        return label_ranks(*given)

    monkeypatch.setattr(analysed_run, "label_ranks", watched)
    again = json.loads((analyse([folder], tmp_path) / "analysis.json").read_text())["runs"][0]
    ((image, classes, labels),) = compared
    run = load_run(folder)
    setup = prepare(read_config(folder / "config.toml"), folder, saved_tokenizer=folder)
    labelled = open_labelled(setup.config)
    assert labelled is not None
    features = setup.thirds.stores(labelled)[third].rows(np.arange(len(labelled)))

    def texts(prompts: list[str]) -> Tensor:
        vectors: Tensor = run.txt(run.tokenizer(prompts))
        return vectors @ run.heads[f"txt@{third}"].T

    with torch.no_grad():
        prompts = class_embeddings(texts, labelled.class_names, labelled.templates or ())
    torch.testing.assert_close(classes, prompts, rtol=0, atol=1e-5)
    torch.testing.assert_close(image, unit(features @ run.heads[f"{third}@txt"].T), rtol=0, atol=1e-5)
    assert labels.tolist() == [labelled.record(i).label for i in range(len(labelled))]
    hits = int((label_ranks(image, classes, labels) < 1).sum())
    assert sum(row["both"] + row["second"] for row in rows) == hits and again["classes"] == rows


def test_the_last_checkpoint_is_the_finished_run(folders: dict[str, Path], analysis: Analysis) -> None:
    for name in METHODS:
        run = run_of(analysis, name)
        moments = run["checkpoints"]
        assert [moment["step"] for moment in moments] == [0, 3, 6] or name != "3t"
        evaluation = json.loads((folders[name] / "evaluation.json").read_text())
        last = moments[-1]
        assert last["step"] == 6 and last["mean_r@1"] == evaluation["test"]["mean_r@1"]
        for row in last["similarity"]:
            assert row["cka"] == pytest.approx(
                pair_of(run["similarity"], row["a"], row["b"])["cka"], abs=1e-5
            )
        views = {row["view"]: row["effective_rank"] for row in run["views"]}
        assert last["effective_rank"] == pytest.approx(
            {view: views[view] for view in ("img", "txt")}, rel=1e-4
        )
        assert moments[0]["similarity"][0]["cka"] != pytest.approx(last["similarity"][0]["cka"], abs=1e-3)


def test_runs_are_compared_with_each_other(folders: dict[str, Path], analysis: Analysis) -> None:
    assert len(analysis["between"]) == 6
    row = pair_of(analysis["between"], "lit", "3t")
    assert row["txt"]["cka"] == pytest.approx(
        cka(stored(folders["lit"], "txt"), stored(folders["3t"], "txt")).debiased
    )
    hits = []
    for name in ("lit", "3t"):
        tensors = read_safetensors(folders[name] / "features.safetensors")
        answers = tensors["test/text_image"], tensors["test/text_group"]
        hits.append(ranks_from_features(tensors["test/img"], tensors["test/txt"], *answers).hits())
    kappas = [kappa for a, b in zip(*hits, strict=True) if (kappa := count(a, b).kappa()) is not None]
    assert row["kappa"] == pytest.approx(np.mean(kappas))


def test_there_is_no_correlation_of_two_runs(analysis: Analysis) -> None:
    assert analysis["prediction"]["least"] == 3
    assert len(analysis["prediction"]["points"]) <= 2 and analysis["prediction"]["correlations"] == []


def with_points(analysis: Analysis, num: int) -> Analysis:
    """The analysis with so many runs that have a combination, whose gain follows one measure exactly."""
    points = [
        {
            "run": "3t", "method": "3t", "label": "3T (mine)", "tower": "mine", "kappa": 0.9 - 0.1 * i, "cka": 0.5,
            "rescued": 0.1 * i, "gain": {"mean": 0.02 * i, "low": 0.02 * i - 0.01, "high": 0.02 * i + 0.01, "num": 9},
            "gain_over_better": 0.01 * i,
        }
        for i in range(num)
    ]  # fmt: skip
    return analysis | {"prediction": {"least": 3, "points": points, "correlations": []}}


def only(analysis: Analysis, name: str, /, **changes: Any) -> Analysis:
    """The analysis as one of a single run, with changes of the run."""
    run = run_of(analysis, name)
    methods = [row for row in analysis["methods"] if row["method"] == run["method"]]
    return with_points(analysis | {"runs": [run | changes], "between": [], "methods": methods}, 0)


def test_the_page_stands_alone(out: Path) -> None:
    page = write_analysis(out)
    text = page.read_text()
    assert page.name == "analysis.html"
    assert not re.search(r"https?://(?!www\.w3\.org)", text) and "<script" not in text
    for heading in ("Do the towers agree", "Over the steps", "Between the runs", "The views of each run"):
        assert heading in text
    what, certainty = headline(read_analysis(out))
    assert re.fullmatch(
        r"CKA of image and text towers: \S+ in 3T \(mine\), \S+ in the baseline, \S+ in LiT\.", what
    )
    assert certainty.startswith("CKA of image and frozen towers: ") and "one run only" in certainty
    assert text.index(">baseline<") < text.index(">LiT (mine)<") < text.index(">3T (mine)<")
    assert "data:image/png;base64," in text


def test_the_page_needs_no_torch_and_is_the_same_each_time(analysis: Analysis, tmp_path: Path) -> None:
    (tmp_path / "analysis.json").write_text(json.dumps(only(analysis, "baseline", checkpoints=[])))
    text = write_analysis(tmp_path).read_text()
    program = (
        "import sys, pathlib; from threetowers.report.analysis import write_analysis\n"
        f"write_analysis(pathlib.Path({str(tmp_path)!r}))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert (tmp_path / "analysis.html").read_text() == text


def test_runs_are_called_by_method_then_seed_then_folder() -> None:
    given = [
        ("a", "baseline", 0),
        ("b", "3T", 0),
        ("c", "3T", 1),
        ("d", "LiT", 2),
        ("e", "LiT", 2),
        ("f", "LiT", 3),
    ]
    runs = [{"name": name, "label": label, "seed": seed} for name, label, seed in given]
    assert list(titles({"runs": runs}).values()) == [
        "baseline",
        "3T, seed 0",
        "3T, seed 1",
        "d",
        "e",
        "LiT, seed 3",
    ]


def test_sections_without_content_are_left_out(out: Path, analysis: Analysis) -> None:
    alone = only(analysis, "baseline", agreement=[], classes=[], examples=[], checkpoints=[])
    text = analysis_html(alone, pictures(out))
    for heading in (
        "Who is right",
        "predict the gain",
        "tell them apart",
        "Over the steps",
        "Between the runs",
    ):
        assert heading not in text
    assert "The views of each run" in text and "CKA of image and text towers" in text


def test_unknown_figures_are_dashes(out: Path, analysis: Analysis) -> None:
    run = json.loads(json.dumps(run_of(analysis, "3t")))
    for row in run["similarity"]:
        row |= {"cka": None, "cka_linear": None}
    for row in run["views"]:
        row |= {"effective_rank": None, "uniformity": None}
    for row in run["agreement"]:
        row |= {"kappa": None, "rescued": None, "alpha": None}
        for name in ("gain", "gain_over_better", "kept"):
            row.pop(name, None)
        row["accuracy"].pop("combined", None)
    for moment in run["checkpoints"]:
        moment["effective_rank"] = {"img": None, "txt": None}
    unknown = only(analysis, "3t", **{**run, "maps": []}) | {"methods": []}
    text = analysis_html(unknown, pictures(out))
    assert text.count("–") > 20 and "nothing to compare" in text
    assert "effective rank of img" not in text and "right when combined" not in text


def test_captions_are_text_and_never_markup(out: Path, analysis: Analysis, tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> a \"red\" & 'small' \ud800 <b>circle</b>"
    answers = {"main": {"text": nasty, "rank": 1}, "tower": {"text": nasty, "rank": 1234}}
    example = {
        "tower": nasty,
        "right": "main",
        "image": "../x.png",
        "captions": [nasty, nasty],
        "answers": answers,
    }
    row = {"tower": nasty, "class": nasty, "both": 1, "first": 2, "second": 0, "neither": 1}
    changes = {"examples": [example], "classes": [row], "label": nasty, "name": nasty, "checkpoints": []}
    changed = only(analysis, "3t", **changes) | {"title": nasty}
    (tmp_path / "analysis.json").write_text(json.dumps(changed))
    text = write_analysis(tmp_path).read_text()
    assert "<script" not in text and "<b>circle" not in text and "&lt;b&gt;circle" in text
    assert "right caption at rank 1,234" in text and "image missing" in text


def test_points_are_drawn_from_three_runs_on(out: Path, analysis: Analysis) -> None:
    alone = only(analysis, "3t", agreement=[], classes=[], examples=[], checkpoints=[], maps=[])
    few = analysis_html(with_points(alone, 2), pictures(out))
    assert "2 runs with a frozen tower, and at least 3 are needed" in few and "gain-0" not in few
    many = with_points(alone, 4)
    row = {"measure": "rescued", "gain": "gain", "r": -0.25, "low": -0.9, "high": 0.8, "num": 4}
    many["prediction"]["correlations"] = [row]
    text = analysis_html(many, pictures(out))
    assert "there are 4" in text and "gain-0" in text and "−0.25" in text and "−0.90 to +0.80" in text


def test_an_analysis_that_cannot_be_read_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"analysis\.json: cannot be read .*`threetowers analyse` again"):
        write_analysis(tmp_path)
    (tmp_path / "analysis.json").write_text('{"schema": 99}')
    with pytest.raises(DataError, match="schema is 99"):
        write_analysis(tmp_path)


def test_runs_that_cannot_be_compared_are_refused(
    folders: dict[str, Path], tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="at least one finished run"):
        analyse([], tmp_path)
    with pytest.raises(UsageError, match="is given twice"):
        analyse([folders["3t"], folders["3t"] / ".." / "3t"], tmp_path)
    other = tmp_path / "other"
    train(tiny_config(method="baseline", third=(), steps=1), other)
    with pytest.raises(
        DataError, match=r"other and 3t were trained with different test data \(15 and 32 images\)"
    ):
        analyse([folders["3t"], other], tmp_path / "out")
    (other / "model.json").unlink()
    with pytest.raises(CheckpointError, match="the run is not finished"):
        analyse([other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def copied(
    folder: Path, place: Path, change: Callable[[dict[str, Any]], None] = lambda described: None
) -> Path:
    """A copy of a run with its stores, and with changes in model.json."""
    shutil.copytree(folder, place / "runs" / folder.name)
    shutil.copytree(folder.parent / "embeddings", place / "runs" / "embeddings")
    path = place / "runs" / folder.name / "model.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return path.parent


def test_a_run_whose_data_or_tower_has_changed_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def another_tower(described: dict[str, Any]) -> None:
        described["thirds"][0]["fingerprint"] = "another"

    def other_data(described: dict[str, Any]) -> None:
        described["data"]["val"]["images"] = 99

    with pytest.raises(CheckpointError, match=r"third tower timm:.* not what this run was trained with"):
        analyse([copied(folders["3t"], tmp_path / "a", another_tower)], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"val \(99 → 24 images\): not what this run"):
        analyse([copied(folders["3t"], tmp_path / "b", other_data)], tmp_path / "out")


def test_a_damaged_checkpoint_is_left_out_and_few_pairs_are_drawn(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(folders["3t"], tmp_path)
    (folder / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(analysed_run, "PAIRS", 8)
    found = json.loads((analyse([folder], tmp_path / "out") / "analysis.json").read_text())
    assert [moment["step"] for moment in found["runs"][0]["checkpoints"]] == [0, 6]
    assert "step-00000003" in capsys.readouterr().err
    assert (found["num_pairs"], found["num_images"], found["neighbours"]) == (8, 32, 7)
    assert found["between"] == [] and found["title"] == "What the towers of 3t know"
    assert (
        sum(found["runs"][0]["agreement"][0][each] for each in ("both", "first", "second", "neither")) == 32
    )


def test_too_few_test_images_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysed_run, "PAIRS", 3)
    with pytest.raises(DataError, match="3 captioned test images; at least 4"):
        analyse([folders["baseline"]], tmp_path)


def test_a_third_tower_of_texts_is_analysed(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thirds_module, "load_frozen", byte_tower)
    words = tmp_path / "words"
    train(tiny_config(third=("hf-text:tiny",), steps=2), words)
    found = json.loads((analyse([words], tmp_path / "out") / "analysis.json").read_text())
    run = found["runs"][0]
    assert run["label"] == "3T (tiny)" and run["towers"][0]["reads"] == "texts" and run["classes"] == []
    setup = prepare(read_config(words / "config.toml"), words, saved_tokenizer=words)
    captions = [setup.test.record(i).captions[0] for i in range(len(setup.test))]
    frozen = unit(byte_tower()(ByteTokenizer()(captions)))
    expected = cka(stored(words, "txt"), frozen).debiased
    assert pair_of(run["similarity"], "txt", "third")["cka"] == pytest.approx(expected, abs=1e-3)


def test_a_regression_is_analysed_without_the_images_that_cannot_be_read(
    tiny_config: Config, photos: Path, tmp_path: Path
) -> None:
    files = sorted(photos.parent.glob("*.png"))[:32]
    parts = ["train"] * 16 + ["val"] * 4 + ["test"] * 12
    lines = [f"{file},picture {i},{part}" for i, (file, part) in enumerate(zip(files, parts, strict=True))]
    shutil.copy(files[20], tmp_path / "damaged.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "damaged.png").read_bytes()[:60])
    lines[20] = f"{tmp_path / 'damaged.png'},picture 20,test"
    (tmp_path / "captions.csv").write_text("\n".join(["path,caption,split", *lines]))
    config = tiny_config(method="3t-regression", data=str(tmp_path / "captions.csv"), steps=1)
    folder = tmp_path / "run"
    train(replace(config, inputs=replace(config.inputs, max_bad_share=0.5)), folder)
    found = json.loads((analyse([folder], tmp_path / "out") / "analysis.json").read_text())
    assert found["num_images"] == found["num_pairs"] == 11
    run = found["runs"][0]
    assert [row["b"] for row in run["rows"]] == ["txt", "third", "third"] and run["agreement"] == []
    assert "Who is right" not in write_analysis(tmp_path / "out").read_text()
    tower = load_frozen(config.third[0])
    assert tower.reads == "images"
    views = [torch.from_numpy(fixed_view(Image.open(file), tower.image).copy()) for file in files[21:]]
    frozen = unit(tower(torch.stack(views)))
    expected = cka(stored(folder, "img"), frozen).debiased
    assert pair_of(run["similarity"], "img", "third")["cka"] == pytest.approx(expected, abs=1e-3)
