"""The page of `threetowers explore`: what its server answers, and what it refuses."""

import asyncio
import io
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from kit.explored import SCRIPT, explored_runs, png
from kit.runs import TINY_INPUTS, TINY_PAIR
from kit.towers import byte_tower
from threetowers import cli
from threetowers.config import RunConfig
from threetowers.data.decode import decode
from threetowers.data.open import open_source
from threetowers.errors import CheckpointError, DataError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.evaluate.zero_shot import class_embeddings
from threetowers.explore import guard, server
from threetowers.explore.curves import POINTS, colours, thinned
from threetowers.explore.explorer import Explorer, Kind, Query, Search, UnknownError
from threetowers.explore.gallery import features
from threetowers.explore.models import open_model
from threetowers.explore.start import ExploreArguments, check, open_runs, run_folders
from threetowers.explore.templates import templates
from threetowers.explore.trained import trained_on
from threetowers.objective.pairs import METHODS
from threetowers.report.panels import PALETTE
from threetowers.run import thirds as thirds_module
from threetowers.run.finished import load_run
from threetowers.run.setup import open_data
from threetowers.settings import read_config
from threetowers.towers.weights import read_safetensors
from threetowers.train.loop import train

HERE = "http://127.0.0.1:8423"
Client = TestClient


@pytest.fixture(scope="module")
def runs(photos: Path, timm_tower: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return explored_runs(tmp_path_factory.mktemp("explored"), photos, timm_tower)


@pytest.fixture(scope="module")
def explorer(runs: dict[str, Path]) -> Explorer:
    found = open_runs([runs["baseline"], runs["3t"]], None, "cpu")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def client(explorer: Explorer, runs: dict[str, Path]) -> Iterator[Client]:
    yield TestClient(server.application(explorer, list(runs.values())), base_url=HERE)


def post(client: Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code == 200, answer.text
    values: dict[str, Any] = answer.json()
    return values


# What the models say


def test_vectors_equal_those_of_the_evaluation(runs: dict[str, Path]) -> None:
    """Of a run that was evaluated, and computed here where it was not; stores round the third tower's to fp16."""
    evaluate_run(runs["3t"])
    saved = read_safetensors(runs["3t"] / "features.safetensors")
    model = open_model(runs["3t"])
    source = open_data(read_config(runs["3t"] / "config.toml"))[2]
    read = features(model, source)
    (runs["3t"] / "features.safetensors").unlink()
    (runs["3t"] / "evaluation.json").unlink()
    computed = features(model, source)
    kept = features(model, source)
    assert model.systems == ("main", "third")
    for system, views in (("main", ("img", "txt")), ("third", ("third@txt", "txt@third"))):
        for side, view in zip(("images", "texts"), views, strict=True):
            own = getattr(read, side)[system]
            assert torch.equal(own, saved[f"test/{view}"])
            tolerance = 2e-3 if view == "third@txt" else 1e-5
            assert torch.allclose(getattr(computed, side)[system], own, atol=tolerance), view
            assert torch.equal(getattr(kept, side)[system], getattr(computed, side)[system])
    assert torch.equal(read.used, computed.used)


def test_a_tower_of_texts_is_combined_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thirds_module, "load_frozen", byte_tower)
    config = RunConfig(
        data=str(photos), third=("hf-text:tiny",), method="3t", steps=2, batch_size=16, device="cpu",
        pair=TINY_PAIR, inputs=TINY_INPUTS,
    )  # fmt: skip
    train(config, tmp_path / "run")
    evaluate_run(tmp_path / "run")
    saved = read_safetensors(tmp_path / "run" / "features.safetensors")
    model = open_model(tmp_path / "run")
    explored = open_runs([tmp_path / "run"], None, "cpu")
    assert explored is not None and model.systems == ("main", "third")
    gallery = explored.gallery
    images = model.encode_images([gallery.image(row) for row in range(len(gallery.index))])
    assert torch.allclose(images["third"], saved["test/img@third"], atol=1e-5)
    texts = model.encode_texts(gallery.captions)
    assert torch.allclose(texts["third"], saved["test/third@img"], atol=2e-3)


def test_search_equals_a_plain_search_at_every_alpha(client: Client, explorer: Explorer) -> None:
    text = "a red square at the top left"
    baseline, third = explorer.columns
    for alpha in (0.0, 0.3, 1.0):
        found = post(client, "search", text=text, alpha=alpha, k=5)["columns"]
        scores = []
        for column in (baseline, third):
            encoded = column.model.encode_texts([text])
            each = column.images[:, : encoded["main"].shape[1]] @ encoded["main"][0]
            if column.third:
                side = column.images[:, encoded["main"].shape[1] :] @ encoded["third"][0]
                each = (1 - alpha) * each + alpha * side
            scores.append(each)
        for column_found, expected in zip(found, scores, strict=True):
            top = expected.topk(5)
            assert [item["image"] for item in column_found] == top.indices.tolist()
            assert [item["score"] for item in column_found] == pytest.approx(top.values.tolist(), abs=2e-5)


def test_searches_at_once_are_answered_as_one_by_one(explorer: Explorer) -> None:
    """Of texts, images and an unknown upload, for images and captions, with several α and numbers of answers."""
    queries = [
        Query(text="a red square"),
        Query(row=3),
        Query(upload="nothing"),
        Query(text="the top left is blue"),
    ]
    kinds: list[tuple[Kind, float, int]] = [("images", 0.0, 3), ("captions", 0.5, 5), ("images", 1.0, 7)]
    asked = [Search(query, want, alpha, k) for query in queries for want, alpha, k in kinds]
    together = explorer.search(asked)
    for search, answers in zip(asked, together, strict=True):
        (alone,) = explorer.search([search])
        if isinstance(alone, UnknownError):
            assert isinstance(answers, UnknownError) and search.query.upload
            continue
        assert isinstance(answers, list)
        for some, others in zip(answers, alone, strict=True):
            assert len(some) == search.k
            assert [item["image"] for item in some] == [item["image"] for item in others]
            assert [item["score"] for item in some] == pytest.approx(
                [item["score"] for item in others], abs=2e-5
            )


def test_a_search_that_fails_does_not_end_those_beside_it(explorer: Explorer) -> None:
    app = server.application(explorer, [])

    async def ask() -> list[httpx2.Response]:
        bodies: list[dict[str, Any]] = [
            {"text": "a red square"},
            {"upload": "nothing"},
            {"image": 10**6},
            {"image": 0},
        ]
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=HERE) as client:
            return await asyncio.gather(*(client.post("/api/search", json=body) for body in bodies * 5))

    assert [answer.status_code for answer in asyncio.run(ask())] == [200, 404, 404, 200] * 5


def test_captions_are_found_for_an_image_and_images_for_an_image(client: Client, explorer: Explorer) -> None:
    found = post(client, "search", image=3, want="captions", k=4)["columns"]
    column = explorer.columns[0]
    top = (column.texts @ column.images[3]).topk(4).indices.tolist()
    assert [item["captions"][0] for item in found[0]] == [explorer.gallery.captions[i] for i in top]
    assert [item["image"] for item in found[0]] == [explorer.gallery.text_image[i] for i in top]
    near = post(client, "search", image=3, want="images", k=4)["columns"]
    assert [len(items) for items in near] == [4, 4]
    assert all(item["image"] != 3 for items in near for item in items)


def test_an_uploaded_image_answers_as_the_same_image_of_the_gallery(
    client: Client, explorer: Explorer
) -> None:
    source, index = explorer.gallery.source, explorer.gallery.index
    name = client.post("/api/upload", content=source.image(index[2])).json()["upload"]
    for alpha in (0.0, 0.5):
        uploaded = post(client, "search", upload=name, want="captions", alpha=alpha, k=6)["columns"]
        own = post(client, "search", image=2, want="captions", alpha=alpha, k=6)["columns"]
        for a, b in zip(uploaded, own, strict=True):
            assert [item["score"] for item in a] == pytest.approx([item["score"] for item in b], abs=1e-4)
    assert post(client, "search", upload=name, k=1)["columns"][0][0]["image"] == 2


def test_a_photo_is_turned_once_by_its_metadata() -> None:
    """The orientation is applied when it is decoded, and must not be applied again when it is encoded."""
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    decoded = decode(file.getvalue(), "photo")
    assert decoded.size == (20, 40) and "exif" not in decoded.info


def test_uploads_are_forgotten_in_their_order(
    explorer: Explorer, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threetowers.explore.explorer.KEPT_UPLOADS", 2)
    client = TestClient(server.application(explorer, []), base_url=HERE)
    names = [
        client.post("/api/upload", content=png(colour)).json()["upload"] for colour in ("red", "blue", "lime")
    ]
    assert client.post("/api/search", json={"upload": names[0]}).status_code == 404
    assert client.post("/api/search", json={"upload": names[2]}).status_code == 200


def test_zero_shot_equals_the_evaluators(client: Client, explorer: Explorer, runs: dict[str, Path]) -> None:
    names, template = ["red square", "blue square", "yellow {square}"], "a photo of a {}."
    found = post(client, "zero-shot", classes=names, template=template, query={"image": 1})["columns"]
    run = load_run(runs["baseline"])
    classes = class_embeddings(run.encode_text, names, [template])
    images = explorer.columns[0].images
    expected = (run.scale * images @ classes.T).softmax(1)
    assert found[0]["query"] == pytest.approx(expected[1].tolist(), abs=1e-3)
    counts = torch.bincount(expected.argmax(1), minlength=3).tolist()
    assert [each["count"] for each in found[0]["classes"]] == counts
    for number, each in enumerate(found[0]["classes"]):
        assert each["name"] == names[number]
        for item in each["items"]:
            assert item["score"] == pytest.approx(expected[item["image"], number].item(), abs=1e-3)
    moved = post(client, "zero-shot", classes=names, template=template, alpha=1.0, query={"image": 1})[
        "columns"
    ]
    assert moved[0] == found[0] and moved[1] != found[1], "α is of the combination alone"
    wrong = client.post("/api/zero-shot", json={"classes": names, "template": "no place"})
    assert wrong.status_code == 400 and "place for the class name" in wrong.json()["error"]


def test_the_matrix_holds_the_scores_of_the_search(client: Client) -> None:
    texts = ["a red square", "the top left is blue"]
    images = [{"image": 0}, {"image": 5}]
    found = post(client, "matrix", images=images, texts=texts, alpha=0.4)["columns"]
    for number, column in enumerate(found):
        for t, text in enumerate(texts):
            answers = post(client, "search", text=text, alpha=0.4, k=100)["columns"][number]
            scores = {item["image"]: item["score"] for item in answers}
            assert [row[t] for row in column] == pytest.approx([scores[0], scores[5]], abs=1e-3)


def test_the_map_shows_every_image_and_caption(client: Client, explorer: Explorer) -> None:
    gallery = explorer.gallery
    found = post(client, "map", column=1, system="third", kind="both")
    sides = [point[3] for point in found["points"]]
    assert sides.count(0) == len(gallery.index) and sides.count(1) == len(gallery.captions)
    points = torch.tensor([point[:2] for point in found["points"]])
    assert torch.allclose(points.mean(0), torch.zeros(2), atol=1e-4)
    assert len(post(client, "map", column=0, kind="images")["points"]) == len(gallery.index)
    refused = client.post("/api/map", json={"column": 0, "system": "third"})
    assert refused.status_code == 404 and "no third tower" in refused.json()["error"]
    caption = post(client, "item", caption=1)
    assert caption == {"image": gallery.text_image[1], "captions": [gallery.captions[1]], "trained": False}
    assert post(client, "item", image=0)["captions"] == gallery.captions_of(0)


def test_pictures_are_made_anew(client: Client, explorer: Explorer) -> None:
    answer = client.get("/image/4")
    assert answer.headers["content-type"] == "image/png"
    shown = Image.open(io.BytesIO(answer.content)).convert("RGB")
    assert shown.tobytes() == explorer.gallery.image(4).tobytes()


def test_the_page_is_told_what_there_is(client: Client, explorer: Explorer) -> None:
    about = client.get("/api/about").json()
    assert about["columns"][0]["label"] == "baseline"
    assert [bool(column["third"]) for column in about["columns"]] == [False, True]
    assert about["gallery"]["images"] == len(explorer.gallery.index)
    assert about["gallery"]["test"] and about["gallery"]["trained"] == 0
    assert about["gallery"]["templates"] == ["a photo of a {}.", "{}"], "the captions are long"
    for example in about["gallery"]["examples"]:
        assert example["text"] in explorer.gallery.captions_of(example["image"])


def test_images_that_a_run_was_trained_on_are_marked(
    runs: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """The parts say which, for the runs' own data; of other data, and of data that have changed, it is not known."""
    config = read_config(runs["baseline"] / "config.toml")
    train = {record.id for record in map(open_data(config)[0].record, range(len(open_data(config)[0])))}
    explored = open_runs([runs["baseline"], runs["lit"]], str(photos), "cpu")
    assert explored is not None and explored.gallery.num_trained == len(train) > 0
    everything = Search(Query(text="a square"), "captions", 0.0, len(explored.gallery.captions))
    (found,) = explored.search([everything])
    assert not isinstance(found, UnknownError)
    for item in found[0]:
        picture = explored.picture(item["image"])
        assert item["trained"] == picture["trained"] == (picture["id"] in train)
    some = replace(config, inputs=replace(config.inputs, train_images=5))
    run, few = ((each, open_data(each)[0].fingerprint) for each in (config, some))
    source = open_source(str(photos))
    assert trained_on(open_data(config)[2], None, [run]) == frozenset()
    assert len(trained_on(source, str(photos), [few]) or ()) == 5
    assert trained_on(source, str(photos), [few, run]) == explored.gallery.trained
    assert trained_on(source, str(photos), [run, (config, "of other data")]) is None
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a red square")
    assert trained_on(open_source(str(tmp_path)), str(tmp_path), [run]) is None
    assert trained_on(open_source(str(tmp_path)), None, [run]) is None


@pytest.mark.parametrize(
    ("given", "captions", "first"),
    [
        (["a drawing of a {}."], ["A flower."], "a drawing of a {}."),
        ([], ["A flower.", "An iris.", "The Sun."], "A {}."),
        ([], ["a flower", "an iris", "a tennis ball", "Two boars"], "a {}"),
        ([], ["flower", "iris."], "{}"),
        ([], ["red flower.", "iris."], "{}."),
        ([], ["一朵花", "一只狗"], "{}"),
        ([], ["A dog runs over the beach at night."], "a photo of a {}."),
        ([], [], "a photo of a {}."),
    ],
)
def test_the_first_prompt_has_the_form_of_the_captions(
    given: list[str], captions: list[str], first: str
) -> None:
    found = templates(given, captions)
    assert found[0] == first and {"a photo of a {}.", "{}"} <= set(found) and len(set(found)) == len(found)


def test_colours_are_those_of_the_methods_and_differ(client: Client) -> None:
    assert [column["colour"] for column in client.get("/api/about").json()["columns"]] == [0, 3]
    assert [run["colour"] for run in client.get("/api/curves").json()] == [0, 1, 3, 7], "two runs are 3T"
    names = list(METHODS)
    assert colours(names) == list(range(len(names)))
    found = colours(["lit", *names, "lit"])
    assert len(set(found)) == len(found) and [n % len(names) for n in found if n >= len(names)] == [1, 1]


def test_a_tower_has_the_name_of_its_comparison(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["3t"], tmp_path / "runs" / "mine")
    row = {"method": "3t", "third": "small", "seed": 0, "path": "runs/mine"}
    place = tmp_path / "compare.json"
    place.write_text(json.dumps({"runs": [row]}))
    assert open_model(tmp_path / "runs" / "mine").label == "3T (small)"
    for text in ("[]", "{", json.dumps({"runs": [row | {"path": "runs/other"}]})):
        place.write_text(text)
        assert open_model(tmp_path / "runs" / "mine").label == open_model(runs["3t"]).label != "3T (small)"


def test_curves_of_a_run_that_goes_on(client: Client) -> None:
    found = {run["name"]: run for run in client.get("/api/curves").json()}
    assert found["baseline"]["finished"] and not found["begun"]["finished"]
    assert [step for step, _ in found["begun"]["metrics"]["train/loss"]] == [2, 4, 6]
    assert found["begun"]["metrics"]["val/mean_r@1"][-1] == [7, 0.5]
    assert found["begun"]["steps"] == 6
    columns = {column["run"]: column for column in client.get("/api/about").json()["columns"]}
    for name in ("baseline", "3t"):
        assert (found[name]["label"], found[name]["colour"]) == (
            columns[name]["label"],
            columns[name]["colour"],
        )
    assert found["begun"]["label"] == columns["3t"]["label"] != "3T", (
        "it is a run of 3T too, with a third tower"
    )


@pytest.mark.parametrize("num", [1, POINTS - 1, POINTS, POINTS + 1, 10 * POINTS])
def test_long_curves_are_thinned_and_end_where_they_end(num: int) -> None:
    points = [[float(step), 0.0] for step in range(num)]
    kept = thinned(points)
    assert len(kept) <= POINTS and kept[0] == points[0] and kept[-1] == points[-1]


def test_runs_are_compared_on_other_data(runs: dict[str, Path], tmp_path: Path) -> None:
    """Among it an image that cannot be read, one without a caption, and two equal images."""
    (tmp_path / "data").mkdir()
    for name, data in (("a", png("red")), ("b", png("lime")), ("c", b"no image"), ("d", png("red"))):
        (tmp_path / "data" / f"{name}.png").write_bytes(data)
        if name != "b":
            (tmp_path / "data" / f"{name}.txt").write_text(f"{SCRIPT} {name}")
    explored = open_runs([runs["lit"], runs["3t"]], str(tmp_path / "data"), "cpu")
    assert explored is not None
    assert [column.third for column in explored.columns] == [None, "third"], (
        "LiT has no heads to read it through"
    )
    captions = explored.gallery.captions
    assert all(len(column.texts) == len(captions) for column in explored.columns)
    client = TestClient(server.application(explored, []), base_url=HERE)
    answer = client.post("/api/search", json={"text": SCRIPT, "k": 9})
    assert answer.headers["content-type"] == "application/json"
    assert SCRIPT in answer.text.replace('\\"', '"'), "it is data, which the page shows as text"


def test_a_run_that_has_only_begun_shows_its_curves(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    explored = open_runs([runs["begun"]], None, "cpu")
    assert explored is None
    assert (
        "not finished, so only its curves are shown; run its train command again" in capsys.readouterr().err
    )
    client = TestClient(server.application(explored, [runs["begun"]]), base_url=HERE)
    assert client.get("/api/about").json() == {"columns": [], "gallery": None}
    assert client.get("/api/curves").json()[0]["name"] == "begun"
    asked = client.post("/api/search", json={"text": "a"})
    assert asked.status_code == 404 and "none of the runs is finished" in asked.json()["error"]


# What is refused


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8423"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "evil@127.0.0.1"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ],
    ids=str,
)
def test_foreign_hosts_and_origins_are_refused(client: Client, headers: dict[str, str]) -> None:
    for path in ("/", "/api/about", "/image/0"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 403, path
        assert "baseline" not in answer.text
    assert client.post("/api/search", json={"text": "a"}, headers=headers).status_code == 403


def test_own_hosts_and_origins_are_answered(client: Client) -> None:
    for host in ("127.0.0.1:8423", "localhost:8423", "[::1]:8423"):
        headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        assert client.post("/api/search", json={"text": "a"}, headers=headers).status_code == 200
    assert (
        client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code
        == 200
    )


def test_a_form_of_another_page_is_not_json(client: Client) -> None:
    answer = client.post("/api/search", content='{"text": "a"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/image/../../etc/passwd", "/image/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/image/0.png", "/image/-1",
        "/image/99999999999999999999", "/image/٣", "/image/000.png%00", "/page/../server.py",
        "/page/%2e%2e%2fserver.py", "/page//etc/passwd", "/page/..%5cserver.py", "/etc/passwd", "//etc/passwd",
        "/page/server.py", "/image/http:%2f%2fevil.example%2fa.png", "/.git/config",
    ],
)  # fmt: skip
def test_paths_lead_nowhere(client: Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (400, 404), path
    assert "error" in answer.json() and "root:" not in answer.text and "import" not in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("search", {"text": ""}),
        ("search", {"text": "a" * 1001}),
        ("search", {"text": "a", "image": 1}),
        ("search", {"text": ["a"]}),
        ("search", {"image": 10**9}),
        ("search", {"image": True}),
        ("search", {"image": "http://evil.example/a.png"}),
        ("search", {"upload": "../../etc/passwd"}),
        ("search", {"text": "a", "k": 10**9}),
        ("search", {"text": "a", "want": "files"}),
        ("search", {"text": "a", "alpha": 2}),
        ("search", {"text": "a", "alpha": float("nan")}),
        ("search", [1]),
        ("zero-shot", {"classes": []}),
        ("zero-shot", {"classes": ["a"] * 201}),
        ("matrix", {"images": [{"image": 0}] * 25, "texts": ["a"]}),
        ("matrix", {"images": [{"image": 0}], "texts": "abc"}),
        ("map", {"column": 99}),
        ("map", {"column": 0, "system": "../third"}),
        ("item", {"caption": 10**9}),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_requests_that_cannot_be_meant_are_refused(client: Client, path: str, body: Any) -> None:
    content = json.dumps(body)
    answer = client.post(f"/api/{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404)
    assert len(answer.json()["error"]) < 200


@pytest.mark.parametrize("content", [b"{", b"[" * 50_000, b"\xff\xfe", b""])
def test_what_is_no_json_is_refused(client: Client, content: bytes) -> None:
    answer = client.post("/api/search", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_text_that_utf8_cannot_carry_is_searched_all_the_same(client: Client) -> None:
    assert (
        client.post(
            "/api/search", content=b'{"text": "\\ud800 red"}', headers={"content-type": "application/json"}
        ).status_code
        == 200
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of a few kB that says it has 10⁹ pixels, and has them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_000, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**7), 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bomb(), "too many pixels"),
        (b"<svg onload='alert(1)'/>", "unsupported format"),
        (b"%PDF-1.4", "unsupported format"),
        (b"", "empty file"),
        (png()[:40], "damaged image"),
        (b"http://169.254.169.254/latest/meta-data", "not an image"),
        (b"file:///etc/passwd", "not an image"),
    ],
)
def test_uploads_that_are_no_image_are_refused(client: Client, data: bytes, says: str) -> None:
    answer = client.post("/api/upload", content=data)
    assert answer.status_code == 422 and says in answer.json()["error"]


def test_huge_bodies_are_refused_before_they_are_read(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the length that they state, and where they state none, by what has arrived."""
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(400):
            sent += 1
            yield bytes(10**5)

    answer = client.post("/api/upload", content=b"1", headers={"content-length": str(10**12)})
    assert answer.status_code == 413
    assert client.post("/api/upload", headers={"content-length": "-5"}, content=b"").status_code == 413
    json_headers = {"content-type": "application/json"}
    assert client.post("/api/search", content=bytes(10**5), headers=json_headers).status_code == 413
    assert client.post("/api/upload", content=pieces()).status_code == 413


def asked(app: Any, requests: int, **request: Any) -> list[httpx2.Response]:
    """The answers to the same request, sent so many times at once."""

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, timeout=60) as client:
            return await asyncio.gather(*(client.request(**request) for _ in range(requests)))

    return asyncio.run(ask())


def test_two_hundred_requests_at_once_are_survived(explorer: Explorer) -> None:
    app = server.application(explorer, [])
    answers = asked(app, 200, method="POST", url="/api/search", json={"text": "a red square"})
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503} and codes.count(200) >= guard.WAITING
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 503)
    answers = asked(app, 200, method="POST", url="/api/upload", content=png())
    assert {answer.status_code for answer in answers} == {200, 503}
    (after,) = asked(app, 1, method="POST", url="/api/search", json={"text": "a red square"})
    assert after.status_code == 200


def test_a_request_that_never_arrives_is_dropped(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "READ_SECONDS", 0.05)

    async def slowly() -> Any:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    (answer,) = asked(server.application(explorer, []), 1, method="POST", url="/api/upload", content=slowly())
    assert answer.status_code == 408


def test_every_answer_has_the_headers_of_safety(client: Client) -> None:
    for path in ("/", "/page/main.js", "/api/about", "/image/0", "/nowhere"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'; style-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"


def test_beyond_loopback_a_token_is_needed(explorer: Explorer, runs: dict[str, Path]) -> None:
    token = "a-token-of-many-characters"
    app = server.application(explorer, list(runs.values()), host="0.0.0.0", token=token)
    client = TestClient(app, base_url="http://192.168.1.7:8423", follow_redirects=False)
    for path in (
        "/",
        "/page/main.js",
        "/api/about",
        "/image/0",
        "/?token=wrong",
        f"/api/about?token={token}",
    ):
        assert client.get(path).status_code == 401, path
    assert client.get("/api/about", headers={"cookie": "threetowers_token=wrong"}).status_code == 401
    assert client.get("/api/about", headers={"authorization": f"Bearer {token}"}).status_code == 200
    assert client.get(f"/?token={token}", headers={"host": "evil.example"}).status_code == 403
    welcome = client.get(f"/?token={token}")
    assert welcome.status_code == 303 and welcome.headers["location"] == "/"
    cookie = welcome.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert client.get("/api/about").status_code == 200, "the cookie is enough"


# What the user of the command does wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"host": "0.0.0.0"}, "give a secret as well, such as --token"),
        ({"host": "192.168.1.7"}, "give a secret as well"),
        ({"token": "short"}, "16 printable ASCII characters or more"),
        ({"port": 70_000}, "is no port"),
        ({"runs": ()}, "name a run folder"),
    ],
)
def test_arguments_that_cannot_be_meant(change: dict[str, Any], says: str) -> None:
    arguments = replace(ExploreArguments(runs=(Path("run"),)), **change)
    with pytest.raises(UsageError, match=says):
        check(arguments)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'threetowers\[explore\]'"):
        check(ExploreArguments(runs=(Path("run"),)))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run here"):
        run_folders((tmp_path,))
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(DataError, match="name its runs"):
        run_folders((tmp_path,))


def test_a_comparison_stands_for_its_runs_of_one_seed(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"seed": seed, "path": str(runs[name])} for seed, name in ((1, "lit"), (0, "baseline"), (0, "3t"))
    ]
    (tmp_path / "compare.json").write_text(json.dumps({"runs": rows}))
    assert run_folders((tmp_path, runs["3t"])) == [runs["baseline"], runs["3t"]]


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["explore", *words])
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def test_a_taken_port_is_one_line(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], taken_port: int
) -> None:
    code, said = told([str(runs["baseline"]), "--port", str(taken_port), "--device", "cpu"], capsys)
    assert code == 2 and "Give another --port; 0 takes a free one" in said and said.count("\n") == 1
    code, said = told([str(runs["baseline"] / "nowhere")], capsys)
    assert code == 3 and "there is no run here" in said and said.count("\n") == 1


@pytest.fixture
def taken_port() -> Iterator[int]:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_frozen_tower_that_has_changed_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    described = json.loads((runs["3t"] / "model.json").read_text())
    described["thirds"][0]["fingerprint"] = "another"
    folder = tmp_path / "run"
    folder.mkdir()
    for path in runs["3t"].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="is not the one that this run was trained with"):
        open_model(folder)


# The page's files


def test_the_page_has_the_colours_of_the_report() -> None:
    style = (Path(server.__file__).parent / "page" / "style.css").read_text(encoding="utf-8")
    for name in ("ink", "muted", "line", "paper", "soft"):
        light, dark = PALETTE[name]
        assert style.count(f"--{name}: {light};") == 1 and style.count(f"--{name}: {dark};") == 1, name
    for number, method in enumerate(METHODS):
        for shade in PALETTE[method]:
            assert f"--s{number}: {shade};" in style, method


def test_the_page_asks_nobody_else_and_writes_no_markup() -> None:
    for path in (Path(server.__file__).parent / "page").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "http:" not in text.replace("http://www.w3.org/", "") and "https:" not in text, path
        if path.suffix == ".js":
            for barred in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "new Function",
            ):
                assert barred not in text, f"{path}: {barred}"
        if path.suffix == ".html":
            assert " style=" not in text and " onclick=" not in text, "the policy forbids it"
