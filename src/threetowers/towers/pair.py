"""The two main towers: open_clip modules, kept so that what is left after training is an open_clip checkpoint."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import (
    CLIPTextCfg,
    CLIPVisionCfg,
    CustomTextCLIP,
    _build_text_tower,
    _build_vision_tower,
    convert_to_custom_text_state_dict,
)
from open_clip.transformer import QuickGELU, TextTransformer, text_global_pool
from torch import Tensor, nn

from threetowers.config import PairConfig
from threetowers.data.transforms import ImageSpec, per_channel
from threetowers.errors import CheckpointError, UsageError
from threetowers.settings import did_you_mean
from threetowers.towers.encoder import CONFIG, build_encoder, is_encoder
from threetowers.towers.heads import initialised
from threetowers.towers.weights import _first, load_strictly, read_safetensors, say_unwrapped, unwrapped


def model_config(pair: PairConfig) -> dict[str, Any]:
    """open_clip's model_cfg of the pair: embed_dim, vision_cfg, text_cfg, custom_text.

    Raises UsageError for an unknown model name or a key that open_clip's towers do not have.
    """
    config: dict[str, Any] = {"embed_dim": pair.embed_dim, "vision_cfg": {}, "text_cfg": {}}
    if pair.model is not None:
        named = open_clip.get_model_config(pair.model)
        if named is None:
            raise UsageError(f"pair.model: open_clip has no model {pair.model!r}" + _near(pair.model))
        config = named
    for section, given, known in (
        ("vision", pair.vision, CLIPVisionCfg),
        ("text", pair.text, CLIPTextCfg),
    ):
        names = [f.name for f in dataclasses.fields(known)]
        for key in given:
            if key not in names:
                raise UsageError(f"pair.{section}.{key}: open_clip has no such key{did_you_mean(key, names)}")
        config[f"{section}_cfg"] = {**config[f"{section}_cfg"], **given}
    config["custom_text"] = True
    return config


def _near(name: str) -> str:
    clause = did_you_mean(name, open_clip.list_models())
    return (
        clause
        if clause.startswith(";")
        else ". `python -c 'import open_clip; print(open_clip.list_models())'` lists them"
    )


def image_spec(config: dict[str, Any], pair: PairConfig) -> ImageSpec:
    """What the main image tower is fed with: its own size, the pair's mean and std, bicubic, centre crop."""
    size = config["vision_cfg"].get("image_size", 224)
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise UsageError(f"pair.vision.image_size: only square inputs are supported, got {size!r}")
    try:
        return ImageSpec(size=size, **per_channel(pair.mean, pair.std, 3))
    except ValueError as error:
        raise UsageError(f"pair.mean and pair.std of the image tower: {error}") from None


def build_image_tower(config: dict[str, Any], seed: int) -> nn.Module:
    """The image tower of a model_cfg, initialised from (seed, "img")."""
    tower: Any = _build(_build_vision_tower, config, "vision_cfg", seed, "img")
    trunk = getattr(tower, "trunk", None)
    if trunk is not None and getattr(trunk, "head_hidden_size", trunk.num_features) != trunk.num_features:
        raise UsageError(
            f"pair.vision.timm_model_name: {config['vision_cfg']['timm_model_name']!r} widens its features in its "
            "head, which open_clip's projection does not expect; take another timm model"
        )
    return tower.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def build_text_tower(config: dict[str, Any], seed: int) -> nn.Module:
    """The text tower of a model_cfg, initialised from (seed, "txt")."""
    builder = _encoder if CONFIG in config["text_cfg"] else _build_text_tower
    return _build(builder, config, "text_cfg", seed, "txt")


def _encoder(embed_dim: int, text_cfg: dict[str, Any], quick_gelu: bool) -> nn.Module:
    """As open_clip's builder takes it; the activation is the encoder's own, whatever the pair says."""
    return build_encoder(embed_dim, text_cfg)


def checkpoint_activations(*towers: nn.Module | None) -> None:
    """Makes open_clip towers compute activations again for the gradient; raises UsageError for one that cannot."""
    for tower in towers:
        if tower is None:
            continue
        try:
            with warnings.catch_warnings():  # transformers has a newer name for what open_clip calls
                warnings.simplefilter("ignore", FutureWarning)
                tower.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, NotImplementedError, AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"grad_checkpointing: {type(tower).__name__} cannot do it ({error})") from None


def has_quick_gelu(tower: nn.Module) -> bool:
    """Whether the blocks of a tower have QuickGELU, which open_clip keeps as one key for both towers of a pair."""
    return any(isinstance(module, QuickGELU) for module in tower.modules())


def compile_towers(image: nn.Module | None, text: nn.Module) -> None:
    """Puts torch.compile before the towers' forwards; names of parameters and what is saved stay as they are.

    Of a text tower the transformer is compiled: what surrounds it is sliced to the length of each batch.
    """
    if image is not None:
        image.compile()
    part: Any = getattr(text, "transformer", text)
    part.compile(dynamic=True)


def _build(builder: Any, config: dict[str, Any], section: str, seed: int, name: str) -> nn.Module:
    try:
        with initialised(seed, name):
            tower = builder(config["embed_dim"], config[section], config.get("quick_gelu", False))
    except (AssertionError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UsageError(f"pair: open_clip cannot build {section} = {config[section]}: {error}") from error
    return tower  # type: ignore[no-any-return]


def assemble(config: dict[str, Any], image: nn.Module, text: nn.Module, scale: float) -> CustomTextCLIP:
    """The two towers in open_clip's CustomTextCLIP, with the scale as its logit_scale."""
    pair = CustomTextCLIP.__new__(CustomTextCLIP)
    nn.Module.__init__(pair)
    pair.output_dict = False
    pair.visual, pair.text = image, text
    pair.context_length, pair.vocab_size = text.context_length, text.vocab_size
    pair.logit_scale = nn.Parameter(torch.tensor(scale).log())
    pair.logit_bias = None
    return pair


def encode_text(text: Any, tokens: Tensor) -> Tensor:
    """Text features [B, D] of tokens [B, n], n at most the context length, by an open_clip text tower.

    open_clip's causal text tower wants exactly the context length; position and mask are sliced here, which is
    exact because the end token never looks at the padding behind it. Encoders of transformers take any length and mask
    the padding. Other towers get the padding back.
    """
    length = tokens.shape[1]
    features: Tensor
    if length == text.context_length or is_encoder(text):
        features = text(tokens)
    elif not takes_short_text(text):
        padding = (0, text.context_length - length)
        features = text(nn.functional.pad(tokens, padding, value=getattr(text, "pad_id", 0)))
    else:
        x = text.token_embedding(tokens) + text.positional_embedding[:length]
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        features = text_global_pool(text.ln_final(x), tokens, text.pool_type, text.eos_id)
        if isinstance(text.text_projection, nn.Linear):
            features = text.text_projection(features)
        elif text.text_projection is not None:
            features = features @ text.text_projection
    return features


def takes_short_text(text: nn.Module) -> bool:
    """Whether the features of a text do not depend on the padding behind its end token."""
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and text.pool_type in ("argmax", "eos")
        and not text.output_tokens
    )


def takes_any_length(text: nn.Module) -> bool:
    """Whether `encode_text` computes the same features of a text whatever the padding, and does not need any."""
    return takes_short_text(text) or is_encoder(text)


OTHER_SIZE = "set pair.vision.image_size or pair.text.context_length to what the weights were trained with"


def load_pair_weights(image: nn.Module, text: nn.Module, path: str) -> None:
    """Starts both towers from a safetensors file in open_clip's layouts, strictly."""
    towers = {f"{prefix}.": tower for prefix, tower in (("visual", image), ("text", text))}
    names = [prefix + name for prefix, tower in towers.items() for name in tower.state_dict()]
    state, wrapper = unwrapped(read_safetensors(path), names)
    if "log_scale" in state and "third_norms" in state:
        raise CheckpointError(
            f"{path}: is the model of a run; `threetowers export {Path(path).parent} --to open_clip --out DIR` writes "
            "open_clip_model.safetensors, which is read here"
        )
    say_unwrapped(wrapper, path)
    if "text_projection" in state and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
    for prefix, tower in towers.items():
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        load_strictly(tower, part, f"{path} ({prefix}*)", other_size=OTHER_SIZE)
    rest = [k for k in state if not k.startswith(tuple(towers)) and k not in ("logit_scale", "logit_bias")]
    if rest:
        raise CheckpointError(f"{path}: unexpected keys: {_first(sorted(rest))}")
