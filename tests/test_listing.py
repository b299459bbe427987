"""`threetowers towers`: what it lists, and that its cards say what the loaded tower is."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from threetowers.cli import main
from threetowers.commands import towers as listing
from threetowers.commands.towers import CURATED, describe, towers
from threetowers.errors import UsageError
from threetowers.towers.frozen.hf import hf_card
from threetowers.towers.frozen.load import KINDS, load_frozen


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which somebody fetches weights."""

    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fetched)
    monkeypatch.setattr("open_clip.factory.download_pretrained", fetched)


def test_the_overview_names_every_prefix_and_the_curated_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    published = set(timm.list_models(pretrained=True))
    assert all(name in published for name, _ in CURATED)
    monkeypatch.setattr(listing, "CURATED", CURATED[:1])
    text = towers()
    assert all(kind.forms[0] in text and kind.help in text for kind in KINDS)
    assert f"{len(published):,} published" in text and str(len(open_clip.list_pretrained())) in text
    (row,) = (line for line in text.splitlines() if "resnet50.a1_in1k" in line)
    assert row.split()[1:5] == ["23.5", "M", "224", "2048"]


def test_a_word_lists_the_names_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["towers", "DINOv2"])
    shown = capsys.readouterr().out
    names = [line.strip() for line in shown.splitlines() if line.startswith("  ")]
    assert stop.value.code == 0 and "timm:vit_small_patch14_dinov2.lvd142m" in names
    assert all("dinov2" in name for name in names) and "open_clip" not in shown
    both = towers("siglip")
    assert "  timm:" in both and "  open_clip:ViT-B-16-SigLIP@webli" in both and " more; " in both


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("convmext", "did you mean `convnext`"),
        ("qqqq", "try a family"),
        ("timm:resnat50", "did you mean `resnet50`"),
        ("open_clip:ViT-B-32", "Published tags: openai"),
        ("open_clip-text:ViT-B-33@x", "did you mean"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        towers(name)


@pytest.mark.parametrize("name", ["test_vit", "test_mambaout"])
def test_the_card_of_a_timm_name_is_the_loaded_tower(name: str, tmp_path: Path) -> None:
    save_file(timm.create_model(name).state_dict(), tmp_path / "weights.safetensors")
    tower = load_frozen(f"timm:{name}@{tmp_path / 'weights.safetensors'}")
    card = describe(f"timm:{name}")
    assert (card.width, card.image) == (tower.width, tower.image)
    assert card.num_parameters == sum(p.numel() for p in tower.module.parameters())


def test_the_card_of_an_hf_name_is_the_loaded_tower(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}})
    )
    spec = f"hf:{tmp_path}"
    read = describe(spec)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").touch()  # a card of a hub name is made of the two small files alone
    assert hf_card(spec, str(tmp_path)) == read
    assert read.width == 32 and read.image is not None and read.image.size == 32
    text = read.text()
    assert (
        "32 × 32 pixels" in text and "both sides to 32, bilinear, no crop" in text and "0.5, 0.5, 0.5" in text
    )


def test_the_cards_of_open_clip_show_the_tags_own_preprocessing() -> None:
    webli, openai = describe("open_clip:ViT-B-16-SigLIP@webli"), describe("open_clip:ViT-B-32@openai")
    assert webli.image is not None and openai.image is not None
    assert webli.image.mean == (0.5, 0.5, 0.5) and webli.image.resize == "squash"
    assert openai.image.mean == open_clip.OPENAI_DATASET_MEAN and openai.image.resize == "shortest"
    assert openai.width == 512
    text = describe("open_clip-text:ViT-B-32@openai")
    assert text.image is None and text.context == 77 and "at most 77 tokens" in text.text()


def test_a_card_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    describe("timm:test_vit")
    assert torch.equal(state, torch.random.get_rng_state())
