"""Ranked ids: what the file holds, which ids stand in it, and that both ways of evaluating write it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from threetowers.config import RunConfig
from threetowers.data.open import open_source
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.evaluate.ranked import Rankings, write_ranked
from threetowers.evaluate.search import top_k
from threetowers.evaluate.suite.features import Part, TowerFeatures, captioned
from threetowers.evaluate.suite.run import evaluate_suite
from threetowers.evaluate.suite.sets import DataSet
from threetowers.evaluate.suite.target import open_target
from threetowers.objective.losses import unit
from threetowers.train.loop import train


def read(path: Path) -> dict[str, list[str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {row["query"]: row["ids"] for row in map(json.loads, lines)}


def test_a_run_and_a_suite_write_the_ids_of_the_samples(
    tiny_config: Callable[..., RunConfig], photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny_config(steps=2), run)
    evaluate_run(run, data=str(photos), ranked=Rankings(tmp_path / "own", 5))
    evaluate_suite(str(run), [DataSet("photos", str(photos))], tmp_path, ranked=Rankings(tmp_path / "all", 5))
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    digest = open_target(str(run)).digest()[:8]
    assert names == [f"photos_{digest}-i2t.jsonl", f"photos_{digest}-t2i.jsonl"]
    source = open_source(str(photos))
    encoded = captioned(
        TowerFeatures(open_target(str(run)), tmp_path / "features"), Part("photos", "test", source)
    )
    scores = encoded.views["img"].double() @ encoded.views["txt"].double().T
    images = [source.record(index).id for index in encoded.index.tolist()]
    texts = [f"{id}#{n}" for id, i in zip(images, encoded.index.tolist(), strict=True)
             for n in range(len(source.record(i).captions))]  # fmt: skip
    for suffix, queries, candidates, table in (
        ("i2t", images, texts, scores),
        ("t2i", texts, images, scores.T),
    ):
        order = table.float().sort(dim=1, descending=True, stable=True).indices[:, :5]
        expected = {
            query: [candidates[j] for j in row] for query, row in zip(queries, order.tolist(), strict=True)
        }
        assert read(tmp_path / "all" / f"photos_{digest}-{suffix}.jsonl") == expected
        assert read(tmp_path / "own" / f"test-{suffix}.jsonl").keys() == expected.keys()


def test_at_least_one_id_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1 id of each query is needed, got 0"):
        Rankings(tmp_path, 0)


def test_ranked_ids_are_what_eccv_caption_takes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    image, text = (unit(torch.randn(num, 8, generator=generator)) for num in (3, 7))
    image_ids, text_ids = [391895, 60623, 483108], ["ä", "b", "\ud800", "d", "e", "f", "g"]
    scores, indices = top_k(image, text, 4)
    write_ranked(tmp_path / "i2t.jsonl", image_ids, text_ids, scores, indices)
    write_ranked(tmp_path / "t2i.jsonl", text_ids, image_ids, *top_k(text, image, 3))
    lines = (tmp_path / "i2t.jsonl").read_text(encoding="utf-8", errors="surrogatepass").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["query"]: row["ids"] for row in rows} == {
        image_ids[i]: [text_ids[j] for j in indices[i].tolist()] for i in range(3)
    }
    assert torch.equal(torch.tensor([row["scores"] for row in rows]), scores), "to the bit"
    backward = [json.loads(line) for line in (tmp_path / "t2i.jsonl").read_bytes().splitlines()[:2]]
    assert [row["query"] for row in backward] == ["ä", "b"] and set(backward[0]["ids"]) == set(image_ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i2t.jsonl", "t2i.jsonl"]


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    scores, indices = torch.zeros(2, 3), torch.tensor([[0, 1, 2], [2, 1, 0]])
    path = tmp_path / "ranked.jsonl"
    for queries, candidates, places, message in (
        ([1, 1], ["a", "b", "c"], indices, "query_ids: rows 0 and 1 are both 1"),
        ([1, 2], ["a", "b", "a"], indices, "candidate_ids: rows 0 and 2 are both 'a'"),
        ([1, 2.5], ["a", "b", "c"], indices, "query_ids: row 1 is 2.5, a whole number or a text"),
        ([1], ["a", "b", "c"], indices, "one row for each of 1 queries"),
        ([1, 2], ["a", "b", "c"], indices[:, :2], "one row for each of 2 queries"),
        ([1, 2], ["a", "b"], indices, "candidate_ids: 2 ids, but indices from 0 to 2"),
    ):
        with pytest.raises(DataError, match=message):
            write_ranked(path, queries, candidates, scores, places)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
