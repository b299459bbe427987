"""Third towers out of open_clip: open_clip:NAME@TAG|FILE, open_clip:local-dir:DIR."""

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import _build_vision_tower, convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from threetowers.data.transforms import ImageSpec
from threetowers.errors import CheckpointError, UsageError
from threetowers.settings import did_you_mean
from threetowers.towers.frozen.base import (
    Card,
    Kind,
    Loaded,
    channels_of,
    foreign,
    num_parameters,
    pooled_only,
)
from threetowers.towers.weights import (
    load_strictly,
    no_weights,
    read_safetensors,
    refuse_pickle,
    say_unwrapped,
    unwrapped,
)


def load_open_clip(name: str, features: str) -> Loaded:
    """The image tower of an open_clip model with the preprocessing that its weights were published with.

    Raises UsageError for an unknown name or features other than pooled, CheckpointError for weights that fail.
    """
    source = f"open_clip:{name}"
    pooled_only(source, features)
    model, config = load_pair(
        name, source, force_custom_text=True
    )  # into which weights of both layouts are read
    return image_side(model, config, source)


def image_side(model: Any, config: dict[str, Any], source: str) -> Loaded:
    """The image tower of what `load_pair` returned; raises UsageError for preprocessing that ImageSpec cannot say."""
    image = image_spec(open_clip.get_model_preprocess_cfg(model), source)
    return Loaded(model.visual, config["embed_dim"], image, dict(config["vision_cfg"]))


def load_pair(name: str, source: str, **options: bool) -> tuple[Any, dict[str, Any]]:
    """The whole open_clip model of NAME@TAG, NAME@FILE or local-dir:DIR, and its model_cfg.

    options: of open_clip.create_model.
    """
    local = name.startswith("local-dir:")
    model_name, _, tag = (name, "", "") if local else name.partition("@")
    if local:
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{source}: {folder} holds no open_clip_config.json with safetensors weights"
            )
        with foreign(source, "open_clip_config.json"):
            config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
        for path in folder.glob("*.safetensors"):
            if found := no_weights(path):
                raise CheckpointError(f"{source}: {path} {found}")
    else:
        config = known_config(model_name)
        refuse_pickle(tag)
        known_tag(model_name, tag, source.partition(":")[0])
    wrapped = _wrapped(model_name, tag, **options) if tag.endswith(".safetensors") else None
    if wrapped is not None:
        return wrapped, config
    with foreign(source, "the weights", hub=not (local or tag.endswith(".safetensors"))):
        model = open_clip.create_model(
            model_name, pretrained=tag or None, require_pretrained=not local, **options
        )
    return model, config


def _wrapped(model_name: str, file: str, **options: bool) -> Any:
    """The model with the weights of a file in which a prefix stands before every name; None for any other file."""
    whole = read_safetensors(file)
    if "logit_scale" in whole or not any(name.endswith(".logit_scale") for name in whole):
        return None
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that the weights are random
    model = open_clip.create_model(model_name, **options)
    logging.disable(disabled)
    state, prefix = unwrapped(whole, model.state_dict())
    say_unwrapped(prefix, file)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    load_strictly(
        model, convert_state_dict(model, state), file, other_size="give the open_clip model of that size"
    )
    return model


def known_tag(model_name: str, tag: str, prefix: str) -> None:
    """Raises UsageError, with the published tags, when no weights are named, or some that are not there."""
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if not tag:
        raise UsageError(
            f"third: say which weights, {prefix}:{model_name}@TAG or @FILE. Published tags: {', '.join(tags) or 'none'}"
        )
    if tag.lower().replace("-", "_") in tags:
        return
    if Path(tag).exists() and not tag.endswith(".safetensors"):
        found = no_weights(Path(tag)) or "only safetensors are read; `threetowers convert` writes them"
        raise CheckpointError(f"{tag}: {found}")
    if not Path(tag).exists():
        raise UsageError(
            f"third: {prefix}:{model_name}@{tag}: no published tag and no file{did_you_mean(tag, tags)}"
        )


def known_config(model_name: str) -> dict[str, Any]:
    """open_clip's model_cfg of a name; raises UsageError with the nearest name."""
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise UsageError(
            f"third: open_clip has no model {model_name!r}{did_you_mean(model_name, open_clip.list_models())}"
        )
    return dict(config)


def image_spec(settings: dict[str, Any], source: str) -> ImageSpec:
    """open_clip's preprocess_cfg as ImageSpec; raises UsageError for what it cannot say."""
    size, resize = settings["size"], settings["resize_mode"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1 or resize not in ("shortest", "squash"):
        raise UsageError(
            f"third: {source} wants {size} pixels with resize_mode {resize!r}; only square inputs with resize_mode "
            "shortest or squash are supported"
        )
    return ImageSpec(
        size=sides.pop(),
        **channels_of(source, settings["mean"], settings["std"], 3),
        interpolation="bilinear"
        if settings["interpolation"] == "bilinear"
        else "bicubic",  # as open_clip takes it
        resize=resize,
    )


def open_clip_card(spec: str, name: str) -> Card:
    """The card of published weights; the network is built without memory."""
    model, _, tag = name.partition("@")
    config = known_config(model)
    known_tag(model, tag, "open_clip")
    with torch.device("meta"), foreign(spec, "the network"):
        visual: Any = _build_vision_tower(
            config["embed_dim"], dict(config["vision_cfg"]), config.get("quick_gelu", False)
        )
    settings = merge_preprocess_dict(PreprocessCfg(), open_clip.get_pretrained_cfg(model, tag))
    settings["size"] = visual.image_size
    return Card(spec, num_parameters(visual), config["embed_dim"], image_spec(settings, spec))


OPEN_CLIP = Kind(
    prefix="open_clip",
    reads="images",
    forms=("open_clip:NAME@TAG", "open_clip:NAME@FILE", "open_clip:local-dir:DIR"),
    help="the image tower of an open_clip model; @FILE and open_clip:local-dir:DIR read yours",
    load=load_open_clip,
    card=open_clip_card,
)
