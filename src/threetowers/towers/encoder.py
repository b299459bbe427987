"""Encoders of transformers as text towers: open_clip's HFTextEncoder, built from a configuration that a run keeps.

    tower = build_encoder(512, text_cfg)     # random weights; its state is what open_clip loads
    features = tower(tokens)                 # int64 [B, n], n at most the context length → [B, D]

open_clip builds such a tower from a folder of transformers or from a name on the Hub, and a run can count on neither.
Its text_cfg therefore has one key more than open_clip's, CONFIG, which an export takes out again.
Legend: B texts, n tokens, D embedding.
"""

from collections.abc import Mapping
from typing import Any

from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from torch import nn

from threetowers.towers.frozen.hf import import_transformers

CONFIG = "hf_config"
"""The key of text_cfg with the configuration of the encoder, as transformers writes it to config.json."""
BESIDE = "./text"
"""As hf_model_name: the encoder came from a folder, and an export brings its configuration in a folder `text`."""
TYPES = tuple(name for name in arch_dict if name not in ("mt5", "m2m_100"))
"""The types of models that open_clip's class knows, but for those that also have a decoder."""
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
"""open_clip's names for the mean of all tokens that are no padding, and for the first token."""


def build_encoder(embed_dim: int, text_cfg: Mapping[str, Any]) -> nn.Module:
    """The text tower of a text_cfg that has CONFIG, with random weights; raises UsageError without transformers."""
    transformers = import_transformers(f"the text tower {text_cfg['hf_model_name']}")
    tower: Any = HFTextEncoder(
        text_cfg["hf_model_name"],
        output_dim=embed_dim,
        config=transformers.AutoConfig.for_model(**text_cfg[CONFIG]),
        pooler_type=text_cfg["hf_pooler_type"],
        proj_type=text_cfg["hf_proj_type"],
    )
    tower.transformer.pooler = None  # nothing reads it, and open_clip builds the network without it
    tower.context_length = text_cfg[
        "context_length"
    ]  # the texts', where open_clip has the number of positions
    return tower  # type: ignore[no-any-return]


def is_encoder(text: nn.Module) -> bool:
    """Whether a text tower is one of these, whose attention and pooling leave out the padding."""
    return isinstance(text, HFTextEncoder)
