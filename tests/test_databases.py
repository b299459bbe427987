"""Vector databases take what the documents say they take: rows of `vectors`, and LanceDB an exported folder."""

import json
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.embeddings import get_registry
from numpy.typing import NDArray
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

from kit.runs import Config
from threetowers.commands.arguments import VectorsArguments
from threetowers.commands.vectors import vectors
from threetowers.export.open_clip import export_open_clip
from threetowers.run.finished import load_run
from threetowers.train.loop import train

TEXTS = ["a red square at the top left", "the bottom right is blue"]


@pytest.fixture
def run(folder: Path, tiny_config: Config) -> Path:
    if not (folder / "run").exists():
        train(tiny_config(steps=2), folder / "run")
    return folder / "run"


@pytest.fixture
def rows(folder: Path, run: Path, photos: Path) -> tuple[NDArray[np.float32], list[str]]:
    if not (folder / "vectors").exists():
        vectors(VectorsArguments(run=run, data=str(photos), out=folder / "vectors", device="cpu"))
    lines = (folder / "vectors" / "ids.jsonl").read_text(encoding="utf-8").splitlines()
    return np.load(folder / "vectors" / "vectors.npy"), [json.loads(line)["id"] for line in lines]


def test_lancedb_embeds_with_an_exported_folder(run: Path, photos: Path, tmp_path: Path) -> None:
    """Its vectors of files and of texts are those of the run, to 1e-5."""
    folder = export_open_clip(run, tmp_path / "exported")
    embedder: Any = get_registry().get("open-clip")
    embed = embedder.create(name=f"local-dir:{folder}", pretrained="")
    embed._model.eval()
    files = sorted(photos.parent.glob("*.png"))[:3]
    ours = load_run(run)
    found = np.stack(embed.compute_source_embeddings([str(file) for file in files]))
    np.testing.assert_allclose(found, ours.encode_image(files).numpy(), rtol=0, atol=1e-5)
    for text in TEXTS:
        (vector,) = embed.compute_query_embeddings(text)
        np.testing.assert_allclose(vector, ours.encode_text([text]).numpy()[0], rtol=0, atol=1e-5)


def nearest(rows: NDArray[np.float32], ids: list[str], query: Any) -> list[str]:
    return [ids[row] for row in np.argsort(-(rows @ query), kind="stable")[:5]]


def test_lancedb_takes_the_rows_of_vectors(
    run: Path, rows: tuple[NDArray[np.float32], list[str]], tmp_path: Path
) -> None:
    values, ids = rows
    data = pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])})
    table = lancedb.connect(tmp_path / "lance").create_table("photos", data)
    for query in load_run(run).encode_text(TEXTS).numpy():
        search: Any = table.search(query)
        found = search.metric("dot").limit(5).to_list()
        assert [row["id"] for row in found] == nearest(values, ids, query)


def test_qdrant_takes_the_rows_of_vectors(run: Path, rows: tuple[NDArray[np.float32], list[str]]) -> None:
    values, ids = rows
    client = QdrantClient(":memory:")
    client.create_collection("photos", VectorParams(size=values.shape[1], distance=Distance.DOT))
    client.upload_collection("photos", values, payload=[{"id": each} for each in ids])
    for query in load_run(run).encode_text(TEXTS).numpy():
        found = client.query_points("photos", query, limit=5).points
        assert [(point.payload or {})["id"] for point in found] == nearest(values, ids, query)
