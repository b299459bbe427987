"""A tiny CLIPModel of transformers, with a tokenizer as OpenAI's is made."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer

NARROW = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = 16
NUM_MERGES = 200


def clip_tokenizer(context_length: int = CONTEXT) -> Any:
    """CLIP's letters and its first merges; the end token has the highest id and pads, as OpenAI's does."""
    own = SimpleTokenizer()
    merges = list(own.bpe_ranks)[:NUM_MERGES]
    tokens = [
        *list(own.encoder)[:512],
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return transformers.CLIPTokenizer(
        vocab={token: id for id, token in enumerate(tokens)}, merges=merges, model_max_length=context_length
    )


def clip_folder(
    folder: Path,
    act: str = "quick_gelu",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
    limit: int = CONTEXT,
) -> Path:
    """A CLIPModel of random weights as save_pretrained writes it, with tokenizer and image processor.

    act: the activation of both towers. text, vision, processor: changes of their settings. limit: the tokenizer's, in
    tokens.
    """
    tokenizer = clip_tokenizer(limit)
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = transformers.CLIPConfig(
        text_config={**NARROW, **ids, "max_position_embeddings": CONTEXT, "hidden_act": act, **(text or {})},
        vision_config={**NARROW, "image_size": 32, "patch_size": 8, "hidden_act": act, **(vision or {})},
        projection_dim=20,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():  # biases and norms that are not those of a fresh network
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 36},
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4], "resample": 2, "do_convert_rgb": True, **(processor or {}),
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
