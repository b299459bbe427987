"""Frozen towers out of transformers, the choice of features, bf16, and towers on the text side."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kit.pictures import noise
from kit.runs import Config
from kit.towers import image_tower, open_clip_folder, text_tower
from threetowers.config import ObjectiveConfig
from threetowers.data.transforms import fixed_view, normalise
from threetowers.errors import CheckpointError, UsageError
from threetowers.model import build
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.hf import image_spec
from threetowers.towers.frozen.load import KINDS, kind_of, load_frozen

SIZES = [(48, 48), (61, 50), (33, 97), (20, 31), (301, 200)]
NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.1, 0.2, 0.3],
                          "image_std": [0.4, 0.5, 0.6]},
    "BitImageProcessor": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
                          "image_mean": [0.3, 0.2, 0.1], "image_std": [0.3, 0.4, 0.5]},
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "SiglipImageProcessor": {"size": {"height": 32, "width": 32}},
}  # fmt: skip


def pixels_of(image: Image.Image, tower: FrozenTower) -> torch.Tensor:
    return torch.from_numpy(fixed_view(image, tower.image).copy())[None]


def save(folder: Path, model: Any, processor: str) -> Path:
    model.save_pretrained(folder)
    settings = {"image_processor_type": processor, **PROCESSORS[processor]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny vision models with random weights, saved as transformers saves them."""
    vision = {**NARROW, "image_size": 32, "patch_size": 8}
    text = {**NARROW, "vocab_size": 30, "max_position_embeddings": 12}
    registers = transformers.Dinov2WithRegistersConfig(**vision, num_register_tokens=3)
    built: dict[str, tuple[Callable[[], Any], str]] = {
        "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**vision)), "ViTImageProcessor"),
        "dinov2": (
            lambda: transformers.Dinov2Model(transformers.Dinov2Config(**vision)),
            "BitImageProcessor",
        ),
        "registers": (lambda: transformers.Dinov2WithRegistersModel(registers), "BitImageProcessor"),
        "clip": (
            lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)),
            "CLIPImageProcessor",
        ),
        "siglip": (
            lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)),
            "SiglipImageProcessor",
        ),
    }
    folders = {}
    with torch.random.fork_rng():
        for seed, (name, (make, processor)) in enumerate(built.items()):
            torch.manual_seed(seed)
            folders[name] = save(tmp_path_factory.mktemp(name), make(), processor)
    return folders


WORDS = ("a", "red", "green", "blue", "square", "circle", "at", "the", "top", "left", "of", "photo")


def word_tokenizer(**options: Any) -> Any:
    special = ("[CLS]", "[SEP]")
    words = ["[PAD]", "[UNK]", *special, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], 2), (special[1], 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=10, **options
    )


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.BertModel(
            transformers.BertConfig(**NARROW, vocab_size=20, max_position_embeddings=16)
        )
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny open_clip model in its plain CLIP layout, with its own 49k vocabulary."""
    return open_clip_folder(tmp_path_factory.mktemp("open_clip_pair"), context_length=12, vocab_size=49408)


CAPTIONS = [
    "a red square",
    "",
    "the photo of a green circle at the top left of the red blue square",
    "unknown",
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip"])
def test_numbers_that_enter_an_hf_tower_are_transformers_own(
    vision_folders: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    """The library's Pillow backend is matched; its backend on tensors rounds resized pixels differently."""
    tower = image_tower(f"hf:{vision_folders[name]}")
    processor = transformers.AutoImageProcessor.from_pretrained(vision_folders[name], backend="pil")
    image = noise(*size)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalise(pixels_of(image, tower), tower.image), theirs, rtol=0, atol=1e-5)
    assert tower.image.mean == tuple(processor.image_mean) and tower.image.std == tuple(processor.image_std)


@pytest.mark.parametrize("features", ["pooled", "cls", "mean"])
@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("dinov2", 1), ("registers", 4), ("clip", 1)])
def test_hf_features_are_the_outputs_that_their_names_say(
    vision_folders: dict[str, Path], name: str, prefix: int, features: str
) -> None:
    tower = image_tower(f"hf:{vision_folders[name]}", features=features)
    model = transformers.AutoModel.from_pretrained(vision_folders[name]).eval()
    image = noise(61, 50)
    processor = transformers.AutoImageProcessor.from_pretrained(vision_folders[name], backend="pil")
    with torch.no_grad():
        inputs = processor(image, return_tensors="pt")
        found = (model.vision_model if name == "clip" else model)(**inputs)
    expected = {
        "pooled": found.pooler_output,
        "cls": found.last_hidden_state[:, 0],
        "mean": found.last_hidden_state[:, prefix:].mean(1),
    }[features]
    torch.testing.assert_close(tower(pixels_of(image, tower)), expected, rtol=1e-5, atol=1e-5)
    assert tower.width == expected.shape[1]


def test_a_network_without_class_token_has_no_cls(vision_folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="no class token; take pooled or mean"):
        load_frozen(f"hf:{vision_folders['siglip']}", features="cls")


def test_a_model_saved_without_its_pooler_never_gets_a_random_one(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**NARROW, image_size=32, patch_size=8)
    save(tmp_path, transformers.ViTForImageClassification(config), "ViTImageProcessor")  # with a head, too
    with pytest.raises(CheckpointError, match=r"without its pooler.*cls or mean"):
        load_frozen(f"hf:{tmp_path}")
    first, second = (load_frozen(f"hf:{tmp_path}", features="cls") for _ in range(2))
    assert first.fingerprints() == second.fingerprints(), "nothing random is left in it"
    assert not any("pooler" in key for key in first.module.state_dict())


@pytest.mark.parametrize("damage", ["missing", "unexpected", "wrong shape"])
def test_hf_weights_that_do_not_fit_are_listed(
    vision_folders: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    model = transformers.ViTModel.from_pretrained(vision_folders["vit"])
    save(tmp_path, model, "ViTImageProcessor")
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = next(key for key in state if "attention" in key and key.endswith("weight"))
    if damage == "missing":
        del state[key]
    elif damage == "unexpected":
        key = "encoder.typo.weight"
        state[key] = torch.zeros(2)
    else:
        state[key] = torch.zeros(3, 3)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_frozen(f"hf:{tmp_path}")
    # transformers names a weight of the file as its model names it
    named = "typo" if damage == "unexpected" else "attention"
    assert re.search(f"{damage}: [^;]*{named}", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"height": 32, "width": 40}}, "resizes to"),
        ({"size": {"longest_edge": 32}}, "resizes to"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "without a centre crop"),
        ({"size": {"shortest_edge": 30}}, "crops"),
        ({"do_resize": False}, "does not resize"),
        ({"do_rescale": False}, "scale pixels"),
        ({"rescale_factor": 1 / 127.5}, "scale pixels"),
        ({"do_pad": True}, "do_pad"),
        ({"crop_pct": 0.9}, "crop_pct"),
    ],
)
def test_preprocessing_that_cannot_be_reproduced_is_refused(changes: dict[str, Any], words: str) -> None:
    settings = {**transformers.BitImageProcessorPil(**PROCESSORS["BitImageProcessor"]).to_dict()}
    assert image_spec(settings, "hf:x").resize_size == 37
    with pytest.raises(UsageError, match=words):
        image_spec({**settings, **changes}, "hf:x")


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("resnet50", UsageError, "timm:NAME"),
        ("tim:resnet50", UsageError, "timm:NAME"),
        ("timm:resnet5", UsageError, "did you mean `resnet50`"),
        ("timm:local-dir:/nowhere", CheckpointError, "config.json"),
        ("timm:test_convnext2@/nowhere.safetensors", CheckpointError, "no such file"),
        ("open_clip:ViT-B-33@x", UsageError, "did you mean"),
        ("open_clip:ViT-B-32", UsageError, "Published tags"),
        ("open_clip:local-dir:/nowhere", CheckpointError, "open_clip_config.json"),
        ("file:/nowhere", CheckpointError, "model.json"),
        ("hf:/nowhere", CheckpointError, "no such folder"),
        ("hf-text:./nowhere", CheckpointError, "no such folder"),
        ("hf:nobody/nothing", CheckpointError, r"could not be loaded.*Offline"),
        ("open_clip-text:local-dir:/nowhere", CheckpointError, "open_clip_config.json"),
        ("open_clip-text:ViT-B-32", UsageError, "open_clip-text:ViT-B-32@TAG"),
        ("text:x", UsageError, "hf-text:DIR_OR_ID"),
    ],
)
def test_names_that_cannot_be_loaded_say_why_in_one_line(
    spec: str, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", offline)
    with pytest.raises(kind, match=words) as error:
        load_frozen(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(
    vision_folders: dict[str, Path], tmp_path: Path, missing: str
) -> None:
    for file in vision_folders["vit"].iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=missing.removeprefix("model.")):
        load_frozen(f"hf:{tmp_path}")


@pytest.fixture(scope="session")
def timm_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm_vit")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = timm.create_model("test_vit", num_classes=3, reg_tokens=2)
    save_for_hf(model, str(folder), model_args={"reg_tokens": 2}, safe_serialization=True)
    return folder


def test_timm_features_are_the_outputs_that_their_names_say(timm_vit: Path, timm_tower: str) -> None:
    for spec in (f"timm:local-dir:{timm_vit}", timm_tower):
        towers = {name: image_tower(spec, features=name) for name in ("pooled", "mean")}
        model: Any = towers["mean"].module.trunk
        pixels = pixels_of(noise(61, 50), towers["mean"])
        with torch.no_grad():
            found = model.forward_features(normalise(pixels, towers["mean"].image))
        mean = found[:, 3:].mean(1) if found.ndim == 3 else found.mean((2, 3))
        torch.testing.assert_close(towers["mean"](pixels), mean)
        assert towers["mean"].width == mean.shape[1]
        if found.ndim == 3:
            cls = image_tower(spec, features="cls")
            torch.testing.assert_close(cls(pixels), found[:, 0])
        else:
            with pytest.raises(UsageError, match="no class token"):
                load_frozen(spec, features="cls")
        parts = {name: tower.fingerprints() for name, tower in towers.items()}
        assert parts["pooled"]["weights"] == parts["mean"]["weights"]
        assert parts["pooled"]["features"] == "pooled" and parts["mean"]["features"] == "mean"


def test_open_clip_gives_pooled_features_only(open_clip_pair: Path) -> None:
    for prefix in ("open_clip", "open_clip-text"):
        with pytest.raises(UsageError, match="third_features = pooled"):
            load_frozen(f"{prefix}:local-dir:{open_clip_pair}", features="mean")


def every_tower(request: pytest.FixtureRequest) -> list[tuple[str, Any]]:
    """Specs of all kinds, with an input for each."""
    folders = request.getfixturevalue("vision_folders")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    larger = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    pair = request.getfixturevalue("open_clip_pair")
    timm_tower = request.getfixturevalue("timm_tower")
    towers = [
        (timm_tower, larger),
        (f"file:{timm_tower.removeprefix('timm:local-dir:')}", larger),
        ("shapes:matched", pixels),
        (f"hf:{folders['vit']}", pixels),
        (f"hf:{folders['dinov2']}", pixels),
        (f"open_clip:local-dir:{pair}", pixels),
        (f"hf-text:{request.getfixturevalue('bert_folder')}", CAPTIONS),
        (f"open_clip-text:local-dir:{pair}", CAPTIONS),
    ]
    assert {kind_of(spec)[0] for spec, _ in towers} == set(KINDS), "a kind without a tower to try it on"
    return towers


def run(tower: FrozenTower, inputs: Any) -> torch.Tensor:
    return tower(tower.tokenizer(inputs) if tower.reads == "texts" else inputs)


def test_every_tower_is_eval_for_ever_without_gradient(request: pytest.FixtureRequest) -> None:
    for spec, inputs in every_tower(request):
        tower = load_frozen(spec)
        tower.module.train()
        features = run(tower, inputs)
        assert not tower.module.training and not features.requires_grad, spec
        assert features.shape == (len(inputs), tower.width) and features.dtype == torch.float32, spec
        assert torch.equal(features, run(tower, inputs)), spec
        assert not any(parameter.requires_grad for parameter in tower.module.parameters()), spec


def test_one_changed_byte_of_weights_changes_that_fingerprint_and_no_other(
    request: pytest.FixtureRequest,
) -> None:
    for spec, _ in every_tower(request):
        tower = load_frozen(spec)
        before = tower.fingerprints()
        assert set(before) == {"weights", "preprocessing", "features"}
        assert load_frozen(spec).fingerprints() == before, spec
        parameter = next(p for p in tower.module.parameters() if p.ndim <= 2 and p.numel() > 1)
        parameter.view(torch.uint8).reshape(-1)[5] ^= 1
        after = tower.fingerprints()
        assert after["weights"] != before["weights"], spec
        assert {**after, "weights": ""} == {**before, "weights": ""}, spec
        assert tower.fingerprint() != load_frozen(spec).fingerprint(), spec


def test_other_preprocessing_changes_that_fingerprint_and_no_other(
    vision_folders: dict[str, Path], bert_folder: Path, tmp_path: Path
) -> None:
    before = load_frozen(f"hf:{vision_folders['vit']}").fingerprints()
    for file in vision_folders["vit"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 3}))
    after = load_frozen(f"hf:{tmp_path}").fingerprints()
    assert after["preprocessing"] != before["preprocessing"]
    assert {**after, "preprocessing": ""} == {**before, "preprocessing": ""}

    tower = text_tower(f"hf-text:{bert_folder}")
    before = tower.fingerprints()
    tower.tokenizer(["a red square"])
    assert tower.fingerprints() == before, "reading texts leaves no trace"
    tower.tokenizer.limit = 5  # type: ignore[attr-defined]
    assert tower.fingerprints()["preprocessing"] != before["preprocessing"]


def test_bf16_is_near_fp32_and_part_of_the_fingerprint(request: pytest.FixtureRequest) -> None:
    for spec, inputs in every_tower(request):
        exact, fast = load_frozen(spec), load_frozen(spec, precision="bf16")
        assert all(p.dtype == torch.bfloat16 for p in fast.module.parameters()), spec
        a, b = run(exact, inputs), run(fast, inputs)
        assert b.dtype == torch.float32
        assert float((a - b).norm() / a.norm()) < 0.03, spec
        assert not torch.equal(a, b), spec
        assert fast.fingerprints()["features"] == "pooled in bf16"
        assert fast.fingerprint() != exact.fingerprint(), spec


@pytest.mark.parametrize("features", ["pooled", "cls", "mean"])
def test_hf_text_features_are_the_librarys_own(bert_folder: Path, features: str) -> None:
    tower = text_tower(f"hf-text:{bert_folder}", features=features)
    model = transformers.BertModel.from_pretrained(bert_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder)
    inputs = tokenizer(CAPTIONS, padding=True, truncation=True, max_length=10, return_tensors="pt")
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    mask = inputs["attention_mask"].unsqueeze(-1)
    expected = {
        "pooled": found.pooler_output,
        "cls": found.last_hidden_state[:, 0],
        "mean": (found.last_hidden_state * mask).sum(1) / mask.sum(1),
    }[features]
    tokens = tower.tokenizer(CAPTIONS)
    assert tokens.dtype == torch.int64
    assert torch.equal(tower.tokenizer.lengths(tokens), inputs["attention_mask"].sum(1))
    assert torch.equal(tokens.clamp(min=0), inputs["input_ids"]), "id 0 pads in this vocabulary"
    torch.testing.assert_close(tower(tokens), expected, rtol=1e-5, atol=1e-6)
    for caption, together in zip(CAPTIONS, tower(tokens), strict=True):
        alone = tower(tower.tokenizer([caption]))[0]
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_a_vocabulary_that_pads_with_its_end_token_loses_no_end_token(
    bert_folder: Path, tmp_path: Path
) -> None:
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    padded, plain = (text_tower(f"hf-text:{folder}", features="mean") for folder in (tmp_path, bert_folder))
    torch.testing.assert_close(padded(padded.tokenizer(CAPTIONS)), plain(plain.tokenizer(CAPTIONS)))


def test_a_tokenizer_without_attention_mask_pads_to_full_length(tmp_path: Path) -> None:
    """SigLIP's convention: its text tower reads the padding, so the library's call is repeated to the letter."""
    config = transformers.SiglipConfig(
        text_config={**NARROW, "vocab_size": 20, "max_position_embeddings": 10},
        vision_config={**NARROW, "image_size": 32, "patch_size": 8},
    )
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = word_tokenizer(model_input_names=["input_ids"])
    tokenizer.save_pretrained(tmp_path)
    tower = text_tower(f"hf-text:{tmp_path}")
    tokens = tower.tokenizer(CAPTIONS[:1])
    theirs = tokenizer(
        CAPTIONS[:1], padding="max_length", truncation=True, max_length=10, return_tensors="pt"
    )
    assert torch.equal(tokens, theirs["input_ids"]) and tokens.shape == (1, 10)
    with torch.no_grad():
        expected = model.text_model(input_ids=theirs["input_ids"]).pooler_output
    torch.testing.assert_close(tower(tokens), expected, rtol=1e-5, atol=1e-6)


def test_the_text_side_of_an_image_text_model_is_meant(
    vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in vision_folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    word_tokenizer().save_pretrained(tmp_path)
    tower = text_tower(f"hf-text:{tmp_path}")
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        CAPTIONS, padding=True, truncation=True, max_length=10, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(tower(tower.tokenizer(CAPTIONS)), expected, rtol=1e-5, atol=1e-6)
    assert not any("vision" in key for key in tower.module.state_dict())


def test_open_clip_text_is_encode_text_of_its_model(open_clip_pair: Path) -> None:
    tower = text_tower(f"open_clip-text:local-dir:{open_clip_pair}")
    model = open_clip.create_model(f"local-dir:{open_clip_pair}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{open_clip_pair}")(CAPTIONS)
    with torch.no_grad():
        expected = model.encode_text(tokens)
    assert torch.equal(tower.tokenizer(CAPTIONS), tokens)
    torch.testing.assert_close(tower(tokens), expected, rtol=1e-5, atol=1e-6)
    longest = int(tower.tokenizer.lengths(tokens[:1]).max())
    torch.testing.assert_close(tower(tokens[:1, :longest]), expected[:1], rtol=1e-5, atol=1e-6)
    assert tower.width == 20


def test_a_text_tower_is_a_third_tower_of_3t_and_never_an_image_tower(
    bert_folder: Path, tiny_config: Config
) -> None:
    tower = load_frozen(f"hf-text:{bert_folder}")
    model, _ = build(tiny_config(third=(tower.spec,)), {"third": tower}, {"vocab_size": 300})
    feats = model.features(
        pixels=torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        tokens=torch.randint(1, 9, (4, 16)),
        thirds={"third": run(tower, CAPTIONS)},
    )
    total, rows = model.loss(feats)
    assert set(rows) == {"img-txt", "img-third", "txt-third"} and bool(torch.isfinite(total))
    for method in ("lit", "lit-unlocked"):
        with pytest.raises(UsageError, match="reads texts"):
            build(tiny_config(third=(tower.spec,), method=method), {"third": tower}, {"vocab_size": 300})


@pytest.mark.parametrize("options", [{"features": "mean"}, {"precision": "bf16"}])
def test_lit_takes_a_tower_as_its_library_builds_it(
    timm_tower: str, tiny_config: Config, options: dict[str, str]
) -> None:
    config = tiny_config(method="lit", objective=ObjectiveConfig())
    with pytest.raises(UsageError, match=r"third_features = pooled and third_precision = fp32"):
        build(config, {"third": load_frozen(timm_tower, **options)}, {"vocab_size": 300})
