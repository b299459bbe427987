"""Training on some of the images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kit.runs import assert_same_weights
from threetowers.config import RunConfig
from threetowers.data.source import Source
from threetowers.errors import UsageError
from threetowers.run.setup import open_data
from threetowers.train.loop import train

Config = Callable[..., RunConfig]


def some(config: RunConfig, number: int) -> RunConfig:
    return replace(config, inputs=replace(config.inputs, train_images=number))


def ids(source: Source) -> list[str]:
    return [source.record(index).id for index in range(len(source))]


def test_fewer_images_are_among_more_and_the_other_parts_stay(tiny_config: Config) -> None:
    config = tiny_config()
    whole, val, test = open_data(config)
    before: set[str] = set()
    for number in (16, 17, 40, len(whole)):
        train_part, *others = open_data(some(config, number))
        assert len(train_part) == number and before < set(ids(train_part)) <= set(ids(whole))
        assert ids(train_part) == sorted(ids(train_part), key=ids(whole).index), "in the order of the data"
        assert [ids(part) for part in others] == [ids(val), ids(test)]
        before = set(ids(train_part))
    with pytest.raises(UsageError, match=r"inputs\.train_images: 1,000 images, and there are \d+"):
        open_data(some(config, 1000))


def test_equal_images_are_drawn_together(tiny_config: Config, photos: Path, tmp_path: Path) -> None:
    rows = []
    for index in range(60):
        for word in ("one", "two"):
            copy = tmp_path / f"{word}{index}.png"
            copy.write_bytes((photos.parent / f"{index:03d}.png").read_bytes())
            rows.append(f"{copy.name},{word} {index}")
    (tmp_path / "table.csv").write_text("\n".join(["path,caption", *rows]))
    config = some(tiny_config(data=str(tmp_path / "table.csv")), 30)
    drawn = open_data(config)[0]
    images = [drawn.record(index).image_id or drawn.record(index).id for index in range(30)]
    assert len(set(images)) <= 16


def test_a_run_on_some_images_continues_and_reads_the_features_of_all(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(steps=4)
    train(config, tmp_path / "whole")  # stores the frozen features of all
    stores = list((tmp_path / "embeddings").iterdir())
    few = some(config, 20)
    train(few, tmp_path / "few")
    assert len(list((tmp_path / "embeddings").iterdir())) == len(stores)
    assert not train(few, tmp_path / "stopped", max_minutes=1e-9).finished
    while not train(few, tmp_path / "stopped", max_minutes=2e-3).finished:
        pass
    assert_same_weights(tmp_path / "few", tmp_path / "stopped")
