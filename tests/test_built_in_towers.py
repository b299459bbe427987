"""The towers that come with the package, how they are made, and what they know of the world's attributes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kit.towers import image_tower
from threetowers.compare import attributes, towers
from threetowers.compare.attributes import known_attributes, probe_tower
from threetowers.errors import UsageError
from threetowers.run.finished import FinishedRun
from threetowers.towers.frozen import built_in
from threetowers.train.pretrain import Interrupted
from threetowers.world import scenes
from threetowers.world.attributes import ATTRIBUTES
from threetowers.world.write import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attributes") / "world"
    write_world(
        folder,
        num_train=1,
        num_val=400,
        num_test=200,
        num_labelled=0,
        kinds=("pairs", "scenes", "attributes"),
    )
    return folder


@pytest.mark.parametrize("name", towers.TOWERS)
def test_each_is_a_small_tower_with_a_card(name: str) -> None:
    tower = image_tower(f"shapes:{name}")
    assert tower.image.size == 32 and tower.width > 0
    features = tower(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    assert features.dtype == torch.float32 and features.isfinite().all()
    folder = built_in.FOLDER / name
    assert (folder / "model.safetensors").stat().st_size < 1_500_000
    card = built_in.card(name)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{card['val/top1']:.1%}" in text and towers.TOWERS[name].summary in text
    assert card["data"] == towers.TOWERS[name].config.data
    assert card["steps"] == towers.TOWERS[name].config.steps and card["seed"] == 0
    assert set(card["probes"]) == set(ATTRIBUTES)
    assert json.loads((folder / "config.json").read_bytes())["architecture"] == card["model"]


def test_the_list_of_towers_is_what_is_shipped() -> None:
    assert set(built_in.names()) == set(towers.TOWERS)
    with pytest.raises(UsageError, match=r"shapes:mached is no built-in tower; did you mean `matched`"):
        image_tower("shapes:mached")


def test_what_each_was_trained_on_shows_in_what_it_knows() -> None:
    """The reasons to ship five of them, by the figures of their cards."""
    cards = {name: built_in.card(name) for name in towers.TOWERS}
    own, probes = {n: c["val/top1"] for n, c in cards.items()}, {n: c["probes"] for n, c in cards.items()}
    assert own["matched"] > 0.9 and own["mismatched"] > 0.95 and own["partly"] > 0.9 and own["rich"] > 0.6
    assert own["random"] < 0.1
    assert probes["matched"]["shape"] > probes["mismatched"]["shape"] + 0.3
    assert probes["mismatched"]["background"] > probes["matched"]["background"]
    assert probes["rich"]["colour"] > probes["matched"]["colour"] + 0.3
    assert all(probes["random"]["shape"] < probes[name]["shape"] for name in ("matched", "rich", "partly"))


def test_making_one_trains_on_the_labelled_images_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def small(kind: scenes.Kind, seed: int) -> Path:
        asked.append((kind, seed))
        folder = tmp_path / f"{kind}-{seed}"
        write_world(
            folder,
            seed=seed,
            num_train=1,
            num_val=48,
            num_test=1,
            num_labelled=96,
            kinds=(kind,),
        )
        return folder / kind

    monkeypatch.setattr(towers, "labelled_world", small)
    for name, recipe in list(towers.TOWERS.items()):
        few = replace(recipe.config, steps=min(recipe.config.steps, 1), batch_size=4)
        monkeypatch.setitem(towers.TOWERS, name, replace(recipe, config=few))
        towers.make_tower(name, tmp_path / name, seed=7, device="cpu")
        assert image_tower(f"file:{tmp_path / name}").image.size == 32
        assert json.loads((tmp_path / name / "pretrain.json").read_bytes())["seed"] == 7
    assert asked == [("objects", 7), ("scenes", 7), ("attributes", 7), ("objects", 7), ("objects", 7)]
    stop: Any = SimpleNamespace(requested=True)
    with pytest.raises(Interrupted):
        towers.make_tower("matched", tmp_path / "stopped", seed=7, device="cpu", stop=stop)
    assert not (tmp_path / "stopped" / "pretrain.json").exists()


# Attributes


def test_attributes_are_read_from_the_labels(world: Path) -> None:
    fields = {
        "shape": "shape", "texture": "texture", "colour": "colour", "size": "size", "background": "background",
        "layout": "layout",
    }  # fmt: skip
    indices = np.arange(300)
    for name, attribute in ATTRIBUTES.items():
        labels = scenes.labels(0, indices, kind=attribute.kind, split="test")
        content = getattr(scenes.scenes(0, indices, kind=attribute.kind, split="test"), fields[name])
        expected = content if content.ndim == 1 else content[:, 0]
        np.testing.assert_array_equal(attribute.of(labels), expected)
        assert len(attribute.class_names) == expected.max() + 1


def test_prompts_are_in_the_words_of_the_captions() -> None:
    from threetowers.world.captions import captions

    known = {word for five in captions(0, np.arange(3_000)) for caption in five for word in caption.split()}
    for attribute in ATTRIBUTES.values():
        for template in attribute.templates:
            for name in attribute.class_names:
                assert set(template.replace("{}", name).split()) <= known, template.replace("{}", name)


def test_an_oracle_knows_every_attribute_and_a_blind_tower_none(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle's vectors hold the words of the label, as its text vectors hold the words of the prompt."""
    words = sorted(
        {word for a in ATTRIBUTES.values() for name in a.class_names for word in name.split()} - {"a", "of"}
    )

    def vector(text: str) -> Tensor:
        found = torch.tensor([float(word in text.split()) for word in words])
        return torch.nn.functional.normalize(found + 1e-3, dim=0)

    def told(encode: Any, folder: Path, parts: Any) -> attributes.Features:
        features: attributes.Features = {}
        kinds: tuple[scenes.Kind, ...] = ("attributes", "scenes")
        for kind in kinds:
            names = scenes.class_names(kind)
            for part in ("val", "test"):
                labels = torch.arange(400) % len(names)
                if kind == "attributes":
                    labels = torch.arange(0, 768)
                features[kind, part] = torch.stack([vector(names[i]) for i in labels]), labels
        return features

    def encode_text(texts: list[str]) -> Tensor:
        return torch.stack([vector(text) for text in texts])

    oracle = cast(FinishedRun, SimpleNamespace(encode_image=None, encode_text=encode_text))
    monkeypatch.setattr(attributes, "_features", told)
    known = known_attributes(oracle, world)
    assert set(known.zero_shot) == set(known.probe) == set(ATTRIBUTES)
    assert all(value == 1 for value in known.zero_shot.values()), known.zero_shot
    assert all(value > 0.99 for value in known.probe.values()), known.probe
    monkeypatch.undo()

    class Blind:
        image = image_tower("shapes:random").image

        def __call__(self, pixels: Tensor) -> Tensor:
            return torch.ones(len(pixels), 3) + pixels[:, 0, 0, :3] * 0

    blind = probe_tower(cast(Any, Blind()), world)
    chance = {name: 1 / len(attribute.class_names) for name, attribute in ATTRIBUTES.items()}
    assert all(blind[name] < chance[name] + 0.15 for name in ATTRIBUTES)


def test_probes_of_a_real_tower_are_those_of_its_card(world: Path) -> None:
    """The card's are of the whole world; this one is smaller, so they are near."""
    found = probe_tower(image_tower("shapes:rich"), world)
    card = built_in.card("rich")["probes"]
    assert all(abs(found[name] - card[name]) < 0.15 for name in ATTRIBUTES)


def test_images_are_encoded_in_order(world: Path) -> None:
    seen: list[int] = []

    def encode(images: Any) -> Tensor:
        assert all(isinstance(image, Image.Image) for image in images)
        seen.append(len(images))
        return torch.tensor([[float(np.asarray(image).mean())] for image in images])

    features = attributes._features(encode, world)
    assert seen == [400, 200, 400, 200]
    images, labels = features["scenes", "test"]
    np.testing.assert_array_equal(labels, scenes.labels(0, np.arange(200), kind="scenes", split="test"))
    from threetowers.world.pictures import render

    expected = render(0, np.arange(200), kind="scenes", split="test").mean(axis=(1, 2, 3))
    np.testing.assert_allclose(images[:, 0], expected, atol=1e-3)
