"""A finished run as a directory for open_clip and the tools that load its models.

export_open_clip("runs/mine", "exported")
# open_clip.create_model_and_transforms("local-dir:exported")
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threetowers.data.transforms import ImageSpec
from threetowers.export.card import write_card
from threetowers.export.folder import listed, write_json, written_whole
from threetowers.run.finished import load_run
from threetowers.towers.encoder import BESIDE, CONFIG
from threetowers.towers.pair import assemble
from threetowers.towers.weights import write_safetensors

INTERPOLATIONS = ("bicubic", "bilinear")
"""What open_clip's own transform resizes with."""
IMAGES = (
    "Pass images through to_rgb from README.md. Without it, open_clip ignores EXIF rotation and drops transparency. "
    "Images with a palette, 16 bits or CMYK also differ from training."
)
TEXT = "text"
"""The folder with the configuration of a text tower that is an encoder of transformers."""
MOVED = (
    f"`hf_model_name` in open_clip_config.json is the whole path of the folder `{TEXT}`. Write the new path there "
    "after a move. It can also be the Hub's name of the encoder that the text tower started at."
)
USAGE = """```python
import numpy as np
import open_clip
from PIL import Image, ImageOps

model, _, transform = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
model.eval()


def to_rgb(image):
    \"\"\"A PIL image as in training: upright, transparency on white, 16-bit grey by its high byte.\"\"\"
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        wide = np.asarray(image)
        grey = (wide >> 8).astype("uint8")
        grey[wide == image.info.get("transparency")] = 255
        image = Image.fromarray(grey)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


pixels = transform(to_rgb(Image.open("photo.png")))
image = model.encode_image(pixels[None], normalize=True)
text = model.encode_text(tokenizer(["a photo"]), normalize=True)
```

Differences from training:

{differences}
"""


def export_open_clip(run: str | Path, out: str | Path) -> Path:
    """Writes open_clip_config.json, open_clip_model.safetensors, the tokenizer and README.md; returns the directory.

    The export holds the two main towers and the scale, no third tower and no head. Raises CheckpointError for an
    unfinished run.
    """
    finished = load_run(run)
    architecture = finished.architecture
    spec = architecture.image
    pair = assemble(architecture.model_cfg, finished.img, finished.txt, finished.scale)
    text_cfg, encoder, where = _text_cfg(architecture.model_cfg["text_cfg"], Path(out))
    differences = [*_differences(spec), IMAGES, *finished.tokenizer.differences(), *where]
    with written_whole(Path(out), ("open_clip_config.json",)) as folder:
        state = {name: tensor.contiguous().clone() for name, tensor in pair.state_dict().items()}
        write_safetensors(folder / "open_clip_model.safetensors", state)
        finished.tokenizer.save(folder)
        if encoder is not None:
            (folder / TEXT).mkdir()
            write_json(folder / TEXT / "config.json", encoder)
        model_cfg = {**architecture.model_cfg, "text_cfg": text_cfg}
        config = {"model_cfg": model_cfg, "preprocess_cfg": _preprocess_cfg(spec)}
        write_json(folder / "open_clip_config.json", config)
        name = Path(out).absolute().name
        usage = USAGE.format(folder=name, differences=listed(differences))
        write_card(
            folder, finished, Path(run), library="open_clip", title="for open_clip", usage=usage, name=name
        )
    for line in differences:
        print(f"note: {line}", file=sys.stderr)
    return Path(out)


def _text_cfg(text_cfg: dict[str, Any], out: Path) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """open_clip's text_cfg, the config.json that the folder TEXT has to hold if any, and what a user has to know of it.

    open_clip takes the configuration of an encoder of transformers from a folder, whose relative path would be one from
    the working directory, or from a name on the Hub.
    """
    exported = {key: value for key, value in text_cfg.items() if key != CONFIG}
    if CONFIG not in text_cfg:
        return exported, None, []
    name = text_cfg["hf_model_name"]
    if name != BESIDE:
        return (
            exported,
            None,
            [f"open_clip reads the configuration of the text tower from {name} on the Hub."],
        )
    exported["hf_model_name"] = str(out.absolute() / TEXT)
    return exported, text_cfg[CONFIG], [MOVED]


def _differences(spec: ImageSpec) -> Iterator[str]:
    """What open_clip's format cannot describe of the preprocessing."""
    if spec.resize_size not in (0, spec.size):
        yield (
            f"open_clip scales images to {spec.size} pixels. Training scaled them to {spec.resize_size} and took the "
            f"central {spec.size}. The format cannot describe that."
        )
    if spec.interpolation not in INTERPOLATIONS:
        yield f"open_clip resizes with bicubic. Training resized with {spec.interpolation}, which open_clip lacks."


def _preprocess_cfg(spec: ImageSpec) -> dict[str, Any]:
    return {
        "size": spec.size,
        "mode": "RGB",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation if spec.interpolation in INTERPOLATIONS else "bicubic",
        "resize_mode": spec.resize,
        "fill_color": 0,
    }
