"""Text towers that start at a sentence encoder: features, widths, rates, resuming, exports and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import Tensor

from kit.runs import Config, assert_same_weights, interrupt_at, weights
from kit.sentences import sentence_encoder
from kit.towers import open_clip_folder
from threetowers.commands.push import export_files
from threetowers.commands.validate import validate
from threetowers.config import ObjectiveConfig, OptimConfig, StartConfig
from threetowers.errors import CheckpointError, UsageError
from threetowers.evaluate.suite.target import open_target
from threetowers.export.onnx import export_onnx, open_graph
from threetowers.export.open_clip import export_open_clip
from threetowers.export.transformers import export_transformers
from threetowers.objective.losses import unit
from threetowers.run.finished import FinishedRun, load_run
from threetowers.run.setup import assemble
from threetowers.towers.encoder import BESIDE
from threetowers.towers.pair import encode_text
from threetowers.towers.start import text_start
from threetowers.train.loop import train
from threetowers.train.optim import adamw

TEXTS = [
    "A red square at the top left",
    "blue",
    "the bottom is green, and the top is not",
    "",
    "It's 3 unknown words & " + "a red circle of the left " * 6,
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_encoder(tmp_path_factory.mktemp("encoder") / "mean")


def mean_of(folder: Path) -> Tensor:
    """TEXTS by sentence-transformers itself, which reads its own files."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    found = [model.encode([text], output_value="token_embeddings") for text in TEXTS]
    assert torch.allclose(
        torch.as_tensor(model.encode(TEXTS)),
        unit(torch.stack([tokens[0].mean(0) for tokens in found])),
        atol=1e-6,
    )
    return torch.stack([tokens[0].mean(0) for tokens in found])


def class_token_of(folder: Path) -> Tensor:
    """TEXTS by transformers itself, one by one, without any padding."""
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (transformers.AutoModel, transformers.AutoTokenizer)
    )
    with torch.no_grad():
        found = [
            model.eval()(**tokenizer(text, truncation=True, max_length=24, return_tensors="pt"))
            for text in TEXTS
        ]
    return torch.cat([each.last_hidden_state[:, 0] for each in found])


@pytest.mark.parametrize(
    ("options", "limit", "expected"),
    [({}, 20, mean_of), ({"legacy": True}, 20, mean_of), ({"roberta": True}, 20, mean_of),
     ({"pooling": "cls"}, 24, class_token_of), ({"pooling": "cls", "legacy": True}, 24, class_token_of),
     ({"pooling": None}, 24, class_token_of), ({"pooling": None, "roberta": True}, 24, class_token_of)],
)  # fmt: skip
def test_first_features_are_the_sources_own(
    options: dict[str, Any],
    limit: int,
    expected: Callable[[Path], Tensor],
    tiny_config: Config,
    tmp_path: Path,
) -> None:
    folder = sentence_encoder(tmp_path / "encoder", **options, max_seq_length=limit)
    start = StartConfig(text=f"hf-text:{folder}")
    setup = assemble(tiny_config(method="baseline", start=start), tmp_path / "run")
    txt: Any = setup.model.txt
    source = expected(folder)
    tokens = setup.tokenizer(TEXTS)
    assert tokens.shape == (5, limit) and txt.context_length == limit
    kept = txt.proj
    short = int(setup.tokenizer.lengths(tokens)[:3].max()) + 1
    for training in (False, True):  # dropout is off
        setup.model.train(training)
        with torch.no_grad():
            projected = setup.model.features(tokens=tokens)["txt"]
            txt.proj = torch.nn.Identity()
            torch.testing.assert_close(encode_text(txt, tokens), source, rtol=0, atol=1e-6)
            torch.testing.assert_close(encode_text(txt, tokens[:3, :short]), source[:3], rtol=0, atol=1e-6)
            txt.proj = kept
        torch.testing.assert_close(projected, source @ kept.weight.T, rtol=0, atol=1e-5)
    assert projected.shape == (5, 24), "a new projection leads to the width of the pair"


def test_padding_changes_nothing_and_gradients_reach_every_weight(
    encoder: Path, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(method="baseline", start=StartConfig(text=f"hf-text:{encoder}"))
    setup = assemble(config, tmp_path / "run")
    tokens, txt = setup.tokenizer(TEXTS), setup.model.txt
    for row, length in zip(tokens, setup.tokenizer.lengths(tokens).tolist(), strict=True):
        alone = encode_text(txt, row[None, :length])
        for width in (length + 1, 20):
            short = encode_text(txt, row[None, : min(width, 20)])
            torch.testing.assert_close(short, alone, rtol=0, atol=1e-6)
    encode_text(txt, tokens).square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in txt.parameters())
    changed = tokens.clone()
    changed[:, 1] = 1  # the unknown word
    assert not torch.allclose(encode_text(txt, changed), encode_text(txt, tokens), atol=1e-3)


@pytest.mark.parametrize(
    ("embed_dim", "lit_projection", "projects"), [(32, False, False), (32, True, True), (24, False, True)]
)
def test_a_projection_is_left_out_where_widths_agree_and_the_configuration_says_so(
    embed_dim: int, lit_projection: bool, projects: bool, encoder: Path, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(
        method="baseline", steps=2, start=StartConfig(text=f"hf-text:{encoder}"),
        pair=replace(tiny_config().pair, embed_dim=embed_dim), objective=ObjectiveConfig(lit_projection=lit_projection),
    )  # fmt: skip
    model = assemble(config, tmp_path / "run").model
    assert ("txt.proj.weight" in model.state_dict()) == projects and model.embed_dim == embed_dim
    train(config, tmp_path / "run")
    assert load_run(tmp_path / "run").encode_text(TEXTS).shape == (5, embed_dim)


def test_it_is_projected_to_the_space_of_an_image_tower_that_starts_as_half_of_a_pair(
    encoder: Path, tiny_config: Config, tmp_path: Path
) -> None:
    pair = f"open_clip:local-dir:{open_clip_folder(tmp_path / 'pair', 12, 64)}"
    start = StartConfig(image=pair, text=f"hf-text:{encoder}")
    setup = assemble(tiny_config(method="3t", start=start), tmp_path / "run")
    model = setup.model
    assert model.embed_dim == 20 and model.txt.get_submodule("proj").weight.shape == (20, 32)
    assert model.started == {"img": 0.15, "txt.transformer": 0.15}


def test_layers_rates_and_rules(encoder: Path, tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(
        method="baseline", start=StartConfig(text=f"hf-text:{encoder}", lr=0.2),
        optim=OptimConfig(lr=0.01, layer_decay=0.5, rules=("txt.transformer.encoder.layer.0.* lr=3 from=4",)),
    )  # fmt: skip
    model = assemble(config, tmp_path / "run").model
    groups = adamw(model, config.optim, model.started).param_groups
    rates = {name: group["lr_multiplier"] for group in groups for name in group["names"]}
    for part, rate in (
        ("embeddings.word_embeddings.weight", 0.2 / 8), ("embeddings.LayerNorm.bias", 0.2 / 8),
        ("encoder.layer.0.output.dense.weight", 3 / 4), ("encoder.layer.1.attention.self.key.bias", 0.2 / 2),
    ):  # fmt: skip
        assert rates[f"txt.transformer.{part}"] == pytest.approx(rate), part
    assert rates["txt.proj.weight"] == 1.0, "the new projection has the whole rate"
    said = "\n".join(validate(config, tmp_path / "run"))
    assert "txt: 20 tokens → 24" in said and "from step 4" in said
    assert "txt.transformer.encoder.layer.0" in said and "'[CLS]" in said


def test_a_stopped_run_continues_to_the_same_bits_and_micro_batches_are_the_batch(
    encoder: Path, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(
        method="3t", start=StartConfig(text=f"hf-text:{encoder}"), steps=6, checkpoint_every_steps=2,
        inputs=replace(tiny_config().inputs, mask_duplicates=True),
    )  # fmt: skip
    train(config, tmp_path / "whole")
    interrupt_at(3, config, tmp_path / "torn")
    assert train(config, tmp_path / "torn").finished
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")
    train(replace(config, micro_batch_size=5), tmp_path / "micro")
    whole, micro = weights(tmp_path / "whole"), weights(tmp_path / "micro")
    assert max(float((whole[key] - micro[key]).abs().max()) for key in whole) < 1e-4


@pytest.fixture
def run(folder: Path, encoder: Path, tiny_config: Config) -> Path:
    """A finished run, trained once; its encoder and its folder of stores are not there any more."""
    if not (folder / "run").exists():
        copy = shutil.copytree(encoder, folder / "copy")
        config = tiny_config(
            method="baseline", start=StartConfig(text=f"hf-text:{copy}"), grad_checkpointing=True
        )
        train(config, folder / "run")
        shutil.rmtree(copy)
    return folder / "run"


def exported_texts(folder: Path) -> Tensor:
    """TEXTS by open_clip out of an exported folder."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        return model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS), normalize=True)  # type: ignore[no-any-return]


def assert_equal(found: Tensor, finished: FinishedRun) -> None:
    torch.testing.assert_close(found, finished.encode_text(TEXTS), rtol=0, atol=1e-6)


def test_open_clip_loads_its_export_here_and_elsewhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = load_run(run)
    out = export_open_clip(run, tmp_path / "exported")
    assert "hf_model_name` in open_clip_config.json is the whole path" in capsys.readouterr().err
    assert str(tmp_path) not in (out / "README.md").read_text(), "a card names no folder of this machine"
    monkeypatch.chdir("/")
    assert_equal(exported_texts(out), finished)
    target = open_target(str(out))
    assert_equal(unit(target.text(target.text.tokens(TEXTS))), finished)
    moved = out.rename(tmp_path / "moved")
    path = moved / "open_clip_config.json"
    config = json.loads(path.read_text())
    assert "hf_config" not in config["model_cfg"]["text_cfg"]
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(moved / "text")
    path.write_text(json.dumps(config))
    assert_equal(exported_texts(moved), finished)
    with pytest.raises(UsageError, match=r"hf_model_name is a folder of this machine.*the name on the Hub"):
        export_files(moved)
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "someone/encoder"
    path.write_text(json.dumps(config))
    assert export_files(moved)[1] == ["text/config.json"]


def test_onnxruntime_computes_the_same_of_texts_of_any_length(run: Path, tmp_path: Path) -> None:
    finished = load_run(run)
    out = export_onnx(run, tmp_path / "exported")
    graph = open_graph(out / "onnx" / "text_model.onnx")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for texts in (TEXTS[:2], TEXTS[:3], TEXTS):
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(graph(tokens), finished.encode_text(texts), rtol=0, atol=1e-5)
    assert "sequence of at most 20" in (out / "README.md").read_text()


def test_transformers_has_no_model_for_its_pooling(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"an encoder of transformers that pools by .*export --to open_clip"):
        export_transformers(run, tmp_path / "exported")


def test_a_run_with_such_a_tower_is_a_start_itself(run: Path, tiny_config: Config, tmp_path: Path) -> None:
    first = load_run(run)
    config = tiny_config(method="baseline", start=StartConfig(text=f"file:{run}"))
    setup = assemble(config, tmp_path / "run")
    with torch.no_grad():
        found = setup.model.eval().features(tokens=setup.tokenizer(TEXTS))["txt"]
    assert_equal(unit(found), first)
    assert setup.model.started == {"txt": 0.15}, "its projection is not new"


def test_an_encoder_of_the_hub_is_read_from_the_cache_and_keeps_its_name(
    encoder: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--someone--encoder"
    shutil.copytree(encoder, cache / "snapshots" / "0")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    local, named = text_start(f"hf-text:{encoder}"), text_start("hf-text:someone/encoder")
    assert local.config == {**named.config, "hf_model_name": BESIDE}
    assert named.config["hf_model_name"] == "someone/encoder"
    assert all(torch.equal(named.state[key], value) for key, value in local.state.items())
    config = tiny_config(method="baseline", steps=1, start=StartConfig(text="hf-text:someone/encoder"))
    train(config, tmp_path / "run")
    out = export_open_clip(tmp_path / "run", tmp_path / "exported")
    assert not (out / "text").exists() and "someone/encoder` |" in (out / "README.md").read_text()
    assert_equal(exported_texts(out), load_run(tmp_path / "run"))
    edit("config.json", dtype="float16")(cache / "snapshots" / "0")
    half = text_start("hf-text:someone/encoder")
    assert half.config == local.config, "open_clip would build it in half precision from its name"
    with pytest.raises(
        CheckpointError, match=r"start\.text: hf-text:someone/other: .*Offline, give a folder"
    ):
        text_start("hf-text:someone/other")


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a JSON file of an encoder."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def other_network(folder: Path) -> None:
    options = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "vocab_size": 64}
    transformers.DistilBertModel(transformers.DistilBertConfig(**options)).save_pretrained(folder)


def other_vocabulary(folder: Path) -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.BertModel(transformers.BertConfig(**options, vocab_size=9)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "change", "expected"),
    [
        ({"pooling": "max"}, None, r"pools by max \(1_Pooling/config\.json\)"),
        ({"pooling": ["mean", "max"]}, None, "pools by mean and max"),
        ({"pooling": "max", "legacy": True}, None, "pools by max_tokens"),
        ({"modules": ("Transformer", "Pooling", "Dense")}, None, r"lists Dense, and .* without modules\.json"),
        ({"modules": ("Transformer",)}, None, "lists no Pooling"),
        ({}, other_network, "a network of the type distilbert, .* takes roberta, xlm-roberta, bert; .* third tower"),
        ({}, other_vocabulary, r"the tokenizer has \d+ tokens, and the network knows 9"),
        ({}, edit("tokenizer_config.json", pad_token="[UNK]"), r"no token for padding alone \(pad_token = '\[UNK\]'"),
        ({}, without("model.safetensors"), "no safetensors weights in the folder"),
        ({}, without("tokenizer.json", "vocab.txt", "tokenizer_config.json"), "tokenizer"),
        ({}, lambda folder: (folder / "modules.json").write_text("{"), r"modules\.json could not be loaded"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_text_tower_is_refused_with_the_reason(
    options: dict[str, Any], change: Any, expected: str, tiny_config: Config, tmp_path: Path
) -> None:
    folder = sentence_encoder(tmp_path / "encoder", **options)
    if change is not None:
        change(folder)
    config = tiny_config(method="baseline", start=StartConfig(text=f"hf-text:{folder}"))
    with pytest.raises((UsageError, CheckpointError), match=rf"start\.text: hf-text:{folder}: .*{expected}"):
        assemble(config, tmp_path / "run")


def test_lower_case_of_sentence_transformers_is_the_tokenizers(tmp_path: Path) -> None:
    folder = sentence_encoder(tmp_path / "encoder")
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    edit("sentence_bert_config.json", do_lower_case=True)(folder)
    edit("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(folder)
    tokenizer = text_start(f"hf-text:{folder}").tokenizer
    assert torch.equal(tokenizer(["A RED square"]), tokenizer(["a red square"]))
