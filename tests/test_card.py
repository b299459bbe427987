"""The model card of an export says what the run recorded, in the Hub's form, and names no folder of this machine."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kit.runs import Config, rows
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.export.card import public_name
from threetowers.export.open_clip import export_open_clip
from threetowers.export.results import read_results
from threetowers.run.average import average_runs
from threetowers.towers.weights import read_safetensors, write_safetensors
from threetowers.train.loop import train

READS = {"third": "images"}


def class_folders(folder: Path) -> Path:
    """Labelled images: two classes of five, of one colour each."""
    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (40, 40), name).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def run(folder: Path, tiny_config: Config) -> Path:
    """A run of 3T that was evaluated on pairs and on classes, trained once."""
    if not (folder / "run").exists():
        train(tiny_config(steps=20, classes=str(class_folders(folder / "classes"))), folder / "run")
        evaluate_run(folder / "run")
    return folder / "run"


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return shutil.copytree(run, tmp_path / "own")


def card_of(run: Path, out: Path) -> str:
    return (export_open_clip(run, out) / "README.md").read_text(encoding="utf-8")


def metadata(text: str) -> dict[str, Any]:
    """What huggingface_hub reads at the top of a card."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def test_the_metadata_are_the_hubs_and_hold_the_figures_of_the_evaluation(run: Path, tmp_path: Path) -> None:
    text = card_of(run, tmp_path / "pair")
    data = metadata(text)
    assert data["library_name"] == "open_clip" and data["pipeline_tag"] == "zero-shot-image-classification"
    assert {"threetowers", "clip", "3t"} <= set(data["tags"])
    assert not {"license", "datasets", "base_model"} & data.keys(), "which the user alone knows"
    (index,) = data["model-index"]
    found = {
        (result["task"]["type"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    evaluation = json.loads((run / "evaluation.json").read_bytes())
    expected = {("image-text-retrieval", name): value for name, value in evaluation["test"].items()}
    expected |= {("zero-shot-image-classification", name): v for name, v in evaluation["zero_shot"].items()}
    assert index["name"] == "pair" and len(expected) == 9
    assert found == pytest.approx(expected, abs=5e-5)


def test_the_table_has_every_figure_with_its_interval(run: Path, tmp_path: Path) -> None:
    text = card_of(run, tmp_path / "out")
    figures = read_results(run, READS).figures
    assert len(figures) == 9
    evaluation = json.loads((run / "evaluation.json").read_bytes())
    where = f"{evaluation['num_test']} test images with captions (`{evaluation['data']}`), zero-shot"
    assert f"In percent: retrieval on {where}" in text
    for figure in figures:
        line = f"| {figure.task} | {figure.words} | {100 * figure.value:.1f}"
        if figure.metric == "mean_per_class":
            assert f"{line} |" in text and figure.low is None
            continue
        assert figure.low is not None and figure.high is not None
        assert figure.low <= figure.value <= figure.high
        assert f"{line} ({100 * figure.low:.1f} to {100 * figure.high:.1f}) |" in text
    by_name = {figure.metric: figure for figure in figures}
    accuracy = by_name["top1"]  # of ten images, each an answer of its own
    assert accuracy.low is not None and accuracy.high is not None
    deviation = (accuracy.value * (1 - accuracy.value) / 10) ** 0.5
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * deviation, abs=0.2)


def test_the_combination_has_figures_of_its_own(run: Path) -> None:
    """Against scores that are added and sorted one by one."""
    saved = read_safetensors(run / "features.safetensors")
    scores = 0.7 * saved["test/img"].double() @ saved["test/txt"].double().T
    scores += 0.3 * saved["test/third@txt"].double() @ saved["test/txt@third"].double().T
    group, owner = saved["test/text_group"], saved["test/text_image"]
    hits = []
    for text in range(scores.shape[1]):
        best = int(scores[:, text].argmax())
        hits.append(bool((group[owner == best] == group[text]).any()))
    found = {figure.metric: figure for figure in read_results(run, READS, 0.3).figures}
    assert found["t2i_r@1"].value == pytest.approx(np.mean(hits)) and "top1" not in found
    plain = {figure.metric: figure.value for figure in read_results(run, READS).figures}
    assert [found[name].value for name in found] != [plain[name] for name in found]


def test_what_the_run_recorded_is_in_the_card(run: Path, tmp_path: Path) -> None:
    text = card_of(run, tmp_path / "out")
    described = json.loads((run / "model.json").read_bytes())
    seconds = [row["seconds"] for row in rows(run) if "seconds" in row][-1]
    hours = re.search(r"multiply (\S+) hours .* every 100 watts are (\S+) kWh", text)
    assert hours and float(hours[1]) == pytest.approx(seconds / 3600, rel=1e-2)
    assert float(hours[2]) == pytest.approx(seconds / 3600 * 0.1, rel=0.1)
    for words in (
        "| method | 3T (`3t`) |",
        "img–txt 0.333 (softmax)",
        "| steps | 20 of 16 pairs, 320 in all |",
        f"| trained parameters | {described['num_trainable']:,} |",
        f"train {described['data']['train']['images']}, ",
        "| start of the image tower | random weights |",
        "| start of the text tower | random weights |",
        f"a CPU (threads: {torch.get_num_threads()}), torch {torch.__version__}",
        "Texts are cut after 16 tokens",
        "training images are few",
        "No licence has been chosen",
    ):
        assert words in text


@pytest.mark.parametrize("method", ["lit", "lit-unlocked", "3t-warm"])
def test_the_start_is_said_where_there_is_one(
    method: Any, tiny_config: Config, timm_tower: str, tmp_path: Path
) -> None:
    train(tiny_config(method=method, steps=1), tmp_path / "run")
    text = card_of(tmp_path / "run", tmp_path / "out")
    tower = public_name(timm_tower)
    frozen = ", which stayed frozen" if method == "lit" else ""
    assert f"| start of the image tower | `{tower}`{frozen} |" in text
    assert f"took part in the training: `{tower}`." in text and f"(`{method}`) |" in text
    assert (
        "There are no figures, because this run was not evaluated." in text and "It was not tested." in text
    )
    assert "model-index" not in metadata(text) and "model_name" not in text


def test_no_folder_of_this_machine_is_named(run: Path, tmp_path: Path, timm_tower: str) -> None:
    assert str(Path("/")) in timm_tower, "the tower is a path"
    out = export_open_clip(run, tmp_path / "out")
    for path in out.iterdir():
        content = path.read_bytes()
        for place in (tmp_path.parent, run.parent, Path.cwd(), Path(timm_tower.partition(":")[2]).parent):
            assert str(place).encode() not in content, path


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("/home/me/photos/captions.csv", "captions.csv"),
        ("photos/captions.csv", "captions.csv"),
        ("a.csv::/x/b.csv", "a.csv, b.csv"),
        ("shapes", "shapes"),
        ("shapes:matched", "shapes:matched"),
        ("file:/home/me/runs/first", "file:first"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("timm:resnet18@/home/joe@corp/x=1/r18.safetensors", "timm:resnet18@r18.safetensors"),
        ("timm:local-dir:/home/me/tower", "timm:local-dir:tower"),
        ("big=timm:local-dir:../tower", "big=timm:local-dir:tower"),
        ("hf:facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("hf:/home/me/dinov2", "hf:dinov2"),
        ("open_clip:ViT-B-32@openai", "open_clip:ViT-B-32@openai"),
        ("https://host/set/{000..009}.tar?signature=secret", "https:{000..009}.tar"),
    ],
)
def test_names_without_their_folders(given: str, public: str) -> None:
    assert public_name(given) == public


@given(
    st.lists(st.text("ab=@: .-", min_size=1, max_size=4), min_size=2, max_size=5),
    st.sampled_from(["", "timm:x@", "file:"]),
)
def test_no_absolute_path_gets_through(parts: list[str], prefix: str) -> None:
    assert "/" not in public_name(f"{prefix}/{'/'.join(parts)}")


def test_figures_and_vectors_of_different_evaluations_have_no_interval(own: Path) -> None:
    path = own / "evaluation.json"
    evaluation = json.loads(path.read_bytes())
    evaluation["test"]["mean_r@1"] += 0.01
    path.write_text(json.dumps(evaluation))
    found = {figure.metric: figure for figure in read_results(own, READS).figures}
    assert found["mean_r@1"].value == evaluation["test"]["mean_r@1"] and found["mean_r@1"].low is None
    assert found["i2t_r@1"].low is not None
    (own / "features.safetensors").unlink()
    found = {figure.metric: figure for figure in read_results(own, READS).figures}
    assert len(found) == 9 and all(figure.low is None for figure in found.values())
    assert "its evaluation are not there" in read_results(own, READS, 0.5).missing


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "cannot be read"), ("[]", "another version"), ('{"schema": 1}', "another version")],
)
def test_an_evaluation_that_cannot_be_used_is_left_out_with_the_reason(
    content: str, why: str, own: Path
) -> None:
    (own / "evaluation.json").write_text(content)
    results = read_results(own, READS)
    assert not results.figures and why in results.missing


def test_an_image_alone_has_no_interval(own: Path) -> None:
    path = own / "features.safetensors"
    saved = read_safetensors(path)
    keep = saved["test/text_image"] == 0
    one: dict[str, Any] = dict(saved)
    for name, value in saved.items():
        if name in ("test/text_image", "test/text_group") or name.startswith(("test/txt", "test/third@txt")):
            one[name] = value[keep] if len(value) == len(keep) else value
        if name.startswith(("test/img", "test/third@")):
            one[name] = value[:1]
    write_safetensors(path, {name: value.contiguous() for name, value in one.items()})
    evaluation = json.loads((own / "evaluation.json").read_bytes())
    evaluation["test"] = dict.fromkeys(evaluation["test"], 1.0)  # there is nothing to confuse it with
    (own / "evaluation.json").write_text(json.dumps(evaluation))
    retrieval = [figure for figure in read_results(own, READS).figures if figure.task == "retrieval"]
    assert len(retrieval) == 7 and all(figure.value == 1 and figure.low is None for figure in retrieval)


def test_missing_records_are_not_made_up(own: Path, tmp_path: Path) -> None:
    shutil.rmtree(own / "checkpoints")
    with (own / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "sec')  # torn by a kill
    assert " on a CPU" not in (text := card_of(own, tmp_path / "a")) and "The training took" in text
    (own / "metrics.jsonl").unlink()
    assert "How long the training took was not recorded." in card_of(own, tmp_path / "b")


def test_an_average_says_of_what(run: Path, tmp_path: Path) -> None:
    average_runs((run, run), (0.25, 0.75), tmp_path / "average")
    text = card_of(tmp_path / "average", tmp_path / "out")
    assert "| average | of 2 runs, with the weights 0.25, 0.75" in text


def test_a_card_with_a_licence_is_somebodys_and_is_kept(run: Path, tmp_path: Path) -> None:
    first = card_of(run, tmp_path / "out")
    assert card_of(run, tmp_path / "out") == first, "an untouched card is written again"
    mine = first.replace("---\nlibrary_name", "---\nlicense: mit\nlibrary_name", 1)
    (tmp_path / "out" / "README.md").write_text(mine, encoding="utf-8")
    assert card_of(run, tmp_path / "out") == mine
    assert (tmp_path / "out" / "README-threetowers.md").read_text(encoding="utf-8") == first
