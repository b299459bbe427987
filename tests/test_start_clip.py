"""Main towers that start at a CLIPModel of transformers: its features, training, exports and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from kit.clip import CONTEXT, NARROW, clip_folder, clip_tokenizer
from kit.runs import VIT, Config, assert_same_weights, interrupt_at, with_vit
from kit.sentences import sentence_encoder
from kit.towers import open_clip_folder
from threetowers import cli
from threetowers.config import RunConfig, StartConfig
from threetowers.data.transforms import fixed_view
from threetowers.errors import CheckpointError, UsageError
from threetowers.export.open_clip import export_open_clip
from threetowers.export.transformers import export_transformers
from threetowers.objective.losses import unit
from threetowers.run.finished import load_run
from threetowers.run.setup import Setup, assemble
from threetowers.towers import clip
from threetowers.towers.frozen import text
from threetowers.train.loop import train

TEXTS = [
    "a red square at the top left",
    "",
    "It's 3 o'clock, and the BOTTOM is green!",
    "Größe, naïve façade: 図書館 и здание 🙂",
    "the bottom is green and the top is not, " * 9,
]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((48, 48), (61, 37), (31, 90), (36, 36))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def both(folder: Path) -> StartConfig:
    return StartConfig(image=f"hf:{folder}", text=f"hf:{folder}")


def started(config: Config, folder: Path, start: StartConfig, **changes: Any) -> Setup:
    setup = assemble(config(method="baseline", start=start, **changes), folder)
    setup.model.eval()
    return setup


@torch.no_grad()
def vectors(setup: Setup) -> tuple[Tensor, Tensor]:
    """The unit vectors of the pictures and of TEXTS by the towers of a run that has not begun."""
    pixels = torch.from_numpy(np.stack([fixed_view(each, setup.model.image) for each in pictures()]))
    views = setup.model.features(pixels=pixels, tokens=setup.tokenizer(TEXTS))
    return unit(views["img"]), unit(views["txt"])


@torch.no_grad()
def by_transformers(folder: Path) -> tuple[Tensor, Tensor]:
    """The same by transformers alone, texts with its padding."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    images = model.get_image_features(**processor(images=pictures(), return_tensors="pt")).pooler_output
    return unit(images), unit(model.get_text_features(**tokens).pooler_output)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], atol: float = 1e-6) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


VARIANTS: dict[str, dict[str, Any]] = {
    "quick_gelu": {},
    "gelu": {"act": "gelu"},
    "the tanh of gelu": {"act": "gelu_pytorch_tanh"},
    "pooled at the highest id": {"text": {"eos_token_id": 2}},
    "other epsilon, heads and MLP": {
        "text": {"layer_norm_eps": 1e-3, "hidden_size": 28, "num_attention_heads": 4, "intermediate_size": 61},
        "vision": {"layer_norm_eps": 1e-6, "hidden_size": 49, "num_attention_heads": 7, "intermediate_size": 147},
    },
    "more positions and rows than the tokenizer uses": {"text": {"vocab_size": 800}, "limit": 11},
    "both sides squashed": {"processor": {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 3}},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_first_features_and_tokens_are_those_of_transformers(
    name: str, tiny_config: Config, tmp_path: Path
) -> None:
    folder = clip_folder(tmp_path / "clip", **VARIANTS[name])
    setup = started(tiny_config, tmp_path / "run", both(folder))
    same(vectors(setup), by_transformers(folder))
    assert setup.model.started == dict.fromkeys(("img", "txt"), StartConfig().lr)
    assert setup.model.embed_dim == 20
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = setup.tokenizer(TEXTS)
    for row, length, each in zip(ours, setup.tokenizer.lengths(ours), TEXTS, strict=True):
        assert row[:length].tolist() == tokenizer(each, truncation=True)["input_ids"]
    assert ours.shape[1] == VARIANTS[name].get("limit", CONTEXT)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_run_trains_resumes_and_its_exports_lead_back(
    act: str, tiny_config: Config, tmp_path: Path
) -> None:
    folder = clip_folder(tmp_path / "clip", act)
    config = tiny_config(method="3t", start=both(folder), steps=5, checkpoint_every_steps=2)
    train(config, tmp_path / "run")
    interrupt_at(3, config, tmp_path / "torn")
    assert train(config, tmp_path / "torn").finished
    assert_same_weights(tmp_path / "run", tmp_path / "torn")
    run = load_run(tmp_path / "run")
    expected = run.encode_image(pictures()), run.encode_text(TEXTS)
    before = by_transformers(folder)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, before, strict=True))

    exported = export_open_clip(tmp_path / "run", tmp_path / "open_clip")
    loaded = open_clip.create_model(f"local-dir:{exported}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{exported}")
    with torch.no_grad():
        found = loaded.encode_text(tokenize(TEXTS), normalize=True)
    torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-6)

    back = export_transformers(tmp_path / "run", tmp_path / "transformers")
    same(by_transformers(back), expected)
    assert transformers.AutoConfig.from_pretrained(back).text_config.hidden_act == act
    same(vectors(started(tiny_config, tmp_path / "again", both(back))), expected)
    source = f"file:{tmp_path / 'run'}"
    earlier = StartConfig(image=source, text=source)
    same(vectors(started(tiny_config, tmp_path / "third", earlier)), expected)


def test_weights_go_to_transformers_and_back_to_the_same_bits(tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(clip_folder(tmp_path / "clip"))
    state = model.state_dict()
    found: dict[str, Tensor] = {}
    for side in ("img", "txt"):
        ours = clip.to_open_clip(side, state, 2)  # type: ignore[arg-type]
        found |= clip.to_transformers(side, ours, 2)  # type: ignore[arg-type]
    assert found.keys() == state.keys() - {"logit_scale"}
    assert all(torch.equal(found[key], state[key]) for key in found)


def test_one_side_gives_its_activation_and_its_space_to_a_new_tower(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clip_folder(tmp_path / "clip")
    start = StartConfig(text=f"hf:{folder}")
    setup = started(tiny_config, tmp_path / "timm", start)
    assert setup.model.embed_dim == 20 and setup.architecture.model_cfg["quick_gelu"] is True
    torch.testing.assert_close(vectors(setup)[1], by_transformers(folder)[1], rtol=0, atol=1e-6)
    assert "QuickGELU" not in capsys.readouterr().err, "a timm network keeps its own activation"
    setup = started(tiny_config, tmp_path / "vit", start, pair=with_vit(tiny_config()).pair)
    said = capsys.readouterr().err
    assert f"the text tower of 'hf:{folder}' has QuickGELU, and the new tower beside it gets it too" in said
    assert "QuickGELU" in repr(setup.model.img)
    image = StartConfig(image=f"hf:{folder}", image_size=48)
    train(tiny_config(method="3t", start=image, steps=2), tmp_path / "image")
    assert "QuickGELU" in repr(load_run(tmp_path / "image").txt)
    assert load_run(tmp_path / "image").architecture.image.size == 48
    same(by_transformers(export_transformers(tmp_path / "image", tmp_path / "out")),
         (load_run(tmp_path / "image").encode_image(pictures()), load_run(tmp_path / "image").encode_text(TEXTS)),
         1e-5)  # fmt: skip


def test_towers_of_different_activations_are_no_pair(tiny_config: Config, tmp_path: Path) -> None:
    quick = f"hf:{clip_folder(tmp_path / 'quick')}"
    plain = f"hf:{clip_folder(tmp_path / 'plain', 'gelu')}"
    named = replace(tiny_config().pair, model="ViT-B-32", vision=VIT, text={})
    for start, pair, with_it, without in (
        (StartConfig(image=plain, text=quick), None, f"the text tower of '{quick}'", f"the image tower of '{plain}'"),
        (StartConfig(image=quick), named, f"the image tower of '{quick}'", "pair.model = 'ViT-B-32'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"^start: {with_it} has QuickGELU and {without} has not"):
            started(tiny_config, tmp_path / "run", start, pair=pair or tiny_config().pair)
    mixed = clip_folder(tmp_path / "mixed", text={"hidden_act": "gelu"})
    with pytest.raises(UsageError, match="Start both at models that agree"):
        started(tiny_config, tmp_path / "run", both(mixed))


def test_an_encoder_keeps_its_own_activation_beside_a_tower_with_quick_gelu(
    tiny_config: Config, tmp_path: Path
) -> None:
    encoder = sentence_encoder(tmp_path / "encoder")
    start = StartConfig(text=f"hf-text:{encoder}")
    train(tiny_config(method="baseline", start=start, steps=1), tmp_path / "first")
    image = f"hf:{clip_folder(tmp_path / 'clip')}"
    for each in (f"hf-text:{encoder}", f"file:{tmp_path / 'first'}"):
        setup = started(tiny_config, tmp_path / "run", StartConfig(image=image, text=each))
        assert "QuickGELU" in repr(setup.model.img) and "QuickGELU" not in repr(setup.model.txt)


def test_quick_gelu_of_open_clip_is_kept_too_and_by_a_locked_image_tower(
    tiny_config: Config, tmp_path: Path
) -> None:
    folder = open_clip_folder(tmp_path / "pair", 12, 49_408)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))
    spec = f"open_clip:local-dir:{folder}"
    source = open_clip.create_model(f"local-dir:{folder}").eval()
    setup = started(tiny_config, tmp_path / "run", StartConfig(image=spec, text=spec))
    with torch.no_grad():
        tokens = open_clip.get_tokenizer("ViT-B-32", context_length=12)(TEXTS)
        expected = source.encode_text(tokens, normalize=True)
    torch.testing.assert_close(vectors(setup)[1], expected, rtol=0, atol=1e-6)
    train(tiny_config(method="lit", third=(spec,), steps=2), tmp_path / "lit")
    export_transformers(tmp_path / "lit", tmp_path / "exported")  # which compares the vectors
    assert (
        transformers.AutoConfig.from_pretrained(tmp_path / "exported").vision_config.hidden_act
        == "quick_gelu"
    )


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a JSON file; `text_config__x` is the key x of text_config."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for key, value in changes.items():
            section, _, inner = key.rpartition("__")
            (content[section] if section else content)[inner] = value
        (folder / file).write_text(json.dumps(content))

    return edit


def removed(pattern: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return remove


def as_pickle(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_siglip(folder: Path) -> None:
    sides = {
        "text_config": {**NARROW, "vocab_size": 20, "max_position_embeddings": 12},
        "vision_config": {**NARROW, "image_size": 32, "patch_size": 8},
    }
    transformers.SiglipModel(transformers.SiglipConfig(**sides)).save_pretrained(folder)


def as_vision_alone(folder: Path) -> None:
    transformers.CLIPVisionModel.from_pretrained(folder).save_pretrained(folder)


def as_sentences(folder: Path) -> None:
    shutil.rmtree(folder)
    sentence_encoder(folder)


def with_another_token(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<person>"])
    tokenizer.save_pretrained(folder)


def with_legacy_end(folder: Path) -> None:
    """A token behind the end token, and the rule of the first CLIP checkpoints, which would pool at it."""
    clip_folder(folder, text={"vocab_size": len(clip_tokenizer()) + 1, "eos_token_id": 2})
    with_another_token(folder)


REFUSED: dict[str, tuple[Callable[[Path], None], str, int, tuple[str, ...]]] = {
    "nowhere": (shutil.rmtree, "text", 3, ("start.text: hf:", "no such folder")),
    "siglip": (as_siglip, "image", 2, ("start.image: hf:", "type 'siglip'", "CLIPModel alone", "timm:NAME")),
    "half": (as_vision_alone, "image", 2, ("'clip_vision_model'", "no projection", "whole CLIPModel")),
    "sentences": (as_sentences, "text", 2, ("start.text: hf:", "type 'bert'", "hf-text:DIR_OR_ID")),
    "pickle": (as_pickle, "text", 3, ("no safetensors weights", "save_pretrained")),
    "no tokenizer": (removed("token*"), "text", 3, ("tokenizer.json", "save_pretrained writes it")),
    "no processor": (removed("pre*"), "image", 3, ("preprocessor_config.json", "save_pretrained writes it")),
    "activation": (edited("config.json", text_config__hidden_act="relu"), "text", 2, ("is 'relu'", "quick_gelu")),
    "another end": (edited("config.json", text_config__eos_token_id=5), "text", 2, ("eos_token_id is 5", "write 713")),
    "behind the end": (with_legacy_end, "text", 2, ("pools at the highest id, up to 714", "write 713 as eos_token_id")),
    "vocabulary": (with_another_token, "text", 3, ("ids up to 714", "knows 714 tokens", "do not belong together")),
    "other pixels": (edited("preprocessor_config.json", crop_size={"height": 24, "width": 24}), "image", 2,
                     ("images of 24 pixels in 3 channels", "takes 32 pixels", "preprocessor_config.json")),
    "padded": (edited("preprocessor_config.json", do_pad=True), "image", 2, ("start.image: hf:", "do_pad = True")),
    "other layers": (edited("config.json", vision_config__num_hidden_layers=3), "image", 3,
                     ("start.image: hf:", "do not fit", "missing")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_start_is_refused_in_a_line(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, side, code, says = REFUSED[name]
    folder = clip_folder(tmp_path / "clip")
    damage(folder)
    words = ["train", "tiny", "--data", str(photos), "--method", "baseline", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--out", str(tmp_path / "run"), f"--start.{side}", f"hf:{folder}"])
    captured = capsys.readouterr()
    message = captured.err[captured.err.index("threetowers: start") :]
    assert stop.value.code == code and "Traceback" not in captured.out + captured.err
    assert [part for part in says if part not in message] == [], message
    assert not (tmp_path / "run" / "model.json").exists()


def swapped_norms(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(clip.BLOCK, "ln_1", "layer_norm2")
    patch.setitem(clip.BLOCK, "ln_2", "layer_norm1")


def other_tokenizer(patch: pytest.MonkeyPatch) -> None:
    def shorter(*given: Any) -> Any:
        rules = right(*given)
        rules.normalizer = None  # capital letters are letters of their own then
        return rules

    right = text.fast_rules
    patch.setattr(clip, "fast_rules", shorter)


@pytest.mark.parametrize(
    ("damage", "side", "says"),
    [(swapped_norms, "image", "computes other features"), (swapped_norms, "text", "computes other features"),
     (other_tokenizer, "text", "gives other ids")],
    ids=["image", "text", "tokenizer"],
)  # fmt: skip
def test_towers_that_compute_something_else_are_refused(
    damage: Callable[[pytest.MonkeyPatch], None],
    side: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_config: Config,
    tmp_path: Path,
) -> None:
    folder = clip_folder(tmp_path / "clip")
    damage(monkeypatch)
    start = StartConfig(**{side: f"hf:{folder}"})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"start.{side}: hf:.*{says}"):
        started(tiny_config, tmp_path / "run", start)


def test_a_third_tower_of_transformers_is_no_image_tower_and_the_way_is_named(
    tiny_config: Config, tmp_path: Path
) -> None:
    config: RunConfig = tiny_config(method="3t-warm", third=(f"hf:{clip_folder(tmp_path / 'clip')}",))
    with pytest.raises(UsageError, match=r"a CLIPModel of transformers as start\.image"):
        assemble(config, tmp_path / "run")
