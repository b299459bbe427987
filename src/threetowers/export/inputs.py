"""A run's tokenizer and preprocessing in the files that transformers and transformers.js read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from threetowers.data.tokenize import FileTokenizer, Tokenizer
from threetowers.data.transforms import ImageSpec
from threetowers.errors import UsageError
from threetowers.export.folder import write_json
from threetowers.towers.frozen.hf import import_transformers

CLEANING = (
    "Repair wrongly decoded characters and HTML entities in texts with ftfy.fix_text and html.unescape. Training did, "
    "and the exported tokenizer does not."
)
COLOURS = (
    "Give upright RGB images, with white in place of transparency. The image processor ignores EXIF rotation and drops "
    "transparency."
)
CROP = "Some images are cropped one pixel further left or up than in training. The image processor rounds margins down."


def processor_settings(spec: ImageSpec, target: str) -> dict[str, Any]:
    """The preprocessing as settings of transformers' CLIPImageProcessor.

    target: how an error begins. Raises UsageError for a filter that transformers does not have.
    """
    if spec.interpolation in ("box", "hamming"):
        raise UsageError(
            f"{target}: images were resized with {spec.interpolation}, which transformers' default image processor "
            "does not have; export --to open_clip, which takes bicubic and says so"
        )
    resized = spec.resize_size or spec.size
    sides = ["shortest_edge"] if spec.resize == "shortest" else ["height", "width"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": dict.fromkeys(sides, resized),
        "resample": int(Image.Resampling[spec.interpolation.upper()]),
        "do_center_crop": spec.resize == "shortest" or resized != spec.size,
        "crop_size": {"height": spec.size, "width": spec.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def preprocessing_differences(spec: ImageSpec) -> Iterator[str]:
    """For which images transformers' image processor makes other pixels than training did."""
    if spec.centre == "round" and (spec.resize == "shortest" or spec.resize_size not in (0, spec.size)):
        yield CROP
    yield COLOURS


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for transformers; white space is cleaned as in training."""
    if not isinstance(tokenizer, FileTokenizer):
        _write_open_clip_vocabulary(tokenizer, folder)
        return
    tokenizer.save(folder)
    rules = _read(folder / "tokenizer.json")
    normalizers = [
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        *([rules["normalizer"]] if rules["normalizer"] else []),
    ]
    rules["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    write_json(folder / "tokenizer.json", rules)
    config = _read(folder / "tokenizer_config.json")
    config["model_input_names"] = ["input_ids", "attention_mask"]  # CLIP has no token types
    write_json(folder / "tokenizer_config.json", config)


def _write_open_clip_vocabulary(tokenizer: Tokenizer, folder: Path) -> None:
    """open_clip's vocabulary as transformers' CLIPTokenizer, with the names that OpenAI gave the special tokens."""
    transformers = import_transformers("open_clip's vocabulary")
    own = SimpleTokenizer()
    names = {own.sot_token_id: "<|startoftext|>", own.eot_token_id: "<|endoftext|>"}
    transformers.CLIPTokenizer(
        vocab={names.get(id, token): id for token, id in own.encoder.items()},
        merges=list(own.bpe_ranks),
        model_max_length=tokenizer(["a"]).shape[1],
    ).save_pretrained(folder)


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def end_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends every text."""
    tokens = tokenizer(["a"])
    return int(tokens[0, int(tokenizer.lengths(tokens)[0]) - 1])


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that the exported tokenizer pads texts with; of open_clip's vocabulary this is the end token."""
    return tokenizer.pad_id if isinstance(tokenizer, FileTokenizer) else end_id(tokenizer)
