"""A sentence encoder in transformers' format, read as a text tower to start at: its network, tokenizer and pooling.

sentence-transformers writes modules.json beside the files of transformers. It says how the features of the tokens
become one vector; without it that is the first token's, the class token. The last step of such encoders brings vectors
to unit length, which every view of ours gets anyway.
Legend: W width of the encoder.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from torch import Tensor

from threetowers.data.tokenize import FileTokenizer
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.encoder import BESIDE, CONFIG, POOLERS, TYPES
from threetowers.towers.frozen.base import foreign
from threetowers.towers.frozen.hf import REMEDY, import_transformers, load_model, local_folder
from threetowers.towers.frozen.text import VOCABULARIES, fast_rules, load_hf_tokenizer, token_limit

MODULES = ("Transformer", "Pooling", "Normalize")
"""The modules of sentence-transformers that can be taken over; the last changes no cosine."""
LEGACY = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
"""How earlier releases of sentence-transformers wrote the two kinds of pooling that can be taken over."""


@dataclass(frozen=True)
class SentenceEncoder:
    """What there is to know of an encoder.

    text_cfg: open_clip's, with the configuration of the network under CONFIG, and no projection. width: W of its
    features. state: the weights, by the names of open_clip's HFTextEncoder.
    """

    text_cfg: dict[str, Any]
    width: int
    tokenizer: FileTokenizer
    state: dict[str, Tensor]


def read_encoder(spec: str, name: str) -> SentenceEncoder:
    """The encoder in a folder, or of that name on the Hub.

    Dropout is off, as in open_clip's own towers. Raises UsageError for an encoder that open_clip's class cannot be, and
    CheckpointError for files that are missing or damaged.
    """
    source = f"start.text: {spec}"
    local_folder(name, source, VOCABULARIES)
    pooling, settings = _sentence_settings(name, source)
    model, _ = load_model(name, source)
    config = model.config
    if config.model_type not in TYPES:
        raise UsageError(
            f"{source}: a network of the type {config.model_type}, and open_clip's text tower takes "
            f"{', '.join(TYPES)}; give such an encoder, or take this one as third tower"
        )
    loaded = load_hf_tokenizer(name, source)
    limit = token_limit(loaded, config)
    if given := settings.get("max_seq_length"):
        limit = min(limit, int(given))
    tokenizer = _tokenizer(loaded, limit, lower=bool(settings.get("do_lower_case")), source=source)
    if tokenizer.text_cfg()["vocab_size"] > config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.text_cfg()['vocab_size']:,} tokens, and the network knows "
            f"{config.vocab_size:,}; they do not belong together"
        )
    published = _read_json(name, "config.json", source)
    as_published = (  # open_clip would take padding and type of the weights from there
        not Path(name).is_dir()
        and config.pad_token_id == tokenizer.pad_id
        and published.get("dtype", published.get("torch_dtype")) in (None, "float32")
    )
    config.pad_token_id, config.dtype = tokenizer.pad_id, torch.float32
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    described = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "auto_map"):
        described.pop(key, None)
    text_cfg = {
        "context_length": limit,
        "hf_model_name": name if as_published else BESIDE,
        "hf_model_pretrained": False,
        "hf_pooler_type": POOLERS[pooling],
        "hf_proj_type": None,
        CONFIG: described,
    }
    state = {
        f"transformer.{key}": value
        for key, value in model.state_dict().items()
        if not key.startswith("pooler.")
    }
    return SentenceEncoder(text_cfg, int(config.hidden_size), tokenizer, state)


def _sentence_settings(name: str, source: str) -> tuple[str, dict[str, Any]]:
    """The pooling, mean or cls, and sentence-transformers' settings of the network; cls where it has none."""
    modules = _read_json(name, "modules.json", source)
    if modules is None:
        return "cls", {}
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    if others := [kind for kind in kinds if kind not in MODULES]:
        raise UsageError(
            f"{source}: its modules.json lists {' and '.join(others)}, and a text tower takes {', '.join(MODULES)} "
            "alone. Give such an encoder, or a copy of the folder without modules.json, whose class token is taken then"
        )
    if "Pooling" not in kinds:
        raise UsageError(
            f"{source}: its modules.json lists no Pooling; without the file the class token is taken"
        )
    settings = _read_json(name, f"{kinds['Pooling']}/config.json", source) or {}
    found = settings.get("pooling_mode")
    if found is None:
        active = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
        found = [LEGACY.get(key, key.removeprefix("pooling_mode_")) for key in active]
    modes = [found] if isinstance(found, str) else list(found)
    if len(modes) != 1 or modes[0] not in POOLERS:
        raise UsageError(
            f"{source}: pools by {' and '.join(map(str, modes)) or 'nothing'} ({kinds['Pooling']}/config.json), and "
            f"open_clip's text tower by one of {', '.join(POOLERS)}; give another encoder"
        )
    return modes[0], _read_json(name, "sentence_bert_config.json", source) or {}


def _read_json(name: str, file: str, source: str) -> Any:
    """A JSON file of a folder, or of a name on the Hub; None where it has none."""
    transformers = import_transformers(source)
    with foreign(source, file, REMEDY, hub=not Path(name).is_dir()):
        path = transformers.utils.cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _tokenizer(loaded: Any, limit: int, *, lower: bool, source: str) -> FileTokenizer:
    """transformers' tokenizer as a tokenizer.json of ours; raises UsageError for one that cannot be one."""
    rules = fast_rules(loaded, source)
    others = (None, loaded.unk_token_id, loaded.eos_token_id, loaded.sep_token_id)
    if loaded.pad_token_id in others:
        raise UsageError(
            f"{source}: the tokenizer has no token for padding alone (pad_token = {loaded.pad_token!r}), by which "
            "open_clip's text tower tells texts from padding; give another encoder"
        )
    if lower:  # sentence-transformers does it before the tokenizer's own steps
        steps = [normalizers.Lowercase(), *([rules.normalizer] if rules.normalizer else [])]
        rules.normalizer = normalizers.Sequence(steps)
    rules.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return FileTokenizer(rules, limit, source)
