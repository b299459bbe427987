"""Every format that a user may bring, written as its tool writes it; what is wrong in it is named."""

import json
import random
import shutil
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from kit.files import tar
from kit.pictures import encoded, noise
from kit.sources import captions
from threetowers.config import InputConfig
from threetowers.data.decode import decode
from threetowers.data.formats.annotations import open_annotations
from threetowers.data.formats.mix import read_mix
from threetowers.data.loader import BatchReader, batches
from threetowers.data.open import open_source, split, splits
from threetowers.data.order import Order
from threetowers.data.source import SOURCE_REASONS, Source, describe
from threetowers.data.tokenize import load_tokenizer
from threetowers.data.transforms import ImageSpec
from threetowers.errors import BadSample, DataError, UsageError


@cache
def picture(seed: int, format: str = "JPEG") -> bytes:
    return encoded(noise(7, 9, seed), format)


def put(folder: Path, *names: str) -> None:
    """Pictures under these names, each of its own seed."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(zlib.crc32(f"{folder.parent.name}/{name}".encode())))


def found(source: Source) -> set[tuple[str, str]]:
    assert {problem.reason for problem in source.problems} <= set(SOURCE_REASONS)
    return {(problem.id, problem.reason) for problem in source.problems}


# --- files of captions


def coco_file(folder: Path, *, name: str = "captions_train2017.json", **changes: list[object]) -> Path:
    """Four images with five captions, as in COCO's annotations/ beside train2017/."""
    put(folder / "train2017", *(f"{i:012d}.jpg" for i in range(4)))
    images = [{"license": 3, "file_name": f"{i:012d}.jpg", "height": 9, "id": 70 + i} for i in range(4)]
    texts = [(71, "one"), (70, "zero"), (73, "three"), (72, "two"), (70, " zero\nagain ")]
    annotations = [{"image_id": key, "id": n, "caption": text} for n, (key, text) in enumerate(texts)]
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    document |= {key: document[key] + more for key, more in changes.items()}  # type: ignore[operator]
    path = folder / "annotations" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def karpathy_file(folder: Path, num: int = 8, *, filepath: bool = True) -> Path:
    images = []
    for i in range(num):
        split = ("train", "restval", "val", "test")[i % 4]
        where = {"filepath": f"{'val' if i % 2 else 'train'}2014"} if filepath else {}
        sentences = [{"tokens": ["x"], "raw": f"text {i} {k}.", "imgid": i, "sentid": k} for k in range(5)]
        images.append({**where, "filename": f"{i}.jpg", "split": split, "sentences": sentences, "imgid": i})
        put(folder / "images", f"{where['filepath']}/{i}.jpg" if where else f"{i}.jpg")
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def token_file(folder: Path) -> Path:
    put(folder / "flickr30k-images", *(f"{i}.jpg" for i in range(6)))
    lines = [f"{i}.jpg#{k}\tMan {k} #{i} ,\tsmiling ." for i in range(6) for k in range(5)]
    (folder / "results_20130124.token").write_text("\n".join(lines) + "\n")
    return folder / "results_20130124.token"


def rows_of(count: int) -> dict[str, list[object]]:
    return {
        "image": [{"bytes": picture(i), "path": None} for i in range(count)],
        "caption": [[f"text {i}", f"other {i}"] for i in range(count)],
    }


CAPTIONED = Features({"image": datasets.Image(), "caption": List(Value("string"))})


def saved_dataset(folder: Path) -> Path:
    Dataset.from_dict(rows_of(6), features=CAPTIONED).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def class_dataset(folder: Path) -> Path:
    features = Features({"img": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": picture(i), "path": None} for i in (0, 1, 2, 1)]
    rows = Dataset.from_dict({"img": images, "label": [0, 1, 1, 0]}, features=features)
    rows.save_to_disk(folder / "classes")
    return folder / "classes"


@pytest.mark.parametrize(
    "folder", ["", "images", "../images", "../train2017", "val2014", "../images/train2017"]
)
def test_coco_images_are_found_where_they_usually_lie(folder: str, tmp_path: Path) -> None:
    path = coco_file(tmp_path)
    target = path.parent / folder
    for image in sorted((tmp_path / "train2017").iterdir()):
        target.mkdir(parents=True, exist_ok=True)
        shutil.move(image, target / image.name)
    source = open_source(str(path))
    assert captions(source) == {
        "000000000001.jpg": ("one",),
        "000000000000.jpg": ("zero", "zero again"),
        "000000000003.jpg": ("three",),
        "000000000002.jpg": ("two",),
    }
    assert source.image(0) == (target / "000000000001.jpg").read_bytes()
    shutil.rmtree(tmp_path / "train2017", ignore_errors=True)


def test_the_folder_of_the_files_own_name_wins(tmp_path: Path) -> None:
    path = coco_file(tmp_path, name="captions_val2017.json")
    for i in range(4):
        (tmp_path / "val2017").mkdir(exist_ok=True)
        (tmp_path / "val2017" / f"{i:012d}.jpg").write_bytes(picture(100 + i))
    assert open_source(str(path)).image(1) == picture(100)


def test_coco_problems_are_named(tmp_path: Path) -> None:
    path = coco_file(
        tmp_path,
        images=[{"id": 80, "file_name": "gone.jpg"}, {"id": 81, "file_name": "silent.jpg"}, {"id": 82}, 5,
                {"id": 73, "file_name": "000000000000.jpg"}],
        annotations=[{"image_id": 80, "caption": "x"}, {"image_id": 99, "caption": "x"}, "word",
                     {"image_id": 72, "caption": "nan"}, {"image_id": 72}, {"image_id": [1], "caption": "x"}],
    )  # fmt: skip
    source = open_source(str(path))
    assert len(source) == 4
    assert captions(source)["000000000003.jpg"] == ("three",)
    assert found(source) == {
        ("gone.jpg", "missing file"),
        ("silent.jpg", "no caption"),
        ("captions_train2017.json:image 7", "no path"),
        ("captions_train2017.json:image 8", "no path"),
        ("000000000000.jpg", "id given twice"),
        ("captions_train2017.json:7", "unknown image"),
        ("captions_train2017.json:8", "unknown image"),
        ("captions_train2017.json:11", "unknown image"),
        ("000000000002.jpg", "empty caption"),
    }
    assert Counter(problem.reason for problem in source.problems)["empty caption"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON, or a damaged one"),
        ("[" * 100_000, "no JSON, or a damaged one"),
        ('["a.jpg"]', "no row in it that can be read.*not an object"),
        ("3", "a single value"),
        ('{"model": 1, "x": 2}', "its keys are `model`, `x`"),
        ('{"images": [], "annotations": []}', "annotations hold no `caption`; give the captions file"),
        (
            '{"images": [], "annotations": [{"bbox": 1, "image_id": 2}]}',
            "no `caption`, but bbox, image_id; give the captions",
        ),
        ('{"images": [{"id": 1, "file_name": "q.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}',
         "none of its images was found, for example q.jpg"),
    ],
)  # fmt: skip
def test_other_json_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "x.json"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {}, optional={"id": JSON, "file_name": JSON, "image_id": JSON, "caption": JSON, "filename": JSON,
                  "filepath": JSON, "split": st.sampled_from(("train", "val", "test", 3)), "sentences": JSON},
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(ENTRY | JSON, max_size=4), st.lists(ENTRY | JSON, max_size=4))
def test_any_json_is_a_source_or_an_error(
    tmp_path: Path, images: list[object], entries: list[object]
) -> None:
    put(tmp_path, "a.jpg")
    good = {"id": 1, "file_name": "a.jpg"}
    document = {"images": [good, *images], "annotations": [{"image_id": 1, "caption": "x"}, *entries]}
    (tmp_path / "x.json").write_text(json.dumps(document))
    try:
        source = open_annotations(tmp_path / "x.json")
    except DataError:
        return
    assert all(source.record(i).captions for i in range(len(source)))
    found(source)


@pytest.mark.parametrize("filepath", [True, False])
def test_karpathy_splits_are_kept(filepath: bool, tmp_path: Path) -> None:
    path = karpathy_file(tmp_path, filepath=filepath)
    parts = splits(str(path), val_fraction=0.5, test_fraction=0.4)
    numbers = [sorted(int(Path(id).stem) for id in captions(part)) for part in parts]
    assert numbers == [[0, 1, 4, 5], [2, 6], [3, 7]]
    assert captions(parts[1])[f"{'train2014/' if filepath else ''}2.jpg"] == tuple(
        f"text 2 {k}." for k in range(5)
    )
    assert [part.name for part in parts] == ["dataset_coco/train", "dataset_coco/val", "dataset_coco/test"]
    assert len(open_source(str(path))) == 8


def test_karpathy_images_laid_into_one_folder(tmp_path: Path) -> None:
    path = karpathy_file(tmp_path)
    for image in sorted((tmp_path / "images").glob("*/*.jpg")):
        shutil.move(image, tmp_path / "images" / image.name)
    assert sorted(captions(open_source(str(path)))) == [f"{i}.jpg" for i in range(8)]


def test_karpathy_problems_belong_to_their_part(tmp_path: Path) -> None:
    path = karpathy_file(tmp_path)
    (tmp_path / "images" / "train2014" / "2.jpg").unlink()
    document = json.loads(path.read_text())
    document["images"][3]["sentences"] = [{"raw": " "}, {}, 4]
    document["images"] += [document["images"][0], {"split": "train"}]
    path.write_text(json.dumps(document))
    train, val, test = splits(str(path))
    assert found(train) == {("train2014/0.jpg", "id given twice"), ("dataset_coco.json:10", "no path")}
    assert found(val) == {("train2014/2.jpg", "missing file")}
    assert found(test) == {("val2014/3.jpg", "empty caption")}
    assert [len(train), len(val), len(test)] == [4, 1, 1]


def test_karpathy_without_a_test_part_gets_one(tmp_path: Path) -> None:
    path = karpathy_file(tmp_path, 40)
    document = json.loads(path.read_text())
    document["images"] = [image for image in document["images"] if image["split"] != "test"]
    path.write_text(json.dumps(document))
    train, val, test = splits(str(path), val_fraction=0.3, test_fraction=0.3)
    assert len(val) == 10
    assert len(train) + len(test) == 20
    assert len(test) > 0


@pytest.mark.parametrize("name", ["results_20130124.token", "Flickr8k.token.txt"])
def test_flickr_token_file(name: str, tmp_path: Path) -> None:
    path = token_file(tmp_path).rename(tmp_path / name)
    with path.open("ab") as file:
        file.write(b"gone.jpg.1#0\tx\n5.jpg#1\t \nno tab here\n4.jpg\tno mark\n3.jpg#0\tcaf\xe9\n")
    source = open_source(str(path))
    assert captions(source)["2.jpg"] == tuple(f"Man {k} #2 , smiling ." for k in range(5))
    assert captions(source)["3.jpg"][-1] == "caf\ufffd"
    assert len(source) == 6
    assert found(source) == {
        ("gone.jpg.1", "missing file"),
        ("5.jpg", "empty caption"),
        (f"{name}:33", "wrong number of fields"),
        (f"{name}:34", "wrong number of fields"),
        ("3.jpg", "caption is not UTF-8"),
    }
    with pytest.raises(UsageError, match="is no table"):
        open_source(str(path), image_column="x")
    (tmp_path / "empty.token").write_text("\n")
    with pytest.raises(DataError, match="no line is"):
        open_source(str(tmp_path / "empty.token"))


def test_flickr_results_csv(tmp_path: Path) -> None:
    """Kaggle's copy: bars, spaces, a row without its second bar, the images in a folder of their own."""
    put(tmp_path / "flickr30k_images", "1000092795.jpg", "2199200615.jpg")
    (tmp_path / "results.csv").write_text(
        'image_name| comment_number| comment\n1000092795.jpg| 0| Two "young" guys , smiling .\n'
        "1000092795.jpg| 1| Two men .\n2199200615.jpg| 3| A dog .\n2199200615.jpg| 4   A dog runs .\n"
    )
    source = open_source(str(tmp_path / "results.csv"))
    assert captions(source) == {
        "1000092795.jpg": ('Two "young" guys , smiling .', "Two men ."),
        "2199200615.jpg": ("A dog .",),
    }
    assert found(source) == {("results.csv:5", "wrong number of fields")}


def test_flickr8k_captions_txt(tmp_path: Path) -> None:
    put(tmp_path / "Images", "a_1.jpg")
    (tmp_path / "captions.txt").write_text('image,caption\na_1.jpg,"A child , outside ."\na_1.jpg,A girl .\n')
    assert captions(open_source(str(tmp_path / "captions.txt"))) == {
        "a_1.jpg": ("A child , outside .", "A girl .")
    }


# --- Hugging Face datasets


def test_saved_dataset(tmp_path: Path) -> None:
    source = open_source(f"hfds:{saved_dataset(tmp_path)}")
    assert [source.record(i).captions for i in range(6)] == [(f"text {i}", f"other {i}") for i in range(6)]
    assert [source.image(i) for i in range(6)] == [picture(i) for i in range(6)]
    assert captions(open_source(str(tmp_path / "saved"))) == captions(source)
    chosen = Dataset.load_from_disk(tmp_path / "saved").select([4, 1])
    chosen.save_to_disk(tmp_path / "chosen")
    some = open_source(f"hfds:{tmp_path / 'chosen'}")
    assert captions(some).items() <= captions(source).items()
    assert [some.image(0), some.image(1)] == [picture(4), picture(1)]


def test_equal_images_of_a_dataset_are_one_sample(tmp_path: Path) -> None:
    """Published sets have a row for each caption; a split by row would train on its test."""
    numbers = [i % 20 for i in range(60)]
    large = [bytes([i]) * 30_000 if i < 2 else picture(i) for i in range(20)]
    large[1] = large[0][:7_000] + b"\1" + large[0][7_001:]  # differs where only the whole tells
    rows = {
        "image": [{"bytes": large[i], "path": "x.jpg"} for i in numbers],
        "text": [f"t{n}" for n in range(60)],
    }
    features = Features({"image": datasets.Image(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    source = open_source(f"hfds:{tmp_path / 'd'}")
    assert [source.record(i).captions for i in range(20)] == [
        (f"t{i}", f"t{i + 20}", f"t{i + 40}") for i in range(20)
    ]
    assert [source.image(i) for i in range(20)] == large
    parts = splits(f"hfds:{tmp_path / 'd'}", val_fraction=0.3, test_fraction=0.3)
    assert sum(len(part) for part in parts) == 20


def test_images_are_not_decoded(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": b"<html>", "path": None}], "caption": ["x"]}
    Dataset.from_dict(
        rows, features=Features({"image": datasets.Image(), "caption": Value("string")})
    ).save_to_disk(tmp_path / "d")
    source = open_source(f"hfds:{tmp_path / 'd'}")
    assert source.image(0) == b"<html>"


def test_dataset_problems_are_named(tmp_path: Path) -> None:
    cells = [
        {"bytes": picture(0), "path": None},
        None,
        {"bytes": b"", "path": None},
        {"bytes": picture(1), "path": None},
    ]
    rows = Dataset.from_dict(
        {"image": cells, "caption": [["a"], ["b"], ["c"], ["nan", None]]}, features=CAPTIONED
    )
    rows.save_to_disk(tmp_path / "d")
    source = open_source(f"hfds:{tmp_path / 'd'}")
    assert len(source) == 1
    assert found(source) == {("d:1", "no image"), ("d:2", "empty file"), ("d:3", "empty caption")}


def test_class_labels_of_a_dataset(tmp_path: Path) -> None:
    source = open_source(f"hfds:{class_dataset(tmp_path)}")
    assert [source.record(i).label for i in range(4)] == [0, 1, 1, 0]
    assert list(source.class_names) == ["cat", "dog"]
    twins = [source.record(i) for i in (1, 3)]
    assert twins[0].id != twins[1].id
    assert twins[0].image_id == twins[1].image_id
    for seed in range(8):
        parts = split(source, val_fraction=0.4, test_fraction=0.0, seed=seed)
        ids = [{part.record(i).image_id for i in range(len(part))} for part in parts]
        assert not ids[0] & ids[1]
    features = Features({"img": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": picture(i), "path": None} for i in range(3)]
    Dataset.from_dict({"img": images, "label": [0, -1, None]}, features=features).save_to_disk(
        tmp_path / "bad"
    )
    assert found(open_source(f"hfds:{tmp_path / 'bad'}")) == {("bad:1", "bad label"), ("bad:2", "bad label")}


def test_dataset_columns(tmp_path: Path) -> None:
    features = Features(
        {
            "mask": datasets.Image(),
            "photo": datasets.Image(),
            "label": ClassLabel(names=["a"]),
            "words": Value("string"),
        }
    )
    cell = {"bytes": picture(0), "path": None}
    rows = Dataset.from_dict(
        {"mask": [cell], "photo": [cell], "label": [0], "words": ["x y"]}, features=features
    )
    rows.save_to_disk(tmp_path / "d")
    path = f"hfds:{tmp_path / 'd'}"
    with pytest.raises(UsageError, match="2 columns of type Image can be meant"):
        open_source(path)
    assert open_source(path, image_column="photo").record(0).label == 0
    source = open_source(path, image_column="photo", caption_columns=("words",))
    assert source.record(0).captions == ("x y",)
    with pytest.raises(UsageError, match=r"no column `wrods`; did you mean `words`\?"):
        open_source(path, caption_columns=("wrods",))
    with pytest.raises(UsageError, match="0 columns of type Image"):
        open_source(path, image_column="words")
    rows.remove_columns(["label", "mask"]).rename_columns({"words": "was"}).save_to_disk(tmp_path / "e")
    assert open_source(f"hfds:{tmp_path / 'e'}").record(0).captions == ("x y",)
    rows.select_columns(["photo"]).save_to_disk(tmp_path / "f")
    with pytest.raises(UsageError, match="no column holds captions"):
        open_source(f"hfds:{tmp_path / 'f'}")


def test_parts_of_a_dataset_are_kept(tmp_path: Path) -> None:
    rows = Dataset.from_dict(rows_of(60), features=CAPTIONED)
    parts = {
        "train": rows.select(range(50)),
        "validation": rows.select(range(50, 57)),
        "test": rows.select([57, 58]),
    }
    DatasetDict(parts).save_to_disk(tmp_path / "all")
    assert [len(part) for part in splits(f"hfds:{tmp_path / 'all'}")] == [50, 7, 2]
    assert len(open_source(f"hfds:{tmp_path / 'all' / 'validation'}")) == 7
    whole = open_source(f"hfds:{tmp_path / 'all'}")
    assert (len(whole), whole.record(50).id.partition("/")[0]) == (59, "validation")
    DatasetDict({"train": parts["train"], "test": parts["test"]}).save_to_disk(tmp_path / "two")
    train, val, test = splits(str(tmp_path / "two"), val_fraction=0.3)
    assert (len(train) + len(val), len(test)) == (50, 2)
    assert len(val) > 4
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "one")
    assert sum(len(part) for part in splits(f"hfds:{tmp_path / 'one'}")) == 60
    DatasetDict({"train": rows, "extra": rows}).save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match="its parts are train, extra; train, validation and test are known"):
        splits(f"hfds:{tmp_path / 'odd'}")


def test_the_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"hfds:nlphuji/flickr30k: there is no such folder, and nothing is fetched"
    ):
        open_source("hfds:nlphuji/flickr30k")
    with pytest.raises(UsageError, match="is no folder that `save_to_disk` wrote"):
        splits(f"hfds:{tmp_path}")
    path = saved_dataset(tmp_path)
    for file in ("data-00000-of-00002.arrow", "state.json", "dataset_info.json"):
        whole = (path / file).read_bytes()
        (path / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="Save it again"):
            open_source(str(path))
        (path / file).write_bytes(whole)


# --- mixes


def visits(source: Source) -> Counter[str]:
    return Counter(source.record(i).image_id for i in range(len(source)))


def tokens_set(folder: Path, count: int, caption: str = "text") -> None:
    put(folder / "images", *(f"{i}.jpg" for i in range(count)))
    (folder / "set.token").write_text("".join(f"{i}.jpg#0\t{caption} {i}\n" for i in range(count)))


def mixed(folder: Path, *tables: str) -> str:
    (folder / "mix.toml").write_text("".join(f"[[source]]\n{table}\n" for table in tables))
    return str(folder / "mix.toml")


def test_weights_repeat_what_is_trained_on(tmp_path: Path) -> None:
    tokens_set(tmp_path / "x", 400)
    tokens_set(tmp_path / "y", 300)
    path = mixed(tmp_path, 'path = "x/set.token"\nweight = 2.25', 'path = "y/set.token"\nweight = 0.5')
    parts = splits(path, val_fraction=0.1, test_fraction=0.1)
    train, val, test = (visits(part) for part in parts)
    assert not train.keys() & val.keys() | train.keys() & test.keys() | val.keys() & test.keys()
    plain = [
        {f"{prefix}/{id}" for id in captions(part)}
        for folder, prefix in (("x", "set"), ("y", "set-2"))
        for part in splits(str(tmp_path / folder / "set.token"), val_fraction=0.1, test_fraction=0.1)
    ]
    assert set(val) == plain[1] | plain[4]
    assert set(test) == plain[2] | plain[5]
    assert set(val.values()) == set(test.values()) == {1}
    assert {train[id] for id in plain[0]} == {2, 3}
    assert set(train) - plain[0] < plain[3]
    assert sum(train[id] for id in plain[0]) == pytest.approx(2.25 * len(plain[0]), rel=0.05)
    assert sum(train[id] for id in plain[3]) == pytest.approx(0.5 * len(plain[3]), rel=0.15)
    ids = list(captions(parts[0]))
    assert len(ids) == len(parts[0])
    assert "set/0.jpg~2" in ids
    assert {record.image_id for record in map(parts[0].record, range(2))} == {
        "set/0.jpg"
    } or "set/0.jpg" not in plain[0]
    assert len(open_source(path)) == 700
    assert "× 2.25" in describe(parts[0])


def test_repeated_samples_are_augmented_on_their_own_and_count_as_one_image(tmp_path: Path) -> None:
    tokens_set(tmp_path / "x", 4)
    tokens_set(tmp_path / "y", 4)
    path = mixed(tmp_path, 'path = "x/set.token"\nweight = 2', 'path = "y/set.token"')
    source = splits(path, val_fraction=0.0, test_fraction=0.0)[0]
    tokenizer = load_tokenizer("open_clip", 16)
    spec = ImageSpec(8, (0.5,) * 3, (0.5,) * 3, "bilinear")
    inputs = InputConfig(crop_scale=(0.3, 0.9), workers=0)
    batch = BatchReader(source, Order(0, 12, 12), tokenizer, inputs, image=spec)[range(12)]
    assert batch.pixels is not None
    twins = [i for i in range(12) if "~" in source.record(int(batch.index[i])).id]
    assert len(twins) == 4
    assert len(set(batch.image_ids.tolist())) == 8
    assert len({pixels.numpy().tobytes() for pixels in batch.pixels}) > 8


def test_no_image_is_in_training_and_in_another_parts_test(tmp_path: Path) -> None:
    (tmp_path / "k").mkdir()
    path = karpathy_file(tmp_path / "k", 80)
    names = sorted(
        p.relative_to(tmp_path / "k").as_posix() for p in (tmp_path / "k" / "images").rglob("*.jpg")
    )
    (tmp_path / "k" / "new.csv").write_text("image,caption\n" + "".join(f"{name},again\n" for name in names))
    mix = mixed(tmp_path, f'path = "k/{path.name}"', 'path = "k/new.csv"\nweight = 3')
    train, val, test = splits(mix, val_fraction=0.1, test_fraction=0.1)

    def files(source: Source) -> set[bytes]:
        return {source.image(i) + Path(source.record(i).image_id).name.encode() for i in range(len(source))}

    assert not files(train) & (files(val) | files(test))
    num_left_out = int(train.layout.split("; ")[-1].split(" left out")[0])
    in_csv = [i for i in range(len(train)) if train.record(i).id.startswith("new/")]
    in_csv_alone = splits(str(tmp_path / "k" / "new.csv"), val_fraction=0.1, test_fraction=0.1)[0]
    assert len(train) - len(in_csv) + len(in_csv) // 3 + num_left_out == 40 + len(in_csv_alone)
    assert num_left_out > 0


def test_a_mix_keeps_given_parts_and_problems(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / "photos" / part).mkdir(parents=True)
        put(tmp_path / "photos" / part, f"{part}.jpg")
        (tmp_path / "photos" / part / f"{part}.txt").write_text("x")
    put(tmp_path / "photos" / "train", "alone.jpg")
    tokens_set(tmp_path / "x", 5)
    train, val, test = splits(
        mixed(tmp_path, 'path = "photos"', 'path = "x/set.token"'), val_fraction=0.0, test_fraction=0.0
    )
    assert list(captions(train)) == ["photos/train.jpg", *(f"set/{i}.jpg" for i in range(5))]
    assert [list(captions(part)) for part in (val, test)] == [["photos/val.jpg"], ["photos/test.jpg"]]
    assert found(train) == {("photos/alone.jpg", "no caption")}
    (tmp_path / "x" / "images" / "2.jpg").unlink()
    with pytest.raises(BadSample, match=r"set/2.jpg: missing file"):
        train.image(3)


def test_labels_in_a_mix(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    class_dataset(tmp_path / "x")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    source = open_source(mixed(tmp_path, 'path = "hfds:x/classes"', 'path = "hfds:y/classes"'))
    assert [source.record(i).label for i in range(8)] == [0, 1, 1, 0] * 2
    tokens_set(tmp_path / "z", 2)
    with pytest.raises(DataError, match=r"hfds:.*classes has labels and no captions"):
        open_source(mixed(tmp_path, 'path = "hfds:x/classes"', 'path = "z/set.token"'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[sorce]]\npath = 'x'", r"sorce: no such key; did you mean `source`\?"),
        ("", "it names no source"),
        ("source = 3", "it names no source"),
        ("[[source]]\nweight = 2", "source 1: path: expected a path"),
        ("[[source]]\npath = 'x'\nwieght = 2", r"source 1: wieght: no such key; did you mean `weight`\?"),
        ("[[source]]\npath = 'x'\nweight = 0", "weight: 0 is no number above 0"),
        ("[[source]]\npath = 'x'\nweight = nan", "weight: nan is no number above 0"),
        ("[[source]]\npath = 'x'\nweight = 1e9", "at most 1000"),
        ("[[source]]\npath = 'x'\nweight = true", "weight: True is no number"),
        ("[[source]]\npath = 'x'\nimage_column = 3", "image_column: expected a name"),
        ("[[source]]\npath = 'x'\ncaption_columns = [3]", "caption_columns: expected a list of names"),
        (
            "[[source]]\npath = 'x'\n[[source]]\npath = './x'",
            "named twice; name it once and raise its weight",
        ),
        ("[[source]]\npath = 'mix.toml'", "is a mix itself"),
        ("[[source", "not a TOML file"),
    ],
)
def test_a_mix_that_cannot_be_meant(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_source(str(tmp_path / "mix.toml"))


def test_paths_in_a_mix(tmp_path: Path) -> None:
    tables = ["a/{0..3}.tar::b", "s3://bucket/0.tar", "hfds:c", "/d/e.csv"]
    paths = [entry.path for entry in read_mix(mixed(tmp_path, *(f'path = "{table}"' for table in tables)))]
    assert paths == [
        f"{tmp_path}/a/{{0..3}}.tar::{tmp_path}/b",
        "s3://bucket/0.tar",
        f"hfds:{tmp_path}/c",
        "/d/e.csv",
    ]
    with pytest.raises(UsageError, match="is no table"):
        splits(mixed(tmp_path, 'path = "x"'), image_column="y")


# --- tar shards as their tools write them


def test_img2dataset_folder(tmp_path: Path) -> None:
    """Shards, parquet and stats side by side; failures stand in the parquet alone."""
    for shard, count in ((0, 5), (3, 2)):  # unequal, and with a gap in the numbering
        members, rows = dict[str, bytes](), list[dict[str, object]]()
        for i in range(count + 1):
            key, caption = f"{shard:05d}{i:04d}", None if i == 1 else f"text {shard} {i}"
            status = "failed_to_download" if i == count else "success"
            row: dict[str, object] = {
                "caption": caption,
                "url": "http://x",
                "key": key,
                "status": status,
                "width": 7,
                "exif": "{}",
            }
            rows.append(row)
            if status == "success":
                members |= {f"{key}.jpg": picture(i), f"{key}.txt": (caption or "").encode()}
                members[f"{key}.json"] = json.dumps(row, indent=4).encode()
        shuffled = list(members)
        random.Random(0).shuffle(shuffled)
        tar(tmp_path / f"{shard:05d}.tar", [(name, members[name]) for name in shuffled])
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{shard:05d}.parquet")
        stats = {
            "count": count + 1,
            "successes": count,
            "failed_to_download": 1,
            "status_dict": {"success": count},
        }
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    source = open_source(str(tmp_path))
    keys = [f"00000/00000000{i}" for i in (0, 2, 3, 4)] + ["00003/000030000"]
    assert captions(source).keys() == set(keys)
    assert captions(source)["00003/000030000"] == ("text 3 0",)
    assert {problem.id for problem in source.problems} == {"00000/000000001", "00003/000030001"}
    assert {problem.reason for problem in source.problems} <= {"empty caption", "no caption"}


def test_clip_benchmark_folder(tmp_path: Path) -> None:
    names, templates = "tench\ngoldfish\n", "a photo of a {c}.\nart of the {c}\n"
    (tmp_path / "classnames.txt").write_text(names)
    (tmp_path / "zeroshot_classification_templates.txt").write_text(templates)
    for shard in range(2):
        rows = {f"s{shard}{i:06d}": i % 2 for i in range(3)}
        tar(
            tmp_path / "test" / f"{shard}.tar",
            [(f"{key}.{end}", data) for key, label in rows.items()
             for end, data in (("cls", str(label).encode()), ("webp", picture(label, "WEBP")))],
        )  # fmt: skip
    (tmp_path / "test" / "nshards.txt").write_text("2")
    source = open_source(str(tmp_path / "test"))
    assert [source.record(i).label for i in range(6)] == [0, 1, 0] * 2
    assert (list(source.class_names), list(source.templates)) == (
        ["tench", "goldfish"], ["a photo of a {}.", "art of the {}"],
    )  # fmt: skip
    assert decode(source.image(1), "x").size == (7, 9)
    tar(
        tmp_path / "retrieval" / "0.tar", [("s0.jpg", picture(0)), ("s0.txt", b"one\ntwo\nthree\nfour\nfive")]
    )
    assert captions(open_source(str(tmp_path / "retrieval"))) == {
        "0/s0": ("one", "two", "three", "four", "five")
    }


def test_fewer_shards_than_workers(tmp_path: Path) -> None:
    """Two shards of 1 and 9 samples for three workers: every sample comes once, in the order of no workers."""
    for shard, count in (("00000", 1), ("00007", 9)):
        keys = [f"{shard}{i}" for i in range(count)]
        tar(
            tmp_path / f"{shard}.tar",
            [(f"{k}.{e}", d) for k in keys for e, d in (("JPEG", picture(1)), ("txt", b"x"))],
        )
    source = open_source(str(tmp_path))

    def order(workers: int) -> list[list[int]]:
        inputs = InputConfig(workers=workers)
        spec = ImageSpec(8, (0.5,) * 3, (0.5,) * 3, "bilinear")
        reader = BatchReader(source, Order(0, 10, 2), load_tokenizer("open_clip", 8), inputs, image=spec)
        return [batch.index.tolist() for batch in batches(reader, 0, 5)]

    assert order(3) == order(0)
    assert sorted(index for batch in order(0) for index in batch) == list(range(10))
