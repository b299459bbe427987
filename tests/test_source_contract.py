"""What every format of sources promises. A new format is a line in `FORMATS` and an example here."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from threetowers.data.copies import middle_key
from threetowers.data.decode import decode
from threetowers.data.formats.annotations import ANNOTATIONS
from threetowers.data.formats.folders import FOLDERS
from threetowers.data.formats.hf_datasets import HF_DATASETS
from threetowers.data.formats.mix import MIXES
from threetowers.data.formats.split_folders import SPLIT_FOLDERS
from threetowers.data.formats.tables import TABLES
from threetowers.data.open import FORMATS, _Opener, open_source, split, splits
from threetowers.data.shards.source import SHARDS
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.data.source import ANY_COLUMNS, SOURCE_REASONS, Format, Source, describe
from threetowers.errors import UsageError

NUM = 6
"""Usable samples that each example holds, in all its parts."""


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


# Each example writes a source below the folder and returns its path; `defect` adds one sample that cannot be used.


def captioned_shards(folder: Path, defect: bool) -> str:
    samples = [ShardSample(f"{i:03d}", png(i), "png", (f"thing {i}", "other")) for i in range(NUM)]
    samples += [ShardSample("bad", png(9), "png", ())] if defect else []
    write_shards(folder / "set", samples, shard_size=4)
    return str(folder / "set")


def labelled_shards(folder: Path, defect: bool) -> str:
    samples = [ShardSample(f"{i:03d}", png(i), "png", (), i % 2) for i in range(NUM)]
    samples += [ShardSample("bad", png(9), "png", (), 5)] if defect else []
    write_shards(folder / "set", samples, shard_size=4)
    (folder / "set" / "classnames.txt").write_text("ant\nbee\n")
    return f"{folder}/set/{{00000..{(NUM + defect - 1) // 4:05d}}}.tar"


def csv_file(folder: Path, defect: bool) -> str:
    images(folder, *(f"{i} a.png" for i in range(NUM)))
    rows = ["image,caption", *(f"{i} a.png,thing {i}" for i in range(NUM)), *(["gone.png,x"] * defect)]
    (folder / "table.csv").write_text("\n".join(rows))
    return str(folder / "table.csv")


def metadata_folder(folder: Path, defect: bool) -> str:
    path = csv_file(folder, defect)
    Path(path).rename(folder / "metadata.csv")
    return str(folder)


def text_folder(folder: Path, defect: bool) -> str:
    images(folder / "photos", *(f"{i}.png" for i in range(NUM + defect)))
    for i in range(NUM):
        (folder / "photos" / f"{i}.txt").write_text(f"thing {i}\nother\n")
    return str(folder / "photos")


def class_folders(folder: Path, defect: bool) -> str:
    images(folder / "photos", *(f"{('ant', 'bee')[i % 2]}/{i}.png" for i in range(NUM)), *["x.png"] * defect)
    return str(folder / "photos")


def split_folders(folder: Path, defect: bool) -> str:
    for part, numbers in (("train", range(4)), ("valid", range(4, 5)), ("test", range(5, NUM))):
        images(folder / part, *(f"{i}.png" for i in numbers), *["x.png"] * (defect and part == "train"))
        for i in numbers:
            (folder / part / f"{i}.txt").write_text(f"thing {i}")
    return str(folder)


def coco(folder: Path, defect: bool) -> str:
    images(folder / "train2017", *(f"{i}.jpg" for i in range(NUM)))
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(NUM)],
        "annotations": [{"image_id": i, "caption": f"thing {i}"} for i in range(NUM)]
        + [{"image_id": 99, "caption": "x"}] * defect,
    }
    (folder / "captions_train2017.json").write_text(json.dumps(document))
    return str(folder / "captions_train2017.json")


def karpathy(folder: Path, defect: bool) -> str:
    images(folder / "images", *(f"{i}.jpg" for i in range(NUM)))
    entries = [
        {
            "filename": f"{i}.jpg",
            "split": ("train", "restval", "val", "test")[i % 4],
            "sentences": [{"raw": "x"}],
        }
        for i in range(NUM)
    ]
    entries += [{"filename": "gone.jpg", "split": "train", "sentences": [{"raw": "x"}]}] * defect
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))
    return str(folder / "dataset.json")


def flickr(folder: Path, defect: bool) -> str:
    images(folder / "images", *(f"{i}.jpg" for i in range(NUM)))
    lines = [f"{i}.jpg#{k}\tthing {i} {k}" for i in range(NUM) for k in range(2)] + ["gone.jpg#0\tx"] * defect
    (folder / "set.token").write_text("\n".join(lines))
    return str(folder / "set.token")


def saved_rows(defect: bool) -> Dataset:
    cells = [{"bytes": png(i), "path": None} for i in range(NUM)] + [None] * defect
    rows = {"image": cells, "caption": [f"thing {i}" for i in range(len(cells))]}
    return Dataset.from_dict(rows, features=Features({"image": datasets.Image(), "caption": Value("string")}))


def saved_dataset(folder: Path, defect: bool) -> str:
    saved_rows(defect).save_to_disk(folder / "saved")
    return str(folder / "saved")


def saved_parts(folder: Path, defect: bool) -> str:
    rows = saved_rows(defect)
    parts = {"train": rows.select([*range(4), *range(NUM, NUM + defect)]), "test": rows.select(range(4, NUM))}
    DatasetDict(parts).save_to_disk(folder / "saved")
    return f"hfds:{folder / 'saved'}"


def saved_classes(folder: Path, defect: bool) -> str:
    cells = [{"bytes": png(i), "path": None} for i in range(NUM + defect)]
    features = Features({"img": datasets.Image(), "label": ClassLabel(names=["ant", "bee"])})
    rows = {"img": cells, "label": [i % 2 for i in range(NUM)] + [None] * defect}
    Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    return f"hfds:{folder / 'saved'}"


def mix(folder: Path, defect: bool) -> str:
    csv_file(folder / "a", defect)
    flickr(folder / "b", False)
    for i in range(NUM):
        (folder / "b" / "images" / f"{i}.jpg").write_bytes(png(20 + i))
    (folder / "mix.toml").write_text(
        '[[source]]\npath = "a/table.csv"\nimage_column = "image"\ncaption_columns = "caption"\n'
        '[[source]]\npath = "b/set.token"\nimage_column = "none"\n'
    )
    return str(folder / "mix.toml")


Example = Callable[[Path, bool], str]
EXAMPLES: dict[Format, tuple[Example, ...]] = {
    SHARDS: (captioned_shards, labelled_shards),
    HF_DATASETS: (saved_dataset, saved_parts, saved_classes),
    MIXES: (mix,),
    ANNOTATIONS: (coco, karpathy, flickr),
    SPLIT_FOLDERS: (split_folders,),
    TABLES: (csv_file, metadata_folder),
    FOLDERS: (text_folder, class_folders),
}
CASES = [(format, example) for format, examples in EXAMPLES.items() for example in examples]
every_example = pytest.mark.parametrize(("format", "example"), CASES, ids=[e.__name__ for _, e in CASES])


def opened(path: str, example: Example) -> list[Source]:
    """The whole source, and its parts."""
    parts = list(splits(path, val_fraction=0.2, test_fraction=0.2))
    whole = open_source(path)
    return [whole, *split(whole, val_fraction=0.3, test_fraction=0.0, seed=1), *parts]


def test_every_format_has_an_example() -> None:
    assert set(EXAMPLES) == set(FORMATS)


@every_example
def test_a_path_means_the_format_that_it_was_made_for(
    format: Format, example: Example, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    path = example(tmp_path / "data", False)
    assert next(each for each in FORMATS if each.accepts(path)) is format
    others = [each for each in FORMATS if each.accepts(path) and each is not format]
    assert set(others) <= {TABLES, FOLDERS}, "the last two of the list accept any file and any folder"
    assert not format.accepts(str(tmp_path / "nothing"))


@every_example
def test_a_source_keeps_its_contract(format: Format, example: Example, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = example(tmp_path / "data", False)
    sources = opened(path, example)
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    moved = opened(path.replace(f"{tmp_path}/data", f"{tmp_path}/moved"), example)
    for source, elsewhere in zip(sources, moved, strict=True):
        copy = pickle.loads(pickle.dumps(source))
        records = [source.record(i) for i in range(len(source))]
        assert not source.problems
        assert len({record.id for record in records}) == len(source)
        for i, record in enumerate(records):
            assert record.captions or record.label is not None
            assert record.label is None or 0 <= record.label < len(source.class_names)
            assert decode(source.image(i), record.id).size == (7, 9)
            assert (copy.record(i), copy.image(i)) == (record, source.image(i))
            assert elsewhere.record(i) == record
        sizes = [len(source.image(i)) for i in range(len(source))]
        assert copy.image_sizes().tolist() == source.image_sizes().tolist() == sizes
        backwards = np.arange(len(source))[::-1]
        middles = [middle_key(source.image(i)) for i in backwards]
        assert copy.image_middles(backwards).tolist() == source.image_middles(backwards).tolist() == middles
        assert source.fingerprint == copy.fingerprint == elsewhere.fingerprint
        assert source.name
        assert not records or records[0].id in describe(source)
        with pytest.raises(IndexError):
            source.record(len(source))
    prints = {source.fingerprint for source in sources if len(source)}
    assert len(prints) > 1, "parts differ from the whole"


@every_example
def test_the_fingerprint_tells_images_of_equal_names_and_sizes_apart(
    format: Format, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of uncompressed files are: otherwise features of one set would be taken for those of another."""

    def flat(seed: int, world: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng([seed, world]).integers(0, 255, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    prints: list[set[str]] = []
    for world in (0, 1, 0):
        monkeypatch.setitem(globals(), "png", partial(flat, world=world))
        folder = tmp_path / str(len(prints)) / "data"
        folder.mkdir(parents=True)
        sources = opened(example(folder, False), example)
        prints.append({source.fingerprint for source in sources})
    assert prints[0] == prints[2]
    assert not prints[0] & prints[1]


@every_example
def test_equal_images_are_one_image(
    format: Format, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under several ids, in any format: they have one image id, stay in one part, and are said."""
    real = png
    monkeypatch.setitem(globals(), "png", lambda seed: real(seed % 2))
    path = example(tmp_path, False)
    for source in opened(path, example):
        ids: dict[bytes, set[str]] = {}
        for i in range(len(source)):
            record = source.record(i)
            ids.setdefault(source.image(i), set()).add(record.image_id or record.id)
        assert all(len(group) == 1 for group in ids.values())
        if len(source) > len(ids):
            assert "the image of another" in describe(source)
    if not format.parts(path, ANY_COLUMNS, _Opener()) or format is MIXES:
        parts = [
            {part.image(i) for i in range(len(part))}
            for part in splits(path, val_fraction=0.3, test_fraction=0.3)
        ]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@every_example
def test_a_sample_that_cannot_be_used_is_counted(format: Format, example: Example, tmp_path: Path) -> None:
    for name, defect in (("good", False), ("bad", True)):
        (tmp_path / name).mkdir()
        path = example(tmp_path / name, defect)
        parts = splits(path, val_fraction=0.2, test_fraction=0.2)
        problems = [problem for part in parts for problem in part.problems]
        assert sum(map(len, parts)) == NUM * (2 if format is MIXES else 1)
        assert len(problems) == defect
        assert {problem.reason for problem in problems} <= set(SOURCE_REASONS)
        source = open_source(path)
        assert (len(source.problems), ("1 problem (" if defect else "0 problems") in describe(source)) == (
            defect,
            True,
        )


@every_example
def test_columns_are_taken_or_refused(format: Format, example: Example, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = example(tmp_path / "data", False)
    for open in (open_source, splits):
        message = (
            "is no table" if not format.takes_columns or format is SPLIT_FOLDERS else "no column `wrong`"
        )
        with pytest.raises(UsageError, match=message):
            open(path, caption_columns=("wrong",))  # type: ignore[operator]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.have[:24])
def test_the_readme_lists_every_format(format: Format) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"| {format.have} | {format.give} |" in readme
