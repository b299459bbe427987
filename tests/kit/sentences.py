"""A tiny sentence encoder in the files of transformers and sentence-transformers."""

import json
from pathlib import Path

import torch
import transformers

WORDS = """a red green blue yellow square circle at the top bottom left right of photo is and not it an image
##s ##ly . , ' & ; c d e t x s"""
NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def sentence_encoder(
    folder: Path,
    pooling: str | None = "mean",
    *,
    legacy: bool = False,
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    max_seq_length: int = 20,
    roberta: bool = False,
) -> Path:
    """A BERT of random weights, with dropout, and a vocabulary of words.

    pooling: of sentence-transformers' 1_Pooling; None leaves all its files out. legacy: as earlier releases did.
    modules: what its modules.json lists. roberta: another network, whose padding has the id 1 and counts positions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    special = ["[UNK]", "[PAD]"] if roberta else ["[PAD]", "[UNK]"]
    vocabulary.write_text("\n".join([*special, "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(vocab=str(vocabulary), model_max_length=24)
    tokenizer.save_pretrained(folder)
    kind = "Roberta" if roberta else "Bert"
    options = {
        **NARROW,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 26,
        "pad_token_id": int(roberta),
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
        for parameter in model.parameters():  # biases and norms that are not those of a fresh network
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    if pooling is not None:
        paths = {"Transformer": "", "Pooling": "1_Pooling"}
        listed = [
            {"idx": index, "name": str(index), "path": paths.get(kind, f"{index}_{kind}"),
             "type": f"sentence_transformers.models.{kind}"}
            for index, kind in enumerate(modules)
        ]  # fmt: skip
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        old = {"word_embedding_dimension": 32, "pooling_mode_cls_token": pooling == "cls",
               "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_max_tokens": pooling == "max"}  # fmt: skip
        new = {"embedding_dimension": 32, "pooling_mode": pooling}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(old if legacy else new))
        settings = {"max_seq_length": max_seq_length, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder
