"""What can serve as frozen tower, in words: `threetowers towers [TEXT|SPEC]`. Downloads no weights."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_text_tower, _build_vision_tower
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from threetowers.config import did_you_mean
from threetowers.data.transforms import ImageSpec
from threetowers.errors import UsageError
from threetowers.towers.frozen import hf as frozen_hf
from threetowers.towers.frozen import open_clip as frozen_open_clip
from threetowers.towers.frozen import text as frozen_text
from threetowers.towers.frozen import timm as frozen_timm
from threetowers.towers.frozen.base import foreign
from threetowers.towers.frozen.load import IMAGE_LOADERS, TEXT_LOADERS, FrozenTower, load_frozen

MOST = 40  # names of one library that a search shows

PREFIXES = (
    ("timm:NAME", "published weights of a timm model; timm:NAME@FILE and timm:local-dir:DIR read yours"),
    ("hf:ID or hf:DIR", "a transformers vision model (ViT, DINOv2, CLIP, SigLIP …), safetensors only"),
    ("open_clip:NAME@TAG", "the image tower of an open_clip model; @FILE and open_clip:local-dir:DIR read yours"),
    ("file:RUN", "what `threetowers pretrain` wrote, or the image tower of a finished run"),
    ("hf-text:ID or DIR", "a transformers text model with its tokenizer, as third tower of 3t"),
    ("open_clip-text:NAME@TAG", "the text tower of an open_clip model, likewise; or open_clip-text:local-dir:DIR"),
)  # fmt: skip

# one or two of each kind and size that have a reason to be tried first
CURATED = (
    ("resnet50.a1_in1k", "small and fast, ImageNet labels"),
    ("convnext_base.fb_in22k", "convolutions, 22k labels"),
    ("vit_base_patch16_224.augreg_in21k", "ViT on 21k labels, the paper's kind of tower"),
    ("vit_large_patch16_224.augreg_in21k", "the same, larger"),
    ("vit_small_patch14_dinov2.lvd142m", "self-supervised, no labels or captions; 518 pixels are slow"),
    ("vit_base_patch16_dinov3.lvd1689m", "self-supervised; its weights have a licence of their own"),
    ("convnext_tiny.dinov3_lvd1689m", "the same, small and convolutional"),
    ("vit_base_patch16_siglip_224.v2_webli", "trained on captions itself"),
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What there is to know of a tower before it is used; image is None on the text side, context elsewhere."""

    spec: str
    num_parameters: int
    width: int
    image: ImageSpec | None = None
    context: int | None = None

    def text(self) -> str:
        lines = [self.spec, f"  parameters     {self.num_parameters:,}", f"  width          {self.width}"]
        if self.context is not None:
            lines.append(f"  reads texts of at most {self.context} tokens, with its own tokenizer")
        if self.image is not None:
            image = self.image
            target = image.resize_size or image.size
            how = "both sides" if image.resize == "squash" else "the shorter side"
            crop = (
                "no crop"
                if image.size == target and image.resize == "squash"
                else f"centre crop {image.size}"
            )
            lines += [
                f"  input          {image.size} × {image.size} pixels",
                f"  resize         {how} to {target}, {image.interpolation}, {crop}",
                f"  mean           {', '.join(f'{v:g}' for v in image.mean)}",
                f"  std            {', '.join(f'{v:g}' for v in image.std)}",
            ]
        return "\n".join(lines)


def towers(name: str = "") -> str:
    """The text of the verb: an overview without a name, matching names for a word, a card for a full spec.

    Raises UsageError for a word that matches nothing and what load_frozen raises for a spec that means nothing.
    """
    if not name:
        return _overview()
    if name.partition(":")[0] in {**IMAGE_LOADERS, **TEXT_LOADERS} and ":" in name:
        return describe(name).text()
    return _search(name)


def _overview() -> str:
    pairs = open_clip.list_pretrained()
    counts = (
        f"timm offers {len(timm.list_models(pretrained=True)):,} published towers, open_clip {len(pairs):,}"
    )
    rows = [(f"timm:{model}", describe(f"timm:{model}"), why) for model, why in CURATED]
    return "\n".join(
        [
            "A frozen third tower is named by its library:",
            "",
            *(f"  {prefix:<24} {meaning}" for prefix, meaning in PREFIXES),
            "",
            f"{counts}; hf: takes any vision model of its kind.",
            "`threetowers towers dino` lists the names with that word, `threetowers towers timm:NAME` describes one.",
            "",
            "Good first choices:",
            "",
            f"  {'tower':<44} {'parameters':>10}  {'pixels':>6}  {'width':>5}",
            *(
                f"  {spec:<44} {card.num_parameters / 1e6:>8.1f} M  {card.image.size if card.image else 0:>6}  "
                f"{card.width:>5}  {why}"
                for spec, card, why in rows
            ),
        ]
    )


def _search(word: str) -> str:
    found = {
        "timm": [
            f"timm:{name}" for name in timm.list_models(pretrained=True) if word.lower() in name.lower()
        ],
        "open_clip": [
            f"open_clip:{model}@{tag}"
            for model, tag in open_clip.list_pretrained()
            if word.lower() in f"{model}@{tag}".lower()
        ],
    }
    if not any(found.values()):
        near = did_you_mean(word, _families())
        raise UsageError(
            f"towers: no published name of timm or open_clip has {word!r} in it"
            + (
                near
                if near.startswith(";")
                else "; try a family such as vit, resnet, convnext, dino or siglip"
            )
        )
    lines = []
    for library, names in found.items():
        if not names:
            continue
        lines += [f"{len(names)} of {library}", *(f"  {name}" for name in names[:MOST])]
        if len(names) > MOST:
            lines.append(f"  and {len(names) - MOST} more; a longer word finds fewer")
    return "\n".join(lines)


def _families() -> list[str]:
    return sorted({re.split("[_.]", name)[0] for name in timm.list_models(pretrained=True)})


def describe(spec: str) -> Card:
    """The card of one tower; networks with published weights are built without memory and without weights."""
    prefix, _, name = spec.partition(":")
    published = {"timm": _timm, "open_clip": _open_clip, "open_clip-text": _open_clip_text,
                 "hf": _hf, "hf-text": _hf_text}  # fmt: skip
    local = name.startswith("local-dir:") or ("@" in name and Path(name.partition("@")[2]).exists())
    card: Callable[[str, str], Card] | None = published.get(prefix)
    if card is None or local or (prefix in ("hf", "hf-text") and Path(name).is_dir()):
        return _loaded(spec)
    return card(spec, name)


def _loaded(spec: str) -> Card:
    tower = load_frozen(spec)
    count = _count(tower.module)
    if isinstance(tower, FrozenTower):
        return Card(spec, count, tower.width, tower.image)
    limit = tower.tokenizer.as_dict().get("limit") or tower.tokenizer(["a"]).shape[1]
    return Card(spec, count, tower.width, context=limit)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _timm(spec: str, name: str) -> Card:
    name = name.partition("@")[0]
    frozen_timm.known_name(name)
    with torch.device("meta"), foreign(spec, "the network"):
        trunk = timm.create_model(name, pretrained=False, num_classes=0)
    image = frozen_timm.timm_image_spec(trunk, name)
    return Card(spec, _count(trunk), frozen_timm.pooled_width(trunk), image)


def _open_clip(spec: str, name: str) -> Card:
    model, _, tag = name.partition("@")
    config = frozen_open_clip.known_config(model)
    frozen_open_clip.known_tag(model, tag, "open_clip")
    with torch.device("meta"), foreign(spec, "the network"):
        visual: Any = _build_vision_tower(
            config["embed_dim"], dict(config["vision_cfg"]), config.get("quick_gelu", False)
        )
    settings = merge_preprocess_dict(PreprocessCfg(), open_clip.get_pretrained_cfg(model, tag))
    settings["size"] = visual.image_size
    return Card(spec, _count(visual), config["embed_dim"], frozen_open_clip.image_spec(settings))


def _open_clip_text(spec: str, name: str) -> Card:
    model, _, tag = name.partition("@")
    config = frozen_open_clip.known_config(model)
    frozen_open_clip.known_tag(model, tag, "open_clip-text")
    section = {**config["text_cfg"], "hf_model_pretrained": False}
    with torch.device("meta"), foreign(spec, "the network"):
        text = _build_text_tower(config["embed_dim"], section, config.get("quick_gelu", False))
    return Card(spec, _count(text), config["embed_dim"], context=section.get("context_length", 77))


def _hf_skeleton(spec: str, name: str) -> Any:
    transformers = frozen_hf.import_transformers(spec)
    folder = frozen_hf.local_folder(name, spec, needs="config.json")
    with frozen_hf.quiet(transformers), foreign(spec, "the configuration", frozen_hf.REMEDY):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config, trust_remote_code=False).eval()


def _hf(spec: str, name: str) -> Card:
    skeleton = _hf_skeleton(spec, name)
    model = getattr(skeleton, "vision_model", skeleton)
    image = frozen_hf.image_spec(frozen_hf.processor_settings(name, spec), spec)
    width, _ = frozen_hf.probe(model, "pooled", image.size, spec)
    return Card(spec, _count(model), width, image)


def _hf_text(spec: str, name: str) -> Card:
    skeleton = _hf_skeleton(spec, name)
    model = getattr(skeleton, "text_model", skeleton)
    tokenizer = frozen_text.load_hf_tokenizer(name, spec)
    limit = frozen_text.token_limit(tokenizer, model.config)
    return Card(spec, _count(model), model.config.hidden_size, context=limit)
