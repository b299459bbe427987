"""Weights, towers and checkpoints as people have them on disk: what is not what its name says is named or read."""

import errno
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from kit.runs import Config, interrupt_at
from threetowers.commands.convert import convert
from threetowers.commands.validate import validate
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, RunConfig
from threetowers.data.decode import decode
from threetowers.data.tokenize import load_tokenizer
from threetowers.errors import CheckpointError, DataError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.export.open_clip import USAGE
from threetowers.run import thirds
from threetowers.towers import weights
from threetowers.towers.frozen import load as frozen
from threetowers.towers.frozen.hf import load_model
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.weights import read_safetensors
from threetowers.train.loop import train

PAIR = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}

NO_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page"),
    "denied": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "json": (b'{"error": "not found"}', "JSON, without weights"),
    "empty": (b"", "is empty"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "is an archive"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_that_hold_no_weights_are_called_what_they_are(kind: str, ending: str, tmp_path: Path) -> None:
    content, expected = NO_WEIGHTS[kind]
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as found:
        convert(path, tmp_path / "out.safetensors")
    assert "weights_only=False" not in str(found.value)


@pytest.mark.parametrize("prefix", ["hf", "open_clip"])
def test_folders_with_a_pointer_in_place_of_weights_say_so(prefix: str, tmp_path: Path) -> None:
    for name in ("config.json", "open_clip_config.json"):
        (tmp_path / name).write_text('{"model_cfg": {}}')
    (tmp_path / "model.safetensors").write_bytes(NO_WEIGHTS["git lfs"][0])
    with pytest.raises(CheckpointError, match="git lfs pull"):
        if prefix == "hf":
            load_model(str(tmp_path), "hf:x")
        else:
            load_frozen(f"open_clip:local-dir:{tmp_path}")


def test_an_open_clip_folder_whose_config_is_damaged_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{")
    save_file(PAIR, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        load_frozen(f"open_clip:local-dir:{tmp_path}")


def test_a_checkpoint_and_safetensors_under_each_others_names(tmp_path: Path) -> None:
    torch.save(PAIR, tmp_path / "a.safetensors")
    save_file(PAIR, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"rename it to \.pt"):
        read_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"rename it to \.safetensors"):
        convert(tmp_path / "b.pt", tmp_path / "out.safetensors")


ODD_TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "empty": lambda: torch.zeros(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_safetensors_cannot_hold_are_named(kind: str, tmp_path: Path) -> None:
    torch.save({"a": ODD_TENSORS[kind]()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"the tensor a is {kind}"):
        convert(tmp_path / "model.pt", tmp_path / "out.safetensors")


def test_parts_of_one_model_are_joined_and_missing_ones_named(tmp_path: Path) -> None:
    for number, name in enumerate(PAIR, start=1):
        torch.save(
            {f"model.{name}" if number == 1 else name: PAIR[name]},
            tmp_path / f"pytorch_model-0000{number}-of-00002.bin",
        )
    first = tmp_path / "pytorch_model-00001-of-00002.bin"
    convert(first, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == {"model.a.weight", "a.bias"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        convert(first, tmp_path / "other.safetensors")


def test_what_torch_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": PAIR, "names": np.array([None, 1], dtype=object)}, path)
    with pytest.raises(CheckpointError, match="ObjectDType"):
        convert(path, tmp_path / "other.safetensors")


def test_wrappers_in_the_midst_of_names_are_taken_out(tmp_path: Path) -> None:
    network = timm.create_model("test_vit")
    state = {
        f"_fsdp_wrapped_module.{name.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}": value
        for name, value in network.state_dict().items()
    }
    save_file(state, tmp_path / "wrapped.safetensors")
    tower = load_frozen(f"timm:test_vit@{tmp_path / 'wrapped.safetensors'}")
    trunk = tower.module.trunk
    assert torch.equal(trunk.get_parameter("cls_token"), network.cls_token)  # type: ignore[union-attr, arg-type, operator]
    torch.save(state, tmp_path / "wrapped.pt")
    convert(tmp_path / "wrapped.pt", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == network.state_dict().keys()


def test_an_at_without_a_file_never_means_random_weights() -> None:
    with pytest.raises(UsageError, match="no file behind the @"):
        load_frozen("timm:test_vit@")


def timm_folder(folder: Path, name: str, **options: Any) -> str:
    model = timm.create_model(name, num_classes=0, **options)
    save_for_hf(model, str(folder), safe_serialization=True, model_args=options)
    return f"timm:local-dir:{folder}"


@pytest.mark.parametrize("name", ["test_vit", "test_convnext2", "test_resnet"])
def test_towers_without_pooling_are_named_and_may_give_their_mean(name: str, tmp_path: Path) -> None:
    spec = timm_folder(tmp_path, name, global_pool="")
    with pytest.raises(UsageError, match="does not pool"):
        load_frozen(spec)
    load_frozen(spec, features="mean")


def test_an_interpolation_that_is_none_is_named(tmp_path: Path) -> None:
    spec = timm_folder(tmp_path, "test_vit")
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["interpolation"] = "random"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="'random'"):
        load_frozen(spec)


def test_a_padding_token_in_a_caption_is_text_for_a_unigram_vocabulary(tmp_path: Path) -> None:
    tokenizer = FastTokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = ["a red sign", "two pads <>", "</s> end"] * 5
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>")
    )
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path), 24)
    tokens = loaded(["a <pad> red sign"])
    inner = tokens[0, : int(loaded.lengths(tokens)) - 1]
    assert 0 not in inner.tolist()


def other_weights(spec: str) -> None:
    path = Path(spec.removeprefix("timm:local-dir:")) / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(path).items()}, path)


@pytest.fixture
def own_tower(tmp_path: Path) -> str:
    return timm_folder(tmp_path / "tower", "test_convnext2")


def test_a_tower_replaced_after_training_is_said_by_evaluate(
    tiny_config: Config, own_tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(third=(own_tower,), steps=1), tmp_path / "run")
    evaluate_run(tmp_path / "run")
    assert "is not the one" not in capsys.readouterr().err
    other_weights(own_tower)
    evaluate_run(tmp_path / "run")
    assert "is not the one that this run was trained with" in capsys.readouterr().err


def test_a_run_is_not_evaluated_with_another_image_tower_of_its_own(
    tiny_config: Config, own_tower: str, tmp_path: Path
) -> None:
    train(tiny_config(third=(own_tower,), steps=1, method="lit"), tmp_path / "run")
    other_weights(own_tower)
    with pytest.raises(CheckpointError, match="image tower of the trained model"):
        evaluate_run(tmp_path / "run")


def test_a_run_does_not_continue_with_another_tower(
    tiny_config: Config, own_tower: str, tmp_path: Path
) -> None:
    config = tiny_config(third=(own_tower,))
    interrupt_at(3, config, tmp_path / "run")
    other_weights(own_tower)
    with pytest.raises(CheckpointError, match="third tower"):
        train(config, tmp_path / "run")


def test_weights_that_may_not_be_read_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(PAIR, path)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def missing(*_: object) -> None:
        raise FileNotFoundError("No such file or directory")  # the library's answer to either

    monkeypatch.setattr(weights, "load_file", missing)
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match="Permission denied"):
        read_safetensors(path)


def few_photos(photos: Path, folder: Path, num: int) -> str:
    rows = photos.read_text().splitlines()[: num + 1]
    for row in rows[1:]:
        shutil.copy(photos.parent / row.partition(",")[0], folder)
    (folder / "captions.csv").write_text("\n".join(rows))
    return str(folder / "captions.csv")


def comparing(config: RunConfig, out: Path) -> object:
    return compare(config, CompareConfig(methods=("3t",), lrs=(1e-3,)), out)


@pytest.mark.parametrize("command", [train, lambda *each: list(validate(*each)), comparing])
def test_too_little_data_for_one_batch_is_said_before_anything_is_embedded(
    command: Callable[[RunConfig, Path], object],
    tiny_config: Config,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thirds, "find_or_make_store", lambda *_, **__: pytest.fail("embedded"))
    monkeypatch.setattr(frozen, "load_frozen", lambda *_, **__: pytest.fail("loaded"))
    config = tiny_config(data=few_photos(photos, tmp_path, 12))
    with pytest.raises(UsageError, match="batch_size is 16"):
        command(config, tmp_path / "run")
    every = replace(config.inputs, val_fraction=0.5, test_fraction=0.49)
    with pytest.raises(DataError, match="no image is left to train on"):
        command(replace(config, inputs=every), tmp_path / "run")


def test_the_function_of_an_export_lays_transparent_16_bit_grey_on_white() -> None:
    code = USAGE.format(folder="exported", differences="")
    names: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps}
    exec(code[code.index("def to_rgb") : code.index("pixels = ")], names)
    file = io.BytesIO()
    wide = np.array([[515, 60_000], [515, 7]], np.uint16)
    Image.fromarray(wide).save(file, "PNG", transparency=515)
    theirs = names["to_rgb"](Image.open(file))
    assert np.array_equal(np.asarray(theirs), np.asarray(decode(file.getvalue(), "a.png")))


def vision_folder(folder: Path, prefix: str = "") -> str:
    """A vision tower of CLIP with its projection, as transformers saves it; prefix: before every name."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    path = folder / "model.safetensors"
    state = {f"{prefix}{name}": value for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    return f"hf:{folder}"


def test_a_transformers_model_with_a_projection_gives_its_pooled_features(tmp_path: Path) -> None:
    assert load_frozen(vision_folder(tmp_path)).width == 32


def test_a_prefix_in_a_transformers_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'module\.' stands before every name, `threetowers convert`"):
        load_frozen(vision_folder(tmp_path, "module."))


@pytest.mark.parametrize("name", ["epoch_1.pth.tar", "weights.pkl", "weights", "model.th"])
def test_checkpoints_under_other_endings_are_never_opened_as_towers(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save(PAIR, path)
    with pytest.raises(CheckpointError, match=r"only safetensors are read.*threetowers convert"):
        load_frozen(f"open_clip:ViT-B-32@{path}")


def test_a_runs_own_model_as_weights_of_the_pair_is_named_with_the_remedy(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(steps=1)
    train(config, tmp_path / "run")
    own = replace(config, pair=replace(config.pair, weights=str(tmp_path / "run" / "model.safetensors")))
    with pytest.raises(CheckpointError, match="threetowers export"):
        train(own, tmp_path / "other")
