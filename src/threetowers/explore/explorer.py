"""What the page asks of the models, without anything of HTTP: search, zero-shot classes, similarities, maps.

Each column of the page is a run, or a run combined with one of its third towers in score space:
s_α = (1−α) s_main + α s_third (arXiv 2305.16999, figure 5). A column keeps the vectors of both systems side by side,
[f; h], and α weights the query alone, [(1−α) g; α g_h]. One product over vectors that never change then gives s_α.

Legend: N images, M captions, Q queries, D width of a column's vectors.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from threetowers.data.order import hash64
from threetowers.errors import DataError
from threetowers.evaluate.similarity import UndefinedError, principal_map
from threetowers.evaluate.zero_shot import DEFAULT_TEMPLATES, check_prompts, class_embeddings, prompt
from threetowers.explore.gallery import Features, Gallery
from threetowers.explore.models import Model, Vectors
from threetowers.explore.nearest import Nearest, nearest
from threetowers.explore.templates import templates

Kind = Literal["images", "captions"]
KEPT_TEXTS = 2_000
"""Encoded texts that are kept, so that a move of α encodes nothing."""
KEPT_UPLOADS = 32
MAP_POINTS = 2_500
"""Images, and captions, of a map at most; of more, a part is drawn by a hash."""
EXAMPLES = 6  # images of each typed class


class Query(NamedTuple):
    """What is looked for: a text, a row of the gallery, or the name of an upload; the other two are None."""

    text: str | None = None
    row: int | None = None
    upload: str | None = None


class Search(NamedTuple):
    """What is looked for with which α, and how many images or captions are wanted."""

    query: Query
    want: Kind
    alpha: float
    k: int


class UnknownError(Exception):
    """A row or an upload that is not there; the message is for the user of the page."""


@dataclass(frozen=True, eq=False)
class Column:
    """One answer beside the others: a model, and the third tower that α brings in, None where there is none.

    images [N, D], texts [M, D]: the vectors of both systems side by side, or those of the main pair. nearest_images,
    nearest_texts: the search among each.
    """

    model: Model
    third: str | None
    images: Tensor
    texts: Tensor
    nearest_images: Nearest
    nearest_texts: Nearest

    def vectors(self, given: Vectors) -> Tensor:
        """Vectors by system as this column compares them, [·, D]."""
        return _beside(given, self.third)

    def weighted(self, vectors: Tensor, alpha: float) -> Tensor:
        """Queries [Q, D] whose products with the column's vectors are s_α; α means nothing without a third tower."""
        if self.third is None:
            return vectors
        half = vectors.shape[1] // 2
        return torch.cat([(1 - alpha) * vectors[:, :half], alpha * vectors[:, half:]], dim=1)


def _column(model: Model, third: str | None, images: Tensor, texts: Tensor) -> Column:
    return Column(model, third, images, texts, nearest(images), nearest(texts))


def _beside(given: Vectors, third: str | None) -> Tensor:
    return given["main"] if third is None else torch.cat([given["main"], given[third]], dim=1)


class Explorer:
    """Models, the gallery that all of them have encoded, and the queries and uploads that are kept for a while.

    Its methods are called from one thread at a time.
    """

    def __init__(self, models: Sequence[Model], gallery: Gallery, features: Sequence[Features]) -> None:
        self.models, self.gallery = list(models), gallery
        self.columns = [
            _column(model, third, _beside(each.images, third), _beside(each.texts, third))
            for model, each in zip(models, features, strict=True)
            for third in (model.systems[1:] or (None,))
        ]
        self._read: OrderedDict[str, list[Vectors]] = OrderedDict()
        self._uploads: OrderedDict[str, list[Vectors]] = OrderedDict()
        self._maps: dict[tuple[int, str, str], dict[str, Any]] = {}

    def about(self) -> dict[str, Any]:
        """What the page needs to begin: columns and the sizes of the gallery."""
        labels = [
            column.model.label if len(column.model.systems) < 3 else f"{column.model.label}: {column.third}"
            for column in self.columns
        ]
        return {
            "columns": [
                {
                    "label": label if labels.count(label) == 1 else f"{label}, {column.model.folder.name}",
                    "run": column.model.folder.name,
                    "third": column.third,
                    "method": column.model.run.described["method"],
                }
                for label, column in zip(labels, self.columns, strict=True)
            ],
            "gallery": {
                "name": self.gallery.name,
                "images": len(self.gallery.index),
                "captions": len(self.gallery.captions),
                "test": self.gallery.is_test,
                "trained": self.gallery.num_trained,
                "classes": list(self.gallery.source.class_names)[:50],
                "templates": templates(self.gallery.source.templates, self.gallery.captions),
                "examples": self._examples(),
                "key": self.gallery.source.fingerprint[:12],
            },
        }

    def _examples(self) -> list[dict[str, Any]]:
        """A few captions to begin with, drawn by a hash, each with its image."""
        rows = range(min(len(self.gallery.captions), 20_000))
        drawn = sorted(rows, key=lambda row: hash64("explore", row))
        chosen = {self.gallery.captions[row]: self.gallery.text_image[row] for row in drawn[:4]}
        return [{"text": text, "image": image} for text, image in chosen.items()]

    def upload(self, image: Image.Image) -> str:
        """Encodes an image and returns the name by which queries mean it; the oldest of many are forgotten."""
        vectors = [model.encode_images([image]) for model in self.models]
        name = secrets.token_urlsafe(12)
        self._uploads[name] = vectors
        while len(self._uploads) > KEPT_UPLOADS:
            self._uploads.popitem(last=False)
        return name

    def search(self, asked: Sequence[Search]) -> list[list[list[dict[str, Any]]] | UnknownError]:
        """For each search the k best images or captions by each column, or why there are none.

        All searches share one product for each column. An image that is searched with is not among its own results.
        """
        self._read_ahead([each.query.text for each in asked if each.query.text is not None])
        found: list[list[list[dict[str, Any]]] | UnknownError] = [[] for _ in asked]
        encoded: dict[int, list[Vectors]] = {}
        for number, each in enumerate(asked):
            try:
                encoded[number] = self._encoded(each.query)
            except UnknownError as error:
                found[number] = error
        for want in ("images", "captions"):
            some = [number for number in encoded if asked[number].want == want]
            if not some:
                continue
            k = max(asked[number].k for number in some) + 1  # an image among its own results is taken out
            for column in self.columns:
                place = self.models.index(column.model)
                queries = [
                    column.weighted(column.vectors(encoded[number][place]), asked[number].alpha)
                    for number in some
                ]
                near = column.nearest_images if want == "images" else column.nearest_texts
                for number, answers in zip(some, near(torch.cat(queries), k), strict=True):
                    own = asked[number].query.row if want == "images" else None
                    others = [answer for answer in answers if answer[1] != own][: asked[number].k]
                    columns = found[number]
                    assert isinstance(columns, list)
                    columns.append([self._item(row, score, want) for score, row in others])
        return found

    def _item(self, row: int, score: float, want: str) -> dict[str, Any]:
        image = row if want == "images" else self.gallery.text_image[row]
        captions = self.gallery.captions_of(image) if want == "images" else [self.gallery.captions[row]]
        trained = self.gallery.is_trained(image)
        return {"image": image, "score": round(score, 5), "captions": captions[:5], "trained": trained}

    def zero_shot(
        self, names: Sequence[str], template: str, alpha: float, query: Query | None
    ) -> list[dict[str, Any]]:
        """The gallery sorted into classes that were typed in, and the probabilities of one image, by each column.

        template: with `{}` for the name. query: an image, or None. Probabilities are the softmax of the run's own scale
        times s_α. Raises UnknownError, UsageError for a template without a place.
        """
        encoded = None if query is None else self._encoded(query)
        template = template or DEFAULT_TEMPLATES[0]
        check_prompts(names, [template])
        self._read_ahead([prompt(template, name) for name in names])
        found = []
        for column in self.columns:
            place = self.models.index(column.model)
            classes = torch.cat([
                class_embeddings(self._encoder(place, system), names, [template])
                for system in self._systems(column)
            ], dim=1)  # fmt: skip
            weighted = column.weighted(classes, alpha) * column.model.run.scale
            probabilities = (column.images @ weighted.T).softmax(dim=1)
            sure, chosen = probabilities.max(dim=1)
            own = None
            if encoded is not None:
                vector = column.vectors(encoded[place])[0]
                own = [round(p, 4) for p in (weighted @ vector).softmax(dim=0).tolist()]
            found.append({"classes": self._by_class(names, sure, chosen), "query": own})
        return found

    def _systems(self, column: Column) -> list[str]:
        return ["main"] if column.third is None else ["main", column.third]

    def _encoder(self, place: int, system: str) -> Callable[[list[str]], Tensor]:
        def encode(texts: list[str]) -> Tensor:
            return torch.cat([self._texts(text)[place][system] for text in texts])

        return encode

    def _by_class(self, names: Sequence[str], sure: Tensor, chosen: Tensor) -> list[dict[str, Any]]:
        rows = []
        for number, name in enumerate(names):
            members = (chosen == number).nonzero().flatten()
            top = sure[members].topk(min(EXAMPLES, len(members)))
            items = [
                {**self._item(int(members[i]), 0.0, "images"), "score": round(p, 4)}
                for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            rows.append({"name": name, "count": len(members), "items": items})
        return rows

    def matrix(self, images: Sequence[Query], texts: Sequence[str], alpha: float) -> list[list[list[float]]]:
        """s_α of every image with every text, by each column: rows are images; raises UnknownError."""
        encoded = [self._encoded(query) for query in images]
        self._read_ahead(texts)
        read = [self._texts(text) for text in texts]
        found = []
        for column in self.columns:
            place = self.models.index(column.model)
            rows = torch.cat([column.vectors(each[place]) for each in encoded])
            others = torch.cat([column.vectors(each[place]) for each in read])
            scores = rows @ column.weighted(others, alpha).T
            found.append([[round(score, 4) for score in row] for row in scores.tolist()])
        return found

    def map(self, number: int, system: str, kind: str) -> dict[str, Any]:
        """A plane of a column's vectors: `points`, each [x, y, row, 0 for an image or 1 for a caption].

        system: `main` or `third`. kind: `images`, `captions` or `both`. variance: the share of each of the two
        directions. Raises UnknownError for a system that the column does not have, and where there is no plane.
        """
        key = (number, system, kind)
        if key not in self._maps:
            self._maps[key] = self._map(self.columns[number], system, kind)
        return self._maps[key]

    def _map(self, column: Column, system: str, kind: str) -> dict[str, Any]:
        if system == "third" and column.third is None:
            raise UnknownError("this run has no third tower to look through")
        rows: list[tuple[int, int]] = []
        parts = []
        for side, vectors in enumerate((column.images, column.texts)):
            if kind not in ("both", ("images", "captions")[side]):
                continue
            if column.third is not None:
                vectors = vectors.chunk(2, dim=1)[system == "third"]
            chosen = sorted(sorted(range(len(vectors)), key=lambda i: hash64("map", i))[:MAP_POINTS])
            parts.append(vectors[chosen])
            rows += [(row, side) for row in chosen]
        try:
            plane = principal_map(torch.cat(parts))
        except (UndefinedError, DataError) as error:
            raise UnknownError(f"there is no map: {error}") from None
        points = [
            [round(x, 5), round(y, 5), row, side]
            for (x, y), (row, side) in zip(plane.points.tolist(), rows, strict=True)
        ]
        return {"points": points, "variance": plane.shares, "system": system}

    def caption(self, row: int) -> dict[str, Any]:
        """A caption and its image, which the map shows; raises UnknownError."""
        if not 0 <= row < len(self.gallery.captions):
            raise UnknownError(f"there is no caption {row}")
        image = self.gallery.text_image[row]
        trained = self.gallery.is_trained(image)
        return {"image": image, "captions": [self.gallery.captions[row]], "trained": trained}

    def picture(self, row: int) -> dict[str, Any]:
        """An image's name and captions; raises UnknownError."""
        self.check_row(row)
        known = {"id": self.gallery.id(row), "captions": self.gallery.captions_of(row)}
        return {"image": row, **known, "trained": self.gallery.is_trained(row)}

    def check_row(self, row: int) -> None:
        """Raises UnknownError for what is no row of the gallery."""
        if not 0 <= row < len(self.gallery.index):
            raise UnknownError(f"there is no image {row}; they go from 0 to {len(self.gallery.index) - 1}")

    def _encoded(self, query: Query) -> list[Vectors]:
        """The query's vectors by every model."""
        if query.text is not None:
            return self._texts(query.text)
        if query.row is not None:
            self.check_row(query.row)
            return self._gallery_vectors(query.row)
        uploaded = self._uploads.get(query.upload or "")
        if uploaded is None:
            raise UnknownError("this upload is not kept any more; drop the image again")
        return uploaded

    def _gallery_vectors(self, row: int) -> list[Vectors]:
        found: list[Vectors] = []
        for model in self.models:
            vectors: Vectors = {}
            for column in self.columns:
                if column.model is model:
                    halves = column.images[row : row + 1].chunk(1 if column.third is None else 2, dim=1)
                    vectors |= dict(zip(self._systems(column), halves, strict=True))
            found.append(vectors)
        return found

    def _texts(self, text: str) -> list[Vectors]:
        self._read_ahead([text])
        self._read.move_to_end(text)
        return self._read[text]

    def _read_ahead(self, texts: Sequence[str]) -> None:
        """Encodes those texts that are not kept, all in one go."""
        new = [text for text in dict.fromkeys(texts) if text not in self._read]
        if not new:
            return
        encoded = [model.encode_texts(new) for model in self.models]
        for row, text in enumerate(new):
            self._read[text] = [
                {name: value[row : row + 1].clone() for name, value in vectors.items()} for vectors in encoded
            ]
        while len(self._read) > max(KEPT_TEXTS, len(new)):
            self._read.popitem(last=False)
