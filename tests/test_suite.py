"""Suites: how they are read, what is measured and kept, and the tables that are made of it."""

import csv
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kit.features import KnownFeatures
from kit.pictures import picture
from threetowers.config import RunConfig
from threetowers.data.choices import UNREADABLE
from threetowers.data.open import open_source
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.encode import Encoded
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.evaluate.retrieval import ranks_from_features, ranks_of, recalls
from threetowers.evaluate.suite.features import Features, Part, StoredFeatures, TowerFeatures, captioned
from threetowers.evaluate.suite.on_pairs import chance_of_retrieval, retrieval, robustness, zero_shot
from threetowers.evaluate.suite.rows import averages, read_rows, write_tables
from threetowers.evaluate.suite.run import evaluate_suite, fitting_tasks
from threetowers.evaluate.suite.sets import DataSet, OpenSet, open_set, read_suite
from threetowers.evaluate.suite.target import open_target
from threetowers.evaluate.suite.tasks import TASKS
from threetowers.train.loop import train

ROW = {
    "model": "m", "model_digest": "d", "data": "a", "data_digest": "e", "task": "zero_shot", "metric": "top1",
    "value": 0.5, "n": 10, "low": 0.4, "high": 0.6, "chance": 0.1, "templates": None, "preprocessing": "", 
    "seconds": 1.0, "metrics": {"top1": 0.5}, "group": "g", "details": {}, "schema": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in three parts: 4 classes with 6 training, 3 validation and 5 test images each."""
    folder = tmp_path_factory.mktemp("classes")
    for part, count in (("train", 6), ("val", 3), ("test", 5)):
        for label, name in enumerate(("blue", "green", "red", "white")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([label, index, count]).integers(0, 99, (36, 36, 3))
                pixels[..., label % 3] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{index}.png")
    return folder


@pytest.fixture
def finished(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    train(tiny_config(steps=2), tmp_path / "run")
    return tmp_path / "run"


def suite_file(folder: Path, text: str) -> str:
    (folder / "suite.toml").write_text(text, encoding="utf-8")
    return str(folder / "suite.toml")


def opened(path: Path | str, **settings: Any) -> OpenSet:
    return open_set(DataSet("set", str(path), **settings))


def known(knowledge: float) -> Features:
    return KnownFeatures(knowledge)


def test_a_suite_is_read_with_its_paths_beside_the_file(tmp_path: Path) -> None:
    path = suite_file(
        tmp_path,
        '[[data]]\nname = "digits"\npath = "sets/digits"\ntasks = ["zero_shot"]\ntemplates = ["the {}."]\n'
        '[[data]]\nname = "world/a"\npath = "shapes/objects/test"\ntrain = "../x"\nchance = 1\n',
    )
    first, second = read_suite(path)
    assert first == DataSet(
        "digits", str(tmp_path / "sets/digits"), tasks=("zero_shot",), templates=("the {}.",)
    )
    assert second == DataSet("world/a", "shapes/objects/test", train=str(tmp_path / "../x"), chance=1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[data]]\nname = "a"\npth = "b"', r"data\[1\]\.pth: no such key; did you mean `path`\?"),
        ('[[data]]\nname = "a"', r"data\[1\]\.path is missing"),
        ('[data]\nname = "a"', r"write \[\[data\]\]"),
        ('name = "a"', "unknown key 'name'"),
        ('[[data]]\nname = "a"\npath = 3', r"data\[1\]\.path: expected str"),
        (
            '[[data]]\nname = "a"\npath = "b"\n[[data]]\nname = "a"\npath = "c"',
            "two data sets are called 'a'",
        ),
        ('[[data]]\nname = "../a"\npath = "b"', "cannot name a data set"),
        ("[[data]", "not a TOML file"),
    ],
)
def test_mistakes_in_a_suite_are_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_suite(suite_file(tmp_path, text))
    assert "suite.toml" in str(caught.value)


def test_unknown_tasks_and_metrics_are_named_before_anything_is_computed(
    classes: Path, tmp_path: Path
) -> None:
    for settings, said in (
        ({"tasks": ("zeroshot",)}, "no task 'zeroshot'; did you mean `zero_shot`"),
        ({"metric": "top1"}, "name it alone in tasks"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate_suite("nowhere", [DataSet("set", str(classes), **settings)], tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_data_comp_lists_and_folders_of_clip_benchmark_are_suites(tmp_path: Path) -> None:
    for name in ("wds_vtab-caltech101_test", "wds_cifar10_test", "wds_retrieval-flickr30k_test"):
        (tmp_path / name).mkdir()
    (tmp_path / "tasklist.yml").write_text(
        "vtab/caltech101:\n  name: Caltech-101\n  main_metric: mean_per_class_recall\n  random_score: 0.009804\n"
        "  tags:\n    - vtab_natural\ncifar10:\n  name: CIFAR-10\n  tags: []\n"
        "retrieval/flickr30k:\n  main_metric: mean_recall@1\n  tags: [retrieval]\nnot/here:\n  name: x\n"
    )
    assert read_suite(str(tmp_path / "tasklist.yml")) == [
        DataSet(
            "vtab/caltech101", str(tmp_path / "wds_vtab-caltech101_test"), tasks=("zero_shot",),
            metric="mean_per_class", chance=0.009804, group="vtab_natural",
        ),
        DataSet("cifar10", str(tmp_path / "wds_cifar10_test"), tasks=("zero_shot",), metric="top1"),
        DataSet(
            "retrieval/flickr30k", str(tmp_path / "wds_retrieval-flickr30k_test"), tasks=("retrieval",),
            metric="mean_r@1", group="retrieval",
        ),
    ]  # fmt: skip
    assert [each.name for each in read_suite(str(tmp_path))] == [
        "cifar10",
        "retrieval/flickr30k",
        "vtab/caltech101",
    ]
    (tmp_path / "tasklist.yml").write_text("a: [1")
    with pytest.raises(UsageError, match=r"tasklist\.yml: not a YAML file"):
        read_suite(str(tmp_path / "tasklist.yml"))


def test_a_folder_of_clip_benchmark_has_its_parts_classes_and_templates(tmp_path: Path) -> None:
    folder = tmp_path / "wds_two_test"
    for part, count in (("train", 6), ("test", 4)):
        (folder / part).mkdir(parents=True)
        with tarfile.open(folder / part / "0.tar", "w") as tar:
            for index in range(count):
                for ending, data in (("png", picture(index)), ("cls", str(index % 2).encode())):
                    member = tarfile.TarInfo(f"s{index:04d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
        (folder / part / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    (described,) = read_suite(str(tmp_path))
    found = open_set(described)
    assert (found.classes, found.templates) == (("cat", "dog"), ("a photo of a {}.",))
    assert (len(found.test.source), found.train and len(found.train.source)) == (4, 6)
    shutil.rmtree(folder / "train")
    alone = open_set(described)
    assert (alone.classes, len(alone.test.source), alone.train) == (("cat", "dog"), 4, None)


def test_a_set_without_validation_images_gives_a_tenth_of_its_training_images(classes: Path) -> None:
    whole = opened(classes)
    assert whole.fitted_on() == (whole.train, whole.val)
    alone = opened(classes / "test", train=str(classes / "train"))
    train_part, val_part = alone.fitted_on()
    ids = [{part.source.record(i).id for i in range(len(part.source))} for part in (train_part, val_part)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 24 and ids[1]


def test_sets_that_do_not_fit_together_are_refused(classes: Path, photos: Path) -> None:
    with pytest.raises(UsageError, match="3 classes are named, and the data has 4"):
        opened(classes, classes=("a", "b", "c"))
    with pytest.raises(DataError, match="other classes"):
        opened(classes, train=str(photos))
    with pytest.raises(DataError, match=r"set: .*nowhere"):
        opened("nowhere")


def fitting(task: str, classes: Path, photos: Path) -> OpenSet:
    """A data set that the task can be measured on."""
    if task == "retrieval":
        return opened(photos)
    return opened(classes, outside=str(photos))


GUESSED = ("retrieval", "zero_shot", "few_shot", "linear_probe", "neighbours", "detection", "robustness")
"""The tasks with a level of chance, but for `composition`, which tests/test_composition.py is about."""


@pytest.mark.parametrize("task", GUESSED)
def test_oracles_score_one_and_guesses_score_chance(task: str, classes: Path, photos: Path) -> None:
    data = fitting(task, classes, photos)
    assert not TASKS[task].unfit(data, known(1.0).views)
    oracle, guess = (TASKS[task].measure(known(knowledge), data) for knowledge in (1.0, 0.0))
    metric = TASKS[task].metric
    assert oracle.metrics[metric] == pytest.approx(1.0) and oracle.chance is not None
    spread = (0.25 / oracle.num) ** 0.5
    assert guess.metrics[metric] == pytest.approx(oracle.chance, abs=4 * spread)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "composition"])
def test_hits_have_their_metric_as_mean(task: str, classes: Path, photos: Path) -> None:
    found = TASKS[task].measure(known(0.5), fitting(task, classes, photos))
    assert TASKS[task].metric in found.metrics
    assert (TASKS[task].metric in found.hits) == (task not in ("calibration", "detection")), (
        "it has an interval"
    )
    for metric, hits in found.hits.items():
        ways = hits if isinstance(hits, tuple) else (hits,)
        mean = np.mean([np.mean(np.asarray(way, dtype=float)) for way in ways])
        assert mean == pytest.approx(found.metrics[metric])
        interval = found.interval(metric)
        assert interval is not None and interval.low <= found.metrics[metric] <= interval.high
    assert json.loads(json.dumps(found.details)) == found.details, "plain values"


def test_frozen_towers_and_both_towers_together_are_measured_where_a_run_has_them(
    finished: Path, classes: Path, tmp_path: Path
) -> None:
    live = TowerFeatures(open_target(str(finished)), tmp_path / "cache")
    data = opened(classes)
    for task, metric in (("few_shot", "5_shot"), ("linear_probe", "top1"), ("neighbours", "top1")):
        metrics = TASKS[task].measure(live, data).metrics
        assert {metric, f"third/{metric}"} <= metrics.keys()
        assert (f"img+third/{metric}" in metrics) == (task != "neighbours")
    frozen = live.images(data.test, "third").features
    tower = live.target.thirds["third"]
    assert frozen.shape == (20, tower.width) and not torch.allclose(frozen.norm(dim=1), torch.ones(20))


def test_corruptions_are_measured_where_they_are_asked_for(
    finished: Path, classes: Path, tmp_path: Path
) -> None:
    live = TowerFeatures(open_target(str(finished)), tmp_path / "cache")
    assert "robustness" not in fitting_tasks(opened(classes), live.views)
    data = opened(classes, tasks=("robustness",))
    assert list(fitting_tasks(data, live.views)) == ["robustness"]
    found = robustness(live, data)
    assert found.metrics["clean"] == zero_shot(live, data).metrics["top1"]
    curves = found.details["curves"]
    assert {len(values) for values in curves.values()} == {5} and len(curves) == 6
    assert found.metrics["mean"] == pytest.approx(np.mean(list(curves.values())))


def test_choices_are_a_data_set_of_a_suite(finished: Path, tmp_path: Path) -> None:
    rows = {
        str(index): {
            "filename": f"{index}.png",
            "caption": f"a picture {index}",
            "negative_caption": "a text",
        }
        for index in range(5)
    }
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        (tmp_path / "pictures" / f"{index}.png").write_bytes(picture(index))
    (tmp_path / "pictures" / "4.png").write_bytes(b"no picture")
    (tmp_path / "swap_att.json").write_text(json.dumps(rows))
    described = DataSet(
        "words", str(tmp_path / "swap_att.json"), choices=True, images=str(tmp_path / "pictures")
    )
    (row,) = evaluate_suite(str(finished), [described], tmp_path / "out")
    assert (row.task, row.metric, row.n, row.chance) == ("composition", "accuracy", 4, 0.5)
    assert row.details["by_category"] == {"swap_att": {"accuracy": row.value}} and row.low is not None
    assert row.details["left_out"] == {UNREADABLE: 1}
    with pytest.raises(DataError, match=r"words: .*nowhere"):
        open_set(replace(described, path=str(tmp_path / "nowhere.json")))


def test_chance_of_retrieval_is_what_random_ranks_find() -> None:
    captions = ["a", "b", "a", "c", "c", "c", "d"]
    text_image = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    scores = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        views = {"img": torch.randn(5, 8, generator=generator), "txt": torch.randn(7, 8, generator=generator)}
        encoded = Encoded(views, text_image, torch.arange(5), captions)
        # equal texts have equal vectors and would tie: here each candidate is drawn alone
        scores.append(recalls(ranks_of(encoded))["mean_r@1"])
    assert chance_of_retrieval(encoded) == pytest.approx(np.mean(scores), abs=0.02)


def test_figures_of_a_run_are_those_of_its_own_evaluation(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    own = evaluate_run(finished, data=str(photos)).sections["test"]
    (row,) = evaluate_suite(str(finished), [DataSet("photos", str(photos))], tmp_path / "out")
    assert row.metrics == pytest.approx(own) and row.value == row.metrics["mean_r@1"]
    assert row.low is not None and row.low <= row.value <= (row.high or 0) and row.n == 96


def test_what_is_done_is_not_computed_again_and_parts_share_the_rest(
    finished: Path, photos: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [DataSet("photos", str(photos)), DataSet("classes", str(classes), tasks=("zero_shot",))]
    out = tmp_path / "out"
    assert {row.data for row in evaluate_suite(str(finished), sets, out, part=(1, 2))} == {"classes"}
    assert {row.data for row in evaluate_suite(str(finished), sets, out, part=(0, 2))} == {"photos"}
    before = {row.key(): row for row in read_rows(out)}

    def never(*arguments: Any) -> Any:
        raise AssertionError("computed again")

    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, replace(task, measure=never))
    assert {row.key(): row for row in evaluate_suite(str(finished), sets, out)} == before
    other = [DataSet("classes", str(classes), tasks=("zero_shot",), templates=("the colour {}",))]
    with pytest.raises(AssertionError, match="computed again"):
        evaluate_suite(str(finished), other, out)


def test_a_set_that_fails_does_not_end_the_others(
    finished: Path, photos: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [
        DataSet("gone", str(tmp_path / "gone")),
        DataSet("unfit", str(photos), tasks=("zero_shot",)),
        DataSet("photos", str(photos)),
    ]
    with pytest.raises(DataError, match=r"2 data sets or tasks could not be measured.*gone"):
        evaluate_suite(str(finished), sets, tmp_path / "out")
    assert [row.data for row in read_rows(tmp_path / "out")] == ["photos"]
    assert "zero_shot cannot be measured: its images have no classes" in capsys.readouterr().err
    assert (tmp_path / "out" / "table.md").is_file()


def test_a_line_that_was_cut_short_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps(ROW)
    (tmp_path / "rows.jsonl").write_text(f"{line}\n{line[:40]}")
    assert len(read_rows(tmp_path)) == 1
    assert "rows.jsonl: line 2 was cut short" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "schema": 99}))
    with pytest.raises(DataError, match="schema 99"):
        read_rows(tmp_path)


def test_tables_hold_every_row_and_the_averages(tmp_path: Path) -> None:
    rows = [
        {**ROW, "data": data, "value": value, "group": group, "model": model, "model_digest": model}
        for model in ("m", "k")
        for data, value, group in (("a", 0.5, "g"), ("b", 0.7, "g"), ("c", 0.3, "h"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read_rows(tmp_path)
    means = {(model, group): (mean, num) for model, group, _, mean, num in averages(found)}
    assert means["m", "g"] == pytest.approx((0.6, 2)) and means["k", "all"] == pytest.approx((0.5, 3))
    write_tables(tmp_path, found)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| b | zero_shot | top1 | 10 | 10.0 | 70.0 (40.0 to 60.0) | 70.0 (40.0 to 60.0) |" in table
    assert "| g | zero_shot | 2 | 60.0 | 60.0 |" in table
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [0.5, 0.7, 0.3] * 2
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "clip_benchmark").iterdir())]
    assert len(written) == 6 and written[0]["metrics"] == {"acc1": 0.5}


def test_the_json_of_clip_benchmark_counts_an_images_own_captions_alone(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    """As that library does, where equal captions of other images are right answers in our tables."""
    lines = [
        f"{photos.parent / f'{index:03d}.png'},a {('red', 'blue')[index % 2]} thing" for index in range(20)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["path,caption", *lines]))
    (row,) = evaluate_suite(str(finished), [DataSet("set", str(tmp_path / "table.csv"))], tmp_path / "out")
    (path,) = (tmp_path / "out" / "clip_benchmark").iterdir()
    written = json.loads(path.read_text())["metrics"]
    live = TowerFeatures(open_target(str(finished)), tmp_path / "out" / "features")
    encoded = captioned(live, Part("set", "test", open_source(str(tmp_path / "table.csv"))))
    own = recalls(ranks_from_features(*encoded.system("main"), encoded.text_image))
    assert written["text_retrieval_recall@5"] == own["i2t_r@5"] < row.metrics["i2t_r@5"]
    assert written["image_retrieval_recall@5"] == own["t2i_r@5"] < row.metrics["t2i_r@5"]


def test_stored_features_give_the_figures_of_the_model_that_made_them(
    finished: Path, photos: Path, classes: Path, tmp_path: Path
) -> None:
    live = TowerFeatures(open_target(str(finished)), tmp_path / "cache")
    folder = tmp_path / "stored"
    folder.mkdir()
    pictures, labels = Part("photos", "test", open_source(str(photos))), opened(classes)
    samples = range(len(pictures.source))
    tensors = {"test/image": live.images(pictures).features, "test/text": live.captions(pictures, samples)}
    save_file(tensors, folder / "photos.safetensors")
    prompts = live.classes(labels.test, labels.classes, labels.templates)
    save_file(
        {"test/image": live.images(labels.test).features, "classes": prompts}, folder / "set.safetensors"
    )
    stored = StoredFeatures(f"features:{folder}")
    data = OpenSet(DataSet("photos", ""), pictures, None, None, None, (), ())
    assert retrieval(stored, data).metrics == retrieval(live, data).metrics
    assert zero_shot(stored, labels).metrics == zero_shot(live, labels).metrics
    described = [DataSet("set", str(classes), tasks=("zero_shot", "calibration"))]
    with pytest.raises(DataError, match=r"1 data sets or tasks.*set, calibration: .*the model's scale"):
        evaluate_suite(f"features:{folder}", described, tmp_path / "out")
    assert [row.task for row in read_rows(tmp_path / "out")] == ["zero_shot"], "the other task is measured"
    save_file({"test/image": tensors["test/image"][:9]}, folder / "photos.safetensors")
    with pytest.raises(DataError, match=r"photos\.safetensors: test/image is \[9, 24\], and the data has 96"):
        retrieval(stored, data)
    with pytest.raises(DataError, match="no tensor 'test/image'; it holds nothing"):
        stored.images(Part("other", "test", pictures.source))
    with pytest.raises(DataError, match=r"no NAME\.safetensors"):
        StoredFeatures(f"features:{tmp_path / 'gone'}")


def test_equal_images_are_one_and_unreadable_ones_are_left_out(finished: Path, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(picture(index) if index != 2 else b"broken")
    (tmp_path / "captions.csv").write_text(
        "path,caption\n0.png,one\n1.png,two\n0.png,three\n2.png,four\n3.png,five\n"
    )
    live = TowerFeatures(open_target(str(finished)), tmp_path / "cache")
    encoded = captioned(live, Part("set", "test", open_source(str(tmp_path / "captions.csv"))))
    assert encoded.captions == ["one", "three", "two", "five"]
    assert encoded.text_image.tolist() == [0, 0, 1, 2] and len(encoded.views["img"]) == 3
    assert [bad.reason for bad in encoded.bad] == ["damaged image"]
    torch.testing.assert_close(encoded.views["txt"], live.texts(encoded.captions), rtol=0, atol=1e-6)
