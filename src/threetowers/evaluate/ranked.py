"""Ranked ids of retrieval as JSON lines, from which metrics with right answers of their own can be computed.

A file holds one line per query: its id, the ids of its best candidates with the best first, and their scores. Two such
metrics are ECCV Caption (Chun et al., ECCV 2022, arXiv 2204.03359) and CxC (Parekh et al., 2021, arXiv 2004.15020),
which count right answers that COCO does not list:

    i2t, t2i = ({row["query"]: row["ids"] for row in map(json.loads, open(name))} for name in names)
    eccv_caption.Metrics().compute_all_metrics(i2t, t2i, target_metrics=("eccv_map_at_r", "cxc_recalls"))
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from threetowers.data.source import Source
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.encode import Encoded, samples_of_images, texts_of
from threetowers.evaluate.search import top_k
from threetowers.files import replacing

Id = int | str


@dataclass(frozen=True)
class Rankings:
    """Where ranked ids are written, and how many for each query; with fewer candidates, all of them.

    Raises UsageError for a number below 1.
    """

    folder: Path
    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(
                f"ranked: at least 1 id of each query is needed, got {self.k}; 50 is what ECCV takes"
            )

    def write(self, name: str, encoded: Encoded, source: Source) -> tuple[Path, Path]:
        """Writes NAME-i2t.jsonl, the texts of each image, and NAME-t2i.jsonl; returns their paths.

        encoded: what `encode` made of the source. An image has the id of its sample, and the n-th caption of a sample,
        counted from 0, the id SAMPLE#n, as in Flickr30k's token file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        image, text = encoded.system("main")
        index = encoded.index.tolist()
        texts = texts_of(source, index, samples_of_images(source, merge=True))
        image_ids = [source.record(sample).id for sample in index]
        places = zip(texts.samples, texts.places, strict=True)
        text_ids = [f"{source.record(sample).id}#{place}" for sample, place in places]
        stem = name.replace("/", "-")
        i2t, t2i = self.folder / f"{stem}-i2t.jsonl", self.folder / f"{stem}-t2i.jsonl"
        write_ranked(i2t, image_ids, text_ids, *top_k(image, text, min(self.k, len(text))))
        write_ranked(t2i, text_ids, image_ids, *top_k(text, image, min(self.k, len(image))))
        return i2t, t2i


def write_ranked(
    path: Path, query_ids: Sequence[Id], candidate_ids: Sequence[Id], scores: Tensor, indices: Tensor
) -> None:
    """Writes what `search.top_k` found; the file appears whole or not at all.

    query_ids: Q ids, and candidate_ids: C ids, numbers or texts, each id once. scores and indices: [Q, k]. Raises
    DataError for ids that do not fit.

        write_ranked(Path("i2t.jsonl"), image_ids, text_ids, *top_k(image, text, 50))
    """
    for what, ids in (("query_ids", query_ids), ("candidate_ids", candidate_ids)):
        _check_ids(ids, what)
    if scores.shape != indices.shape or indices.ndim != 2 or len(indices) != len(query_ids):
        raise DataError(
            f"scores and indices: one row for each of {len(query_ids)} queries is needed in both, got "
            f"{list(scores.shape)} and {list(indices.shape)}"
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(candidate_ids):
        raise DataError(
            f"candidate_ids: {len(candidate_ids)} ids, but indices from {int(indices.min())} to {int(indices.max())}"
        )
    with replacing(path) as file:
        for query, row, places in zip(query_ids, scores.tolist(), indices.tolist(), strict=True):
            found = {
                "query": query,
                "ids": [candidate_ids[place] for place in places],
                "scores": [float(f"{score:.9g}") for score in row],  # nine digits tell fp32 numbers apart
            }
            file.write(json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")


def _check_ids(ids: Sequence[Id], what: str) -> None:
    seen: dict[Id, int] = {}
    for row, id in enumerate(ids):
        if type(id) not in (int, str):
            raise DataError(
                f"{what}: row {row} is {id!r}, a whole number or a text is needed; see Tensor.tolist"
            )
        if id in seen:
            raise DataError(f"{what}: rows {seen[id]} and {row} are both {id!r}; each id must be there once")
        seen[id] = row
