"""A finished run on disk, and the main pair that it leaves behind.

`model.safetensors` holds `img.*` and `txt.*` (the pair), `heads.*`, `third_norms` and `log_scale`, never a third tower;
`model.json` says how to build the pair and which frozen towers the heads faced.

    model = load_run("runs/mine")
    model.encode_text(["a red circle"])          # unit vectors [1, D]
    model.score(["a.jpg"], ["a red circle"])     # cosines [1, 1]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from threetowers.config import RunConfig
from threetowers.data.decode import decode, upright_rgb
from threetowers.data.source import Source
from threetowers.data.tokenize import OpenClipTokenizer, Tokenizer, load_tokenizer
from threetowers.data.transforms import ImageSpec, fixed_view, normalise
from threetowers.errors import BadSample, CheckpointError, DataError
from threetowers.files import digest_file, write_whole
from threetowers.model import Architecture, ThreeTowers
from threetowers.objective.losses import unit
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.image_tower import as_image_tower
from threetowers.towers.pair import build_image_tower, build_text_tower, encode_text
from threetowers.towers.weights import load_strictly, read_safetensors, write_safetensors

SCHEMA = 1
Parts = dict[str, dict[str, Any]]
"""The number of images and the fingerprint of each part of the data, by its name."""
ImageLike = str | Path | Image.Image


@dataclass
class FinishedRun:
    """The main pair of a finished run, for two-tower inference without a third tower, on `device`."""

    img: nn.Module
    txt: nn.Module
    architecture: Architecture
    tokenizer: Tokenizer
    scale: float
    heads: dict[str, Tensor]
    """Weights [out, in] of the heads by view name; a frozen tower's norm constant is multiplied in."""
    described: dict[str, Any]
    """The contents of model.json."""
    device: torch.device

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageLike], batch_size: int = 256) -> Tensor:
        """Unit vectors float32 [N, D] of image files or PIL images.

        Raises DataError naming the file that cannot be read.
        """
        parts = []
        for start in range(0, len(images), batch_size):
            views = [
                fixed_view(_open(image), self.architecture.image)
                for image in images[start : start + batch_size]
            ]
            pixels = torch.from_numpy(np.stack(views)).to(self.device)
            parts.append(unit(self.img(normalise(pixels, self.architecture.image))).cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit vectors float32 [N, D] of texts; what exceeds the context length is cut."""
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(texts[start : start + batch_size])
            tokens = tokens[:, : int(self.tokenizer.lengths(tokens).max())].to(self.device)
            parts.append(unit(encode_text(self.txt, tokens)).cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Cosine of every image with every text, [N, M]; times `scale` they are the training's logits."""
        return self.encode_image(images) @ self.encode_text(texts).T

    @property
    def embed_dim(self) -> int:
        return int(self.architecture.model_cfg["embed_dim"])


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    try:
        return decode(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error.strerror or error})") from None
    except BadSample as problem:
        raise DataError(str(problem)) from None


def main_pair(
    model: ThreeTowers, architecture: Architecture, thirds: Mapping[str, FrozenTower]
) -> tuple[nn.Module, Architecture]:
    """The image tower that a trained model stands for, and the architecture of the pair with it.

    For LiT this is the frozen network with the trained projection, the norm constant multiplied in.
    """
    if model.objective.image != "third":
        assert model.img is not None
        return model.img, architecture
    (third,) = thirds.values()
    projection = None
    if "img" in model.heads:
        projection = (model.heads["img"].weight * model.third_norms[0]).detach().cpu()  # type: ignore[operator]
    image, vision_cfg = as_image_tower(third, projection)
    return image, Architecture({**architecture.model_cfg, "vision_cfg": vision_cfg}, architecture.image)


def save_run(
    folder: Path,
    config: RunConfig,
    model: ThreeTowers,
    architecture: Architecture,
    tokenizer: Tokenizer,
    thirds: Mapping[str, FrozenTower],
    parts: Parts,
    state: Mapping[str, Tensor],
) -> None:
    """Writes what `load_run` needs; model.json last, since its presence says that the run is finished.

    state: the whole weights of the model.
    """
    image, architecture = main_pair(model, architecture, thirds)
    if image is not model.img:
        state = {**{f"img.{key}": value for key, value in image.state_dict().items()}, **state}
    state = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    weights = folder / "model.safetensors"
    write_safetensors(weights, state)
    tokenizer.save(folder)
    described = {
        "schema": SCHEMA,
        "method": config.method,
        "model_cfg": architecture.model_cfg,
        "image": architecture.image.as_dict(),
        "tokenizer": "open_clip" if isinstance(tokenizer, OpenClipTokenizer) else "tokenizer.json",
        "thirds": [
            {"view": view, "spec": tower.spec, "width": tower.width, "fingerprint": tower.fingerprint(),
             "reads": tower.reads, "had_gradient": tower.had_gradient()}
            for view, tower in thirds.items()
            if view in model.thirds
        ],
        "num_trainable": model.num_trainable(),
        "rows": [[row.a, row.b, row.weight, row.kind] for row in model.objective.rows],
        "data": parts,
        "sha256": digest_file(weights),
    }  # fmt: skip
    write_whole(folder / "model.json", json.dumps(described, indent=2))


def describe_parts(train: Source, val: Source, test: Source) -> Parts:
    """The parts as model.json and checkpoints record them."""
    named = {"train": train, "val": val, "test": test}
    return {name: {"images": len(part), "fingerprint": part.fingerprint} for name, part in named.items()}


def changed_parts(before: Parts, after: Parts) -> list[str]:
    """What is different about each part that has changed; nothing about parts that were not recorded.

    >>> changed_parts({"test": {"images": 5, "fingerprint": "a"}}, {"test": {"images": 6, "fingerprint": "b"}})
    ['test (5 → 6 images)']
    """
    changed = []
    for name, was in before.items():
        now = after[name]
        if was["images"] != now["images"]:
            changed.append(f"{name} ({was['images']:,} → {now['images']:,} images)")
        elif was["fingerprint"] != now["fingerprint"]:
            changed.append(f"{name} (as many images, from data that differs)")
    return changed


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of a finished run's model.json; raises CheckpointError when there is none."""
    path = folder / "model.json"
    if not path.is_file():
        hint = "the run is not finished; run its train command again" if (folder / "config.toml").is_file() else (
            "this is no run folder"
        )  # fmt: skip
        raise CheckpointError(f"{folder}: there is no model.json: {hint}")
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    if described.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema {described.get('schema')!r}, this version reads {SCHEMA}")
    return described


def read_weights(folder: Path, described: Mapping[str, Any]) -> dict[str, Tensor]:
    """A finished run's tensors by name; raises CheckpointError when they are not those that model.json describes."""
    path = folder / "model.safetensors"
    state = read_safetensors(path)
    if digest_file(path) != described["sha256"]:
        raise CheckpointError(f"{path}: its contents are not those that the run wrote (SHA-256 differs)")
    return state


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> FinishedRun:
    """A finished run's main pair in eval mode; raises CheckpointError when it is unfinished or damaged."""
    folder = Path(folder)
    described = read_description(folder)
    weights, state = folder / "model.safetensors", read_weights(folder, described)
    model_cfg = described["model_cfg"]
    towers = {"img": build_image_tower(model_cfg, 0), "txt": build_text_tower(model_cfg, 0)}
    for name, tower in towers.items():
        part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        load_strictly(tower, part, f"{weights} ({name}.*)")
        tower.eval().requires_grad_(False).to(device)
    norms = dict(zip([third["view"] for third in described["thirds"]], state["third_norms"], strict=True))
    heads = {
        name.removeprefix("heads.").removesuffix(".weight"): value
        for name, value in state.items()
        if name.startswith("heads.")
    }
    context_length = model_cfg["text_cfg"].get("context_length", 77)
    name = described["tokenizer"]
    return FinishedRun(
        img=towers["img"],
        txt=towers["txt"],
        architecture=Architecture(model_cfg, ImageSpec.from_dict(described["image"])),
        tokenizer=load_tokenizer(name if name == "open_clip" else str(folder / name), context_length),
        scale=float(state["log_scale"][0].exp()),
        heads={view: w * norms.get(view.partition("@")[0], torch.tensor(1.0)) for view, w in heads.items()},
        described=described,
        device=torch.device(device),
    )


def restore_trained(model: ThreeTowers, folder: Path) -> None:
    """Puts a finished run's weights into a freshly built model of the same configuration, strictly."""
    path = folder / "model.safetensors"
    state = read_safetensors(path)
    if (
        model.img is None
    ):  # LiT: the frozen network in the file is the third tower's, which the model reads from
        state = {key: value for key, value in state.items() if not key.startswith("img.")}
    load_strictly(model, state, path)
