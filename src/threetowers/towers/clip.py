"""transformers' CLIPModel and open_clip's towers: the same networks under other names, read in both directions.

export/transformers.py writes a pair under transformers' names. Main towers that start at a CLIPModel are read here
under open_clip's, with its preprocessing and its tokenizer, and compared with transformers' own before they are used.
Legend: N samples, n tokens, W width of a tower, D embedding.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from threetowers.data.tokenize import FileTokenizer
from threetowers.errors import CheckpointError, UsageError
from threetowers.objective.losses import unit
from threetowers.towers.frozen.base import Loaded
from threetowers.towers.frozen.hf import (
    PROCESSORS,
    image_spec,
    load_model,
    local_folder,
    num_channels,
    processor_settings,
    read_config,
)
from threetowers.towers.frozen.text import (
    VOCABULARIES,
    HuggingFaceTokens,
    fast_rules,
    load_hf_tokenizer,
    pad_id,
)
from threetowers.towers.pair import build_image_tower, build_text_tower, encode_text
from threetowers.towers.weights import load_strictly

Side = Literal["img", "txt"]
OUTSIDE: dict[Side, dict[str, str]] = {
    "img": {
        "proj": "visual_projection.weight",
        "class_embedding": "vision_model.embeddings.class_embedding",
        "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # their spelling
        "ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "ln_post.weight": "vision_model.post_layernorm.weight",
        "ln_post.bias": "vision_model.post_layernorm.bias",
    },
    "txt": {
        "text_projection": "text_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    },
}
"""The weights outside the blocks: open_clip's name and transformers' name."""
TRANSPOSED = ("proj", "text_projection")
"""Projections are [W, D] in open_clip and [D, W] in transformers."""
LAYERS: dict[Side, str] = {"img": "vision_model.encoder.layers", "txt": "text_model.encoder.layers"}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""The modules of a block, but for queries, keys and values: open_clip's name and transformers' name."""
QUICK = "quick_gelu"
"""transformers' name of QuickGELU, and open_clip's key for it."""
GELUS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""Activations beside QuickGELU: transformers' name and `approximate` of torch's GELU."""
EPS = 1e-5
"""The epsilon of layer norms for which open_clip needs no key."""
ARGMAX_ID = 2
"""With this id of the end token, transformers' CLIP pools at the highest id of a text and not at its end token."""
REMEDIES = {
    "clip_vision_model": "it has no projection and no texts; give the folder or name of the whole CLIPModel",
    "clip_text_model": "it has no projection and no images; give the folder or name of the whole CLIPModel",
    "vision-text-dual-encoder": "an export of this project starts again as file:RUN, from the folder of its run",
}
"""What to give instead of related types of models."""
OTHERS = "others are timm:NAME or open_clip:NAME@TAG for images, hf-text:DIR_OR_ID for texts"
SAMPLE = ("a photo of a red square", "Ein sehr langer Größenvergleich, " * 40 + "Ende", "")
"""Texts whose features have to be transformers' own; the second is longer than any context length in use."""
TOLERANCE = 1e-5
"""The largest difference between two unit vectors, in any component, at which they count as the same."""


# The weights.


def _names(side: Side, num_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each weight of a tower in open_clip, with the weights of transformers that are stacked in it."""
    for ours, theirs in OUTSIDE[side].items():
        yield ours, (theirs,)
    for layer in range(num_layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"{LAYERS[side]}.{layer}"
        for part in ("weight", "bias"):
            yield f"{ours}.attn.in_proj_{part}", tuple(f"{theirs}.self_attn.{x}_proj.{part}" for x in "qkv")
            for module, name in BLOCK.items():
                yield f"{ours}.{module}.{part}", (f"{theirs}.{name}.{part}",)


def to_transformers(side: Side, state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The weights of an open_clip tower under the names of CLIPModel."""
    found: dict[str, Tensor] = {}
    for ours, theirs in _names(side, num_layers):
        value = state[ours].T if ours in TRANSPOSED else state[ours]
        found |= zip(theirs, value.chunk(len(theirs)), strict=True)
    return found


def to_open_clip(side: Side, state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """One side's weights of a CLIPModel under the names of an open_clip tower."""
    found = {}
    for ours, theirs in _names(side, num_layers):
        value = torch.cat([state[name] for name in theirs])
        found[ours] = value.T.contiguous() if ours in TRANSPOSED else value
    return found


# The configuration.


def activation(block: Any) -> str | None:
    """transformers' name of the activation of a block of open_clip; None when it has none for it."""
    gelu = block.mlp.gelu
    if isinstance(gelu, QuickGELU):
        return QUICK
    names = {approximate: name for name, approximate in GELUS.items()}
    return names.get(gelu.approximate) if isinstance(gelu, nn.GELU) else None


def blocks_to_transformers(tower: Any, norm: Any) -> dict[str, Any]:
    """The keys of transformers' configuration for the blocks of an open_clip tower. norm: the one behind them."""
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": tower.transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": activation(block),
        "layer_norm_eps": norm.eps,
    }


def _blocks_to_open_clip(config: Any, source: str) -> dict[str, Any]:
    """The keys of open_clip's vision_cfg and text_cfg for the blocks of a transformers configuration, heads apart."""
    act = config.hidden_act
    if act != QUICK and act not in GELUS:
        raise UsageError(
            f"{source}: its activation is {act!r}, and open_clip's towers have {', '.join(GELUS)} or {QUICK}; give "
            "another model"
        )
    width, inner = config.hidden_size, config.intermediate_size
    ratio = inner / width
    if int(width * ratio) < inner:  # open_clip rounds the product down
        ratio = math.nextafter(ratio, math.inf)
    cfg = {"width": width, "layers": config.num_hidden_layers, "mlp_ratio": ratio}
    if config.layer_norm_eps != EPS:
        cfg["norm_kwargs"] = {"eps": config.layer_norm_eps}
    if GELUS.get(act, "none") != "none":
        cfg["act_kwargs"] = {"approximate": GELUS[act]}
    return cfg


# A CLIPModel as a start.


class TextHalf(NamedTuple):
    """The text side of a CLIPModel. tower: open_clip's, with D outputs. text_cfg: what builds it."""

    tower: nn.Module
    text_cfg: dict[str, Any]
    width: int
    tokenizer: FileTokenizer


def load_image_half(spec: str, name: str) -> Loaded:
    """The image tower of a CLIPModel, through its projection, as an open_clip tower with its own preprocessing.

    Raises UsageError for another model or one that open_clip cannot be, CheckpointError for files that are missing,
    damaged or do not fit.
    """
    source = f"start.image: {spec}"
    model = _load_clip(name, source, PROCESSORS)
    config = model.config.vision_config
    image = image_spec(processor_settings(name, source), spec, num_channels(model.vision_model))
    if image.size != config.image_size or len(image.mean) != 3:
        raise UsageError(
            f"{source}: its image processor makes images of {image.size} pixels in {len(image.mean)} channels, and its "
            f"network takes {config.image_size} pixels in 3; correct preprocessor_config.json, or give another model"
        )
    cfg = {
        **_blocks_to_open_clip(config, source),
        "head_width": config.hidden_size // config.num_attention_heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
    }
    width, quick = model.config.projection_dim, config.hidden_act == QUICK
    tower = build_image_tower({"embed_dim": width, "vision_cfg": cfg, "quick_gelu": quick}, 0)
    load_strictly(tower, to_open_clip("img", model.state_dict(), config.num_hidden_layers), source)
    pixels = torch.randn(2, 3, image.size, image.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _compare(tower.eval()(pixels), model.get_image_features(pixel_values=pixels).pooler_output, source)
    return Loaded(tower, width, image, cfg)


def load_text_half(spec: str, name: str) -> TextHalf:
    """The text tower of a CLIPModel, through its projection, as an open_clip tower with its own tokenizer.

    Texts are cut at the tokenizer's limit, and positions behind it are left out. Raises UsageError for another model or
    one that open_clip cannot be, CheckpointError for files that are missing, damaged or do not fit.
    """
    source = f"start.text: {spec}"
    model = _load_clip(name, source, VOCABULARIES)
    config = model.config.text_config
    loaded = load_hf_tokenizer(name, source)
    limit = min(loaded.model_max_length, config.max_position_embeddings)
    rules = fast_rules(loaded, source)
    if loaded.pad_token_id is not None:
        rules.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    tokenizer = FileTokenizer(rules, limit, source)
    _check_ids(config, tokenizer.end_id, max(loaded.get_vocab().values()), source)
    cfg = {
        **tokenizer.text_cfg(),
        **_blocks_to_open_clip(config, source),
        "heads": config.num_attention_heads,
        "context_length": limit,
        "vocab_size": config.vocab_size,  # it may have rows that no text reaches
    }
    width, quick = model.config.projection_dim, config.hidden_act == QUICK
    tower = build_text_tower({"embed_dim": width, "text_cfg": cfg, "quick_gelu": quick}, 0)
    state = to_open_clip("txt", model.state_dict(), config.num_hidden_layers)
    state["positional_embedding"] = state["positional_embedding"][:limit].clone()
    load_strictly(tower, state, source)
    _compare_texts(tower.eval(), tokenizer, model, loaded, source)
    return TextHalf(tower, cfg, width, tokenizer)


def _load_clip(name: str, source: str, needs: tuple[str, ...]) -> Any:
    """transformers' CLIPModel of that name in fp32; the type is looked at before weights are fetched."""
    found = read_config(local_folder(name, source, needs), source).model_type
    if found != "clip":
        remedy = REMEDIES.get(found, OTHERS)
        raise UsageError(
            f"{source}: a model of the type {found!r}, and main towers start at transformers' CLIPModel alone; {remedy}"
        )
    return load_model(name, source)[0]


def _check_ids(config: Any, end: int, highest: int, source: str) -> None:
    """Raises for a vocabulary that does not belong to the network, and for a text pooled elsewhere than at its end."""
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has ids up to {highest:,}, and the network knows {config.vocab_size:,} tokens; "
            "they do not belong together"
        )
    pooled = highest if config.eos_token_id == ARGMAX_ID else config.eos_token_id
    if pooled == end:
        return
    rule = f"eos_token_id is {config.eos_token_id}"
    if config.eos_token_id == ARGMAX_ID:
        rule += f", with which transformers' CLIP pools at the highest id, up to {highest}"
    remedy = "give another model"
    if end != ARGMAX_ID:
        remedy = f"if the model was trained to pool there, write {end} as eos_token_id into text_config of config.json"
    raise UsageError(
        f"{source}: {rule}, and the tokenizer ends texts with the id {end}, at which open_clip pools; {remedy}"
    )


@torch.no_grad()
def _compare_texts(tower: nn.Module, tokenizer: FileTokenizer, model: Any, loaded: Any, source: str) -> None:
    """Raises CheckpointError unless ids and features of SAMPLE are those that transformers computes."""
    theirs = HuggingFaceTokens(loaded, tokenizer.context_length)(SAMPLE)  # [N, n], -1 is padding
    ours = tokenizer(SAMPLE)
    same = ours[:, : theirs.shape[1]]
    if not torch.equal(same.where(theirs >= 0, -1), theirs):
        raise CheckpointError(
            f"{source}: its tokenizer as a tokenizer.json gives other ids than in transformers. Save it again with "
            "save_pretrained of transformers; if that does not help, please report it with its files"
        )
    mask = theirs >= 0
    found = model.get_text_features(
        input_ids=theirs.where(mask, pad_id(loaded)), attention_mask=mask.long()
    ).pooler_output
    _compare(encode_text(tower, ours), found, source)


def _compare(ours: Tensor, theirs: Tensor, source: str) -> None:
    """Raises CheckpointError for features [N, D] whose unit vectors differ by more than TOLERANCE, or are NaN."""
    difference = float((unit(ours) - unit(theirs)).abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{source}: open_clip's tower computes other features from these weights than transformers (they differ by "
            f"{difference:.1e}, and at most {TOLERANCE:.0e} is allowed). Please report this with its config.json"
        )
