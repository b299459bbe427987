"""A finished run as a folder for transformers and sentence-transformers.

    export_transformers("runs/mine", "exported")
    # transformers.AutoModel.from_pretrained("exported")

open_clip's own image and text transformers are the networks of CLIP with other parameter names, so the weights are
renamed and the folder holds a CLIPModel. With a timm network as image tower it holds a VisionTextDualEncoderModel
(export/dual_encoder.py), whose text model is that of CLIP.
transformers loads the folder again before it gets its name, and its features are compared with the run's.
Legend: V tokens of the vocabulary, W width of a tower, D embedding.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from threetowers.data.tokenize import marks_in_text
from threetowers.errors import UsageError
from threetowers.export.card import write_card
from threetowers.export.dual_encoder import dual_encoder, vision_obstacles, vision_weights
from threetowers.export.folder import listed, write_json, written_whole
from threetowers.export.inputs import (
    CLEANING,
    end_id,
    pad_id,
    preprocessing_differences,
    processor_settings,
    write_tokenizer,
)
from threetowers.export.samples import CAPTIONS, check_difference, exactness, sample_pictures
from threetowers.objective.losses import unit
from threetowers.run.finished import FinishedRun, load_run
from threetowers.towers.clip import ARGMAX_ID, activation, blocks_to_transformers, to_transformers
from threetowers.towers.encoder import is_encoder
from threetowers.towers.frozen.base import foreign
from threetowers.towers.frozen.hf import REMEDY, import_transformers, load_model, quiet
from threetowers.towers.frozen.text import load_hf_tokenizer
from threetowers.towers.pair import takes_short_text
from threetowers.towers.weights import load_strictly

USAGE = """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{folder}")
processor = AutoImageProcessor.from_pretrained("{folder}", backend="pil")
tokenizer = AutoTokenizer.from_pretrained("{folder}")

images = processor(images=[Image.open("photo.jpg").convert("RGB")], return_tensors="pt")
texts = tokenizer(["a photo"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    image = model.get_image_features(**images).pooler_output
    text = model.get_text_features(**texts).pooler_output
print(torch.nn.functional.cosine_similarity(image, text))
```

sentence-transformers loads the same folder:

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}", processor_kwargs={{"backend": "pil"}})
image = model.encode([Image.open("photo.jpg").convert("RGB")], normalize_embeddings=True)
text = model.encode(["a photo"], normalize_embeddings=True)
print(model.similarity(image, text))
```

Differences from training:

{differences}
"""
BACKEND = (
    'Load the image processor with backend="pil", as training resized images. The pixels of its default backend differ '
    "by a grey level or two."
)


def export_transformers(run: str | Path, out: str | Path) -> Path:
    """Writes config.json, model.safetensors, the tokenizer, preprocessor_config.json and README.md; returns the folder.

    The export holds the two main towers and the scale. Raises UsageError for towers or preprocessing that
    transformers does not have. Raises CheckpointError for an unfinished run, and when the features that
    transformers computes differ from the run's by more than `TOLERANCE`. Nothing is written then.
    """
    finished = load_run(run)
    transformers = import_transformers("--to transformers")
    check_expressible(finished)
    spec = finished.architecture.image
    settings = processor_settings(spec, "--to transformers")
    with written_whole(Path(out), ("config.json", "model.safetensors")) as folder:
        write_tokenizer(finished.tokenizer, folder)
        moved = _move_end(end_id(finished.tokenizer), folder / "tokenizer.json")
        _write_model(transformers, finished, folder, moved)
        write_json(folder / "preprocessor_config.json", settings)
        image, text, marks = _compare(transformers, finished, folder)
        differences = [BACKEND, *preprocessing_differences(spec), CLEANING]
        if marks:
            differences.append(
                f"transformers takes {' and '.join(marks)} inside a text for special tokens. Training did not."
            )
        name = Path(out).absolute().name
        usage = USAGE.format(folder=name, differences=listed(differences))
        write_card(
            folder, finished, Path(run), library="transformers", title="for transformers", usage=usage, name=name,
            tags=("sentence-transformers",),
        )  # fmt: skip
    print(
        f"checked: transformers computes the run's vectors, of images {exactness(image)}, of texts {exactness(text)}",
        file=sys.stderr,
    )
    for line in differences:
        print(f"note: {line}", file=sys.stderr)
    return Path(out)


# The network.


def check_expressible(finished: FinishedRun) -> None:
    """Raises UsageError when transformers cannot express the towers; it says why, and what to do instead."""
    reason = next(_obstacles(finished), None)
    if reason is not None:
        model = "VisionTextDualEncoder" if isinstance(finished.img, TimmModel) else "CLIP"
        raise UsageError(
            f"--to transformers: {reason}, which transformers' {model} cannot express; export --to open_clip"
        )


def _obstacles(finished: FinishedRun) -> Iterator[str]:
    img, txt = finished.img, finished.txt
    if not isinstance(img, VisionTransformer | TimmModel):
        yield f"the image tower is {type(img).__name__}, neither open_clip's own ViT nor a timm network"
        return
    if is_encoder(txt):
        yield (
            "the text tower is an encoder of transformers that pools by the mean of its tokens or by the class token "
            "itself (start.text), where other vectors are projected"
        )
        return
    if not isinstance(txt, TextTransformer):
        yield f"the text tower is {type(txt).__name__}, not open_clip's own"
        return
    if isinstance(img, TimmModel):
        yield from vision_obstacles(finished)
    else:
        if img.attn_pool is not None or img.pool_type != "tok":
            yield "the image tower does not end in its class token (vision.pool_type, vision.attentional_pool)"
        if isinstance(img.ln_pre, nn.Identity):
            yield "the image tower has no layer norm before its blocks (vision.no_ln_pre)"
        yield from _block_obstacles("image", img)
    if not takes_short_text(txt):
        yield "the text tower is not causal with its features at the end token (pair.text)"
    if isinstance(txt.text_projection, nn.Linear):
        yield "the text tower's projection has a bias (text.proj_bias)"
    end = end_id(finished.tokenizer)
    if txt.pool_type == "argmax" and end != txt.vocab_size - 1:
        yield "the text tower pools at the highest id, which is not that of the end token (text.pool_type)"
    yield from _block_obstacles("text", txt)


def _block_obstacles(name: str, tower: Any) -> Iterator[str]:
    for block in tower.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or not isinstance(block.ls_1, nn.Identity):
            yield f"the {name} tower has blocks that CLIP does not have, or a layer scale (ls_init_value)"
        elif activation(block) is None:
            yield f"the {name} tower has the activation {type(block.mlp.gelu).__name__} (act_kwargs)"


def _write_model(
    transformers: Any, finished: FinishedRun, folder: Path, moved: tuple[int, int] | None
) -> None:
    """Writes config.json and model.safetensors; moved: the two ids of tokens that were exchanged."""
    with torch.random.fork_rng(), quiet(transformers):  # building a network draws random numbers
        config = clip_config(finished, moved)
        model: Any
        if isinstance(finished.img, TimmModel):
            model = dual_encoder(transformers, finished, config)
        else:
            model = transformers.CLIPModel(transformers.CLIPConfig(**config))
        load_strictly(model, clip_weights(finished, moved), "--to transformers")
        model.save_pretrained(folder)


def clip_config(finished: FinishedRun, moved: tuple[int, int] | None = None) -> dict[str, Any]:
    """The keys of transformers' CLIPConfig; call `check_expressible` first. A timm network is not among them."""
    img: Any = finished.img
    txt: Any = finished.txt
    other = dict(zip(moved, reversed(moved), strict=True)) if moved else {}
    end, pad = end_id(finished.tokenizer), pad_id(finished.tokenizer)
    text = {
        "vocab_size": txt.vocab_size,
        "max_position_embeddings": txt.context_length,
        "eos_token_id": other.get(end, end),
        "bos_token_id": None,
        "pad_token_id": other.get(pad, pad),
    }
    embed_dim = finished.embed_dim
    config = {
        "projection_dim": embed_dim,
        "logit_scale_init_value": float(np.log(finished.scale)),
        "text_config": {**blocks_to_transformers(txt, txt.ln_final), **text, "projection_dim": embed_dim},
    }
    if isinstance(img, VisionTransformer):
        vision = {"image_size": img.image_size[0], "patch_size": img.patch_size[0]}
        config["vision_config"] = {
            **blocks_to_transformers(img, img.ln_post),
            **vision,
            "projection_dim": embed_dim,
        }
    return config


def clip_weights(finished: FinishedRun, moved: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The towers' weights under transformers' names."""
    img: Any = finished.img
    txt: Any = finished.txt
    text = txt.state_dict()
    tokens = text["token_embedding.weight"].clone()  # [V, W]
    if moved is not None:
        tokens[list(moved)] = tokens[list(reversed(moved))]
    text["token_embedding.weight"] = tokens
    text.setdefault("text_projection", torch.eye(tokens.shape[1]))  # without one, W is D
    state = {"logit_scale": torch.tensor(finished.scale).log()}
    state |= to_transformers("txt", text, len(txt.transformer.resblocks))
    if isinstance(img, TimmModel):
        state |= vision_weights(finished)
    else:
        state |= to_transformers("img", img.state_dict(), len(img.transformer.resblocks))
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


# The end token.


def _move_end(id: int, path: Path) -> tuple[int, int] | None:
    """Gives the end token of a tokenizer.json another id where transformers' CLIP would not pool at it.

    It is exchanged with the ordinary token of the highest id. Merges are lists of tokens and not of ids, so every text
    is cut into the same tokens as before. Returns the two ids, or None when nothing was to be done. Raises UsageError
    for a vocabulary in which the ids are the order of the tokens.
    """
    if id != ARGMAX_ID:
        return None
    rules = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = rules["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise UsageError(
            f"--to transformers: the end token has the id {id}, at which transformers' CLIP does not pool, and "
            f"a vocabulary of type {rules['model'].get('type')} has fixed ids; export --to open_clip"
        )
    added = {entry["content"] for entry in rules["added_tokens"]}
    last = max(other for token, other in vocabulary.items() if token not in added)
    other = {id: last, last: id}
    rules["model"]["vocab"] = {token: other.get(old, old) for token, old in vocabulary.items()}
    for entry in rules["added_tokens"]:
        entry["id"] = other.get(entry["id"], entry["id"])
    rules["added_tokens"].sort(key=lambda entry: entry["id"])
    rules["post_processor"] = _with_ids(rules["post_processor"], other)
    if rules["padding"]:
        rules["padding"]["pad_id"] = other.get(rules["padding"]["pad_id"], rules["padding"]["pad_id"])
    write_json(path, rules)
    return id, last


def _with_ids(rules: Any, other: dict[int, int]) -> Any:
    """The rules of a post-processor with other ids.

    Templates list them under `ids`; the processors of BERT and RoBERTa have [token, id] under `sep` and `cls`.
    """
    if isinstance(rules, list):
        return [_with_ids(each, other) for each in rules]
    if not isinstance(rules, dict):
        return rules
    changed = {}
    for key, value in rules.items():
        if key == "ids":
            changed[key] = [other.get(id, id) for id in value]
        elif key in ("sep", "cls"):
            changed[key] = [value[0], other.get(value[1], value[1])]
        else:
            changed[key] = _with_ids(value, other)
    return changed


# The comparison.


@torch.no_grad()
def _compare(transformers: Any, finished: FinishedRun, folder: Path) -> tuple[float, float, tuple[str, ...]]:
    """The largest differences of image and of text vectors, and the special tokens that are recognised inside texts.

    Raises CheckpointError for a difference above TOLERANCE.
    """
    model, _ = load_model(str(folder), "--to transformers")
    tokenizer = load_hf_tokenizer(str(folder), "--to transformers")
    with quiet(transformers), foreign("--to transformers", "the image processor", REMEDY):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    architecture = finished.architecture
    floor = replace(architecture, image=replace(architecture.image, centre="floor"))  # see CROP
    pictures = sample_pictures()
    pixels = processor(images=pictures, return_tensors="pt")
    texts = tokenizer(list(CAPTIONS), padding=True, truncation=True, return_tensors="pt")
    differences = [
        _largest(
            model.get_image_features(**pixels).pooler_output,
            replace(finished, architecture=floor).encode_image(pictures),
        ),
        _largest(model.get_text_features(**texts).pooler_output, finished.encode_text(CAPTIONS)),
        abs(float(model.logit_scale.exp()) / finished.scale - 1),
    ]
    for what, difference in zip(("image vectors", "text vectors", "scale"), differences, strict=True):
        check_difference("transformers", what, difference)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in tokenizer.all_special_tokens}
    marks = marks_in_text(ids, lambda text: tokenizer(text)["input_ids"])
    return differences[0], differences[1], marks


def _largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in any component, between features [N, D] at unit length and unit vectors [N, D]."""
    return float((unit(found.float()) - expected).abs().max())
