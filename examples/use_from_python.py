"""Use a finished run from Python: embed images and texts, score them, search, and hand the model to open_clip.

    python examples/use_from_python.py [--out runs/example-use] [--steps 300]

A run needs no frozen tower any more when it is finished: it is two plain towers, loaded by `threetowers.load`.
"""

from dataclasses import replace
from pathlib import Path

import open_clip
import torch
import tyro
from PIL import Image

import threetowers
from squares import captioned
from threetowers.config import InputConfig
from threetowers.export.open_clip import export_open_clip
from threetowers.recipes import PRESETS
from threetowers.train.loop import train


def main(out: Path = Path("runs/example-use"), steps: int = 300) -> None:
    photos = captioned(out / "photos")
    inputs = InputConfig(val_fraction=0.1, test_fraction=0.1, workers=0)
    train(
        replace(PRESETS["tiny"](), data=str(photos), method="baseline", steps=steps, inputs=inputs),
        out / "run",
    )

    model = threetowers.load(str(out / "run"))

    # cosines of images (files or PIL images) with texts, [1, 3]
    files = sorted(photos.glob("*.png"))
    texts = [
        "a small red square on black, top left",
        "a large blue square on black, top left",
        "a small red square on grey, bottom right",
    ]
    cosines = model.score(files[:1], texts)
    for text, cosine in zip(texts, cosines[0].tolist(), strict=True):
        print(f"{cosine:+.3f}  {text}")

    # search: unit vectors, so that a product is a cosine
    index = model.encode_image(files)
    query = model.encode_text(["a large yellow square on brown, top left"])
    for i in (query @ index.T)[0].topk(3).indices.tolist():
        print(f"found {files[i].name}: {files[i].with_suffix('.txt').read_text(encoding='utf-8')}")

    # the same model in open_clip; there the cosines come out the same
    exported = export_open_clip(out / "run", out / "exported")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    with torch.inference_mode():
        image = theirs.encode_image(transform(Image.open(files[0]))[None], normalize=True)
        text = theirs.encode_text(tokenizer(texts), normalize=True)
    print(f"largest difference to open_clip: {(image @ text.T - cosines).abs().max().item():.1e}")


if __name__ == "__main__":
    tyro.cli(main)
