"""transformers computes the same embeddings from an exported run as we do, or the export is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kit.runs import Config, with_vit
from threetowers.config import RunConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.suite.target import open_target
from threetowers.export import inputs
from threetowers.export import transformers as export
from threetowers.export.folder import write_json
from threetowers.export.open_clip import export_open_clip
from threetowers.export.transformers import export_transformers
from threetowers.objective.losses import unit
from threetowers.run.finished import FinishedRun, load_run
from threetowers.towers import clip
from threetowers.train.loop import train

TEXTS = [
    "a red square at the top left",
    "Ein Größenvergleich, sehr lang " * 9,
    "",
    "the  bottom\nright is blue",
]


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def with_text(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, pair=replace(config.pair, text={**config.pair.text, **changes}))


@pytest.fixture
def run(folder: Path, tiny_config: Config) -> Path:
    """A finished run of open_clip's own towers with a vocabulary of its own, trained once."""
    if not (folder / "run").exists():
        train(with_vit(tiny_config(steps=2)), folder / "run")
    return folder / "run"


@pytest.fixture
def exported(run: Path, folder: Path) -> Path:
    return (
        folder / "exported"
        if (folder / "exported").exists()
        else export_transformers(run, folder / "exported")
    )


def image_vectors(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return unit(model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output)


def text_vectors(folder: Path, texts: list[str], padding: Any = True) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return unit(model.get_text_features(**tokens).pooler_output)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def with_floor(finished: FinishedRun) -> FinishedRun:
    architecture = finished.architecture
    return replace(
        finished, architecture=replace(architecture, image=replace(architecture.image, centre="floor"))
    )


VARIANTS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "a trained vocabulary": lambda config: config,
    "open_clip's vocabulary": lambda config: replace(config, pair=replace(config.pair, tokenizer="open_clip")),
    "no text projection": lambda config: with_text(config, width=24, heads=2, proj_type="none"),
    "another MLP, epsilon and activation": lambda config: with_text(
        with_vit(config, mlp_ratio=2.5, norm_kwargs={"eps": 1e-3}), act_kwargs={"approximate": "tanh"}  # type: ignore[arg-type]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same_embeddings(name: str, tiny_config: Config, tmp_path: Path) -> None:
    train(VARIANTS[name](with_vit(tiny_config(method="baseline", third=(), steps=2))), tmp_path / "run")
    folder = export_transformers(tmp_path / "run", tmp_path / "exported")
    ours = load_run(tmp_path / "run")
    close(text_vectors(folder, TEXTS), ours.encode_text(TEXTS))
    close(text_vectors(folder, TEXTS, "max_length"), ours.encode_text(TEXTS))
    even = pictures((48, 48), (60, 38), (31, 90), (32, 32), (32, 33))  # margins that both round alike
    close(image_vectors(folder, even), ours.encode_image(even))
    odd = pictures((32, 35), (60, 37), (31, 89))
    close(image_vectors(folder, odd), with_floor(ours).encode_image(odd))
    scale = transformers.AutoModel.from_pretrained(folder).logit_scale.exp().item()
    assert scale == pytest.approx(ours.scale, rel=1e-6)


def test_the_end_token_is_moved_away_from_the_id_that_means_the_highest_one(
    run: Path, exported: Path
) -> None:
    finished = load_run(run)
    assert inputs.end_id(finished.tokenizer) == clip.ARGMAX_ID
    config = json.loads((exported / "config.json").read_text())["text_config"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert config["eos_token_id"] == tokenizer.eos_token_id == config["vocab_size"] - 1
    assert config["max_position_embeddings"] == tokenizer.model_max_length == 16


def test_a_text_has_the_tokens_of_training_whatever_stands_in_it(run: Path, exported: Path) -> None:
    own, last = load_run(run).tokenizer, 299
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    other = {2: last, last: 2}

    @given(st.text(st.characters(min_codepoint=9, max_codepoint=126, exclude_categories=["Cc"]), max_size=40))
    def check(text: str) -> None:
        text = text.replace("&", "")  # HTML entities are a difference that the card names
        tokens = own([text])
        expected = [other.get(id, id) for id in tokens[0, : own.lengths(tokens)[0]].tolist()]
        assert tokenizer(text, truncation=True)["input_ids"] == expected

    check()
    for text in ("a <end> b", "<pad><start>", " a\n\tb "):
        tokens = own([text])
        expected = [other.get(id, id) for id in tokens[0, : own.lengths(tokens)[0]].tolist()]
        assert tokenizer(text, truncation=True)["input_ids"] == expected


@pytest.mark.parametrize("kind", ["template", "bert", "roberta", "sequence"])
def test_any_post_processor_gets_the_new_ids(kind: str, tmp_path: Path) -> None:
    vocabulary = {token: id for id, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b"])}
    template = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = {
        "template": template,
        "bert": processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
        "roberta": processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1)),
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
    }[kind]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert export._move_end(2, tmp_path / "tokenizer.json") == (2, 5)
    moved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a b a", "", "b"):
        expected = [{2: 5, 5: 2}.get(id, id) for id in tokenizer.encode(text).ids]
        assert moved.encode(text).ids == expected
        assert moved.encode(text).tokens == tokenizer.encode(text).tokens
    assert moved.token_to_id("[SEP]") == 5


def test_a_vocabulary_whose_order_is_its_ids_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("<end>", 0.0)], 0, False)).save(str(path))
    with pytest.raises(UsageError, match=r"end token has the id 2.*Unigram.*--to open_clip"):
        export._move_end(2, path)
    assert export._move_end(3, path) is None


def test_an_export_is_a_target_of_the_suite(run: Path, exported: Path) -> None:
    target = open_target(str(exported))
    text = unit(target.text.module(target.text.inputs(TEXTS)))  # type: ignore[operator]
    close(text.detach(), load_run(run).encode_text(TEXTS))
    assert target.scale == pytest.approx(load_run(run).scale, rel=1e-6)


def test_a_locked_image_tower_of_open_clips_own_is_exported(
    run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    train(tiny_config(method="lit", third=(f"file:{run}",), steps=2), tmp_path / "lit")
    folder = export_transformers(tmp_path / "lit", tmp_path / "exported")
    images = pictures((48, 48), (60, 38))
    close(image_vectors(folder, images), load_run(tmp_path / "lit").encode_image(images))


REFUSED: dict[str, tuple[Callable[[RunConfig], RunConfig], str]] = {
    "mean of tokens": (lambda config: with_vit(config, pool_type="avg"), "does not end in its class token"),  # type: ignore[arg-type]
    "no first norm": (lambda config: with_vit(config, no_ln_pre=True), "no layer norm before its blocks"),
    "layer scale": (lambda config: with_vit(config, ls_init_value=0.1), "the image tower has .* a layer scale"),
    "biased": (lambda config: with_text(with_vit(config), proj_bias=True), "projection has a bias"),
    "not causal": (lambda config: with_text(with_vit(config), no_causal_mask=True), "not causal"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_clip_cannot_hold_is_refused_with_the_reason(
    name: str, tiny_config: Config, tmp_path: Path
) -> None:
    change, reason = REFUSED[name]
    train(change(tiny_config(steps=1)), tmp_path / "run")
    with pytest.raises(UsageError, match=f"--to transformers: .*{reason}.*--to open_clip"):
        export_transformers(tmp_path / "run", tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.glob("*exported*")) == []


def test_a_filter_that_the_default_processor_lacks_is_refused(run: Path) -> None:
    spec = load_run(run).architecture.image
    for name in ("box", "hamming"):
        with pytest.raises(UsageError, match=f"resized with {name}.*--to open_clip"):
            inputs.processor_settings(replace(spec, interpolation=name), "--to transformers")  # type: ignore[arg-type]


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("resize_size", [0, 32, 37])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "lanczos"])
def test_the_image_processor_makes_the_runs_pixels(
    resize: str, resize_size: int, interpolation: str, run: Path, tmp_path: Path
) -> None:
    finished = with_floor(load_run(run))
    changes: Any = {"resize": resize, "resize_size": resize_size, "interpolation": interpolation}
    spec = replace(finished.architecture.image, **changes)
    write_json(tmp_path / "preprocessor_config.json", inputs.processor_settings(spec, "x"))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    images = pictures((48, 48), (61, 37), (31, 90), (32, 32))
    found = finished.img(processor(images=images, return_tensors="pt")["pixel_values"])
    ours = replace(finished, architecture=replace(finished.architecture, image=spec))
    close(unit(found), ours.encode_image(images))


def swapped_norms(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(clip.BLOCK, "ln_1", "layer_norm2")
    patch.setitem(clip.BLOCK, "ln_2", "layer_norm1")


def end_left_where_it_is(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(export, "ARGMAX_ID", -1)


def other_mean(patch: pytest.MonkeyPatch) -> None:
    right = inputs.processor_settings
    patch.setattr(export, "processor_settings", lambda *a: right(*a) | {"image_mean": [0.48, 0.46, 0.41]})


def other_activation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clip, "activation", lambda block: "quick_gelu")


@pytest.mark.parametrize("damage", [swapped_norms, end_left_where_it_is, other_mean, other_activation])
def test_an_export_that_computes_other_vectors_fails_and_leaves_what_was_there(
    damage: Callable[[pytest.MonkeyPatch], None], run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    damage(monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"transformers computes other (image|text) vectors.*Nothing was written"
    ):
        export_transformers(run, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_no_other_model_is_overwritten(run: Path, exported: Path, tmp_path: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    for other in (run, export_open_clip(run, tmp_path / "open_clip")):
        with pytest.raises(UsageError, match=r"another model \((model|open_clip_config)\.json\)"):
            export_transformers(run, other)
    assert (run / "model.safetensors").read_bytes() == before
    written = {path.name: path.read_bytes() for path in exported.iterdir()}
    export_transformers(run, exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == written


def test_the_card_names_the_differences_and_a_readme_of_somebody_else_is_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("mine")
    export_transformers(run, tmp_path)
    said = capsys.readouterr().err
    card = (tmp_path / "README-threetowers.md").read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_text() == "mine"
    for text in (card, said):
        for word in ("EXIF rotation", "transparency", 'backend="pil"', "one pixel", "ftfy"):
            assert word in text
    each = r"(to \d\.\de-\d\d|exactly)"
    assert re.search(rf"transformers computes the run's vectors, of images {each}, of texts {each}", said)


def test_the_code_of_the_card_runs(exported: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block is for sentence-transformers, which gives the same vectors out of the same folder."""
    photo = exported.parent / "photo.jpg"
    pictures((48, 48))[0].save(photo)
    monkeypatch.chdir(exported.parent)
    blocks = re.findall(
        r"```python\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) == 2
    ours = load_run(run)
    for code in blocks:
        names: dict[str, Any] = {}
        exec(code, names)
        close(unit(torch.as_tensor(names["image"])), ours.encode_image([photo]))
        close(unit(torch.as_tensor(names["text"])), ours.encode_text(["a photo"]))


def test_sentence_transformers_computes_the_same_embeddings(exported: Path, run: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported), device="cpu", processor_kwargs={"backend": "pil"})
    ours, images = load_run(run), pictures((48, 48), (60, 38), (31, 90))
    close(torch.from_numpy(model.encode(TEXTS, normalize_embeddings=True)), ours.encode_text(TEXTS))
    close(torch.from_numpy(model.encode(images, normalize_embeddings=True)), ours.encode_image(images))
