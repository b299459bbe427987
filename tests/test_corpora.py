"""The scripts of examples/real on a handful of pictures in the shape of the packages that they read."""

import hashlib
import json
import shutil
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from PIL import Image, ImageDraw

from threetowers.config import check
from threetowers.data.decode import decode
from threetowers.data.open import open_source, splits
from threetowers.objective.pairs import objective
from threetowers.reproduce.records import Record
from threetowers.towers.frozen.load import load_frozen

SCRIPTS = Path(__file__).parents[1] / "examples" / "real"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports a script by its name, in an empty working directory."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.chdir(tmp_path)
    own = {path.stem for path in SCRIPTS.glob("*.py")}

    def load(name: str) -> ModuleType:
        return __import__(name)

    yield load
    for name in own:
        sys.modules.pop(name, None)


def icon_set(prefix: str, names: list[str], **more: Any) -> dict[str, Any]:
    icons = {
        name: {"body": f'<circle fill="currentColor" cx="{4 + number % 8}" cy="8" r="3"/>'}
        for number, name in enumerate(names)
    }
    return {"prefix": prefix, "icons": icons, "width": 16, "height": 16, **more}


def write_icons(folder: Path, sets: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> Path:
    (folder / "package" / "json").mkdir(parents=True)
    about = {prefix: {"license": {"spdx": "MIT"}, **info} for prefix, (info, _) in sets.items()}
    (folder / "package" / "collections.json").write_text(json.dumps(about))
    for prefix, (_, content) in sets.items():
        (folder / "package" / "json" / f"{prefix}.json").write_text(json.dumps(content))
    return folder


def png(size: int = 64, colour: str = "red", alpha: bool = False) -> bytes:
    image = Image.new("RGBA" if alpha else "RGB", (size, size), (0, 0, 0, 0) if alpha else "white")
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, size // 2, size // 2), fill=colour)
    with BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def test_icons_are_split_by_concept_and_those_with_classes_are_a_set_of_their_own(
    scripts: Any, tmp_path: Path
) -> None:
    nouns = [
        f"{first} {second}"
        for first in ("cat", "dog", "sun", "car", "cup")
        for second in ("up", "down", "in")
    ]
    one = [noun.replace(" ", "-") for noun in nouns]
    two = [f"{noun.replace(' ', '_')}_outline_24" for noun in nouns]
    mdi = icon_set("mdi", ["cow", "pig", "bus"], categories={"Animal": ["cow", "pig"], "Transport": ["bus"]})
    hidden = icon_set("aa", one)
    hidden["icons"]["cat-up"]["hidden"] = True
    hidden["icons"]["7"] = {"body": "<path/>"}
    icons = scripts("icons")
    package = write_icons(tmp_path / "icons", {
        "aa": ({}, hidden), "bb": ({}, icon_set("bb", two)), "mdi": ({}, mdi),
        "nc": ({"license": {"spdx": "CC-BY-NC-4.0"}}, icon_set("nc", ["fish"])),
        "gpl": ({"license": {"spdx": "GPL-2.0-only"}}, icon_set("gpl", ["bird"])),
        "logos": ({"category": "Logos"}, icon_set("logos", ["acme"])),
    })  # fmt: skip
    every = list(icons.read_icons(package))
    assert {icon.key.partition(":")[0] for icon in every} == {"aa", "bb", "mdi"}
    assert len(every) == 2 * len(nouns) - 1 + 3, "a hidden icon and one without a word are left out"
    assert icons.concept_of("dog_down_outline_24") == icons.concept_of("down-dog") == "dog down"
    parts = icons.parts(every, 0, held_out=3)
    concepts = {name: {icon.concept for icon in part} for name, part in parts.items()}
    assert len(concepts["val"]) == len(concepts["test"]) == len(parts["val"]) == len(parts["test"]) == 3
    assert (
        not concepts["train"] & (concepts["val"] | concepts["test"])
        and not concepts["val"] & concepts["test"]
    )
    few = icons.parts(list(reversed(every)), 5, held_out=3)
    assert few["train"] == parts["train"][:5] and few["test"] == parts["test"], (
        "whatever the number and the order"
    )
    scripts("corpora").write_corpus(tmp_path / "out", parts)
    train, val, test = splits(str(tmp_path / "out"))
    assert [len(part) for part in (train, val, test)] == [
        len(parts[name]) for name in ("train", "val", "test")
    ]
    image = decode(train.image(0), "first")
    assert image.size == (64, 64) and image.getextrema()[0] == (0, 255), "black on white"
    assert {caption for i in range(len(train)) for caption in train.record(i).captions} == {
        icon.captions[0] for icon in parts["train"]
    }
    labelled = open_source(str(tmp_path / "out" / "classes" / "test"))
    assert list(labelled.class_names) == ["Animal", "Transport"] and len(labelled) == 3


def test_what_cannot_be_drawn_is_left_out_and_counted(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = scripts("drawings").Drawing
    blank = '<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>'
    drawings = [
        make("a", "a", ("fine",), png=png(200, alpha=True)), make("b", "b", ("blank",), svg=blank),
        make("c", "c", ("broken",), svg="<svg"), make("d", "d", ("no image",), png=b"none"),
    ]  # fmt: skip
    scripts("corpora").write_corpus(tmp_path / "out", {"train": drawings})
    said = capsys.readouterr().out
    assert "1 pictures; 3 could not be drawn or are blank" in said
    scripts("corpora").write_corpus(tmp_path / "out", {"train": drawings})
    assert "pictures" not in capsys.readouterr().out, "what is there is left as it is"


def test_emoji_are_split_by_concept_or_by_vendor(scripts: Any, tmp_path: Path) -> None:
    emoji = scripts("emoji")
    codes = [f"1F{number:03X}" for number in range(12)]
    names = [
        {"label": f"thing {code}", "hexcode": code, "tags": ["big", "round", "odd"]} for code in codes[:-1]
    ]
    vendors = {}
    for vendor in emoji.VENDORS:
        folder = vendors[vendor] = tmp_path / vendor
        (folder / "package" / "img" / vendor / "64").mkdir(parents=True)
        entries = []
        for number, code in enumerate(codes):
            kind = "country-flag" if number == 0 else f"animal-{'land' if number % 2 else 'sea'}"
            entries.append({"unified": f"{code}-FE0F", "image": f"{code}.png", "subcategory": kind})
            if (vendor, number) != ("apple", 3):
                (folder / "package" / "img" / vendor / "64" / f"{code}.png").write_bytes(png(alpha=True))
        (folder / "package" / "emoji.json").write_text(json.dumps(entries))
    pictures = list(emoji.read_emoji(vendors, names))
    assert len(pictures) == 4 * 10 - 1, (
        "without the flag, the one without a name and the one without a picture"
    )
    first = pictures[0][1]
    assert first.captions == (f"thing {codes[1]}", f"thing {codes[1]}, big, round", f"thing {codes[1]}, odd")
    parts = emoji.by_concept(pictures, held_out=2)
    held = {drawing.concept for name in ("val", "test") for drawing in parts[name]}
    assert len(held) == 4 and not held & {drawing.concept for drawing in parts["train"]}
    assert {drawing.concept for drawing in parts["classes/test"]} == held
    shown = {
        name: {drawing.key.partition(":")[0] for drawing in part}
        for name, part in emoji.by_vendor(pictures).items()
    }
    assert shown == {
        "train": {"google", "twitter"}, "val": {"facebook"}, "test": {"apple"}, "classes/test": {"apple"},
    }  # fmt: skip


def test_clip_art_has_titles_of_its_own_and_stamps_a_sentence(scripts: Any, tmp_path: Path) -> None:
    clipart = scripts("clipart")
    pictures, titles = tmp_path / "pictures", tmp_path / "titles"
    for number in range(9):
        title = "a series" if number < 6 else f"  lolli &amp; pop\n {number} "
        keywords = "".join(f"<rdf:li>{word}</rdf:li>" for word in ("food", "unsorted", "food"))
        svg = f"<svg><dc:title>{title}</dc:title>{keywords}</svg>"
        for root, kind, content in ((titles, "svg", svg.encode()), (pictures, "png", png())):
            path = root / "usr" / "share" / "openclipart" / kind / f"{number}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    found = list(clipart.read_clipart(pictures, titles))
    assert [drawing.captions for drawing in found] == [
        (f"lolli & pop {number}", f"lolli & pop {number}: food") for number in (6, 7, 8)
    ]
    root = tmp_path / "stamps" / "usr" / "share" / "tuxpaint" / "stamps" / "animals"
    root.mkdir(parents=True)
    for name, text in (
        ("cow", "A cow.\nde.utf8=Eine Kuh."),
        ("cow_mirror", "A cow."),
        ("bus", "\n"),
        ("none", None),
    ):
        (root / f"{name}.png").write_bytes(png())
        if text is not None:
            (root / f"{name}.txt").write_text(text)
    assert [drawing.captions for drawing in clipart.read_stamps(tmp_path / "stamps")] == [("A cow.",)]


def test_weights_of_the_original_code_become_a_timm_folder(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = scripts("pretrained")
    torch.manual_seed(3)
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    state = {f"_{number}": value for number, value in enumerate(theirs.state_dict().values())}
    (tmp_path / "package").mkdir()
    torch.save(state, tmp_path / "package" / "lite0.pth")
    monkeypatch.setattr(pretrained, "fetch", lambda package: tmp_path / "package")
    spec = pretrained.lite(0, tmp_path / "out" / "lite0", size=64)
    tower = load_frozen(spec)
    assert tower.image.size == 64 and tower.image.mean == (0.5, 0.5, 0.5) and tower.width == 1280
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(pixels / 127.5 - 1), pre_logits=True)
    torch.testing.assert_close(tower(pixels), expected, rtol=1e-4, atol=1e-5)
    other = load_frozen(pretrained.random_lite(0, tmp_path / "out" / "random", tmp_path / "out" / "lite0"))
    assert other.image == tower.image and other.fingerprint() != tower.fingerprint()


def test_a_package_of_another_digest_is_refused_and_one_that_is_there_is_used(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = scripts("packages")
    archive = tmp_path / "thing-1.0.whl"
    shutil.make_archive(str(archive.with_suffix("")), "zip", SCRIPTS, "icons.py")
    archive.with_suffix(".zip").rename(archive)
    fetched: list[str] = []

    def download(package: Any, folder: Path) -> list[Path]:
        fetched.append(package.name)
        return [Path(shutil.copy(archive, folder))]

    monkeypatch.setattr(packages, "_download", download)
    wrong = packages.Package("pypi", "thing", "1.0", "0" * 64, "MIT")
    with pytest.raises(SystemExit, match=r"thing 1\.0: the SHA-256 of its file is"):
        packages.fetch(wrong)
    right = packages.Package("pypi", "thing", "1.0", hashlib.sha256(archive.read_bytes()).hexdigest(), "MIT")
    folder = packages.fetch(right)
    assert (
        (folder / "icons.py").is_file() and packages.fetch(right) == folder and fetched == ["thing", "thing"]
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there is no such program"):
        packages._run(["no-such-client", "download"])
    with pytest.raises(SystemExit, match="failed"):
        packages._run([sys.executable, "-c", "import sys; sys.exit('a reason')"])


def test_the_study_has_units_that_can_be_built_and_controls_that_differ_in_what_they_say(
    scripts: Any,
) -> None:
    plan = scripts("plan")
    towers = {"imagenet": "timm:a", "random": "timm:b", "icons": "file:c", "sentences": "hf-text:d"}
    tuning, main = list(plan.tuning_units()), list(plan.main_units())
    names = [unit.name for unit, *_ in [*tuning, *main]]
    assert len(set(names)) == len(names) and len(main) == 6 * 3 * 8 + 8 + 3 * 6 and len(tuning) == 3 * 8 * 3
    for unit, label, changes in [(u, each, c) for u, _, each, c in tuning] + [
        (u, each, {}) for u, _, each in main
    ]:
        config = plan.config(unit, label, changes, "data/x", towers, "embeddings")
        table = objective(config)
        check(config)
        warm = "warm" in label or label.startswith("LiT unlocked")
        assert (table.image == "start") == warm and (config.start.image_size == 64) == warm
        assert config.steps == plan.CORPORA[unit.size].steps and config.steps % config.eval_every_steps == 0
        assert (unit.seed == plan.TUNING_SEED) == (unit.part == "tuning")
        for choice in changes:
            assert choice in ("optim.lr", "optim.rules")
    both = plan.config(
        plan.unit("main", "icons-20000", "3T main warm, ImageNet and sentences", 1),
        "3T main warm, ImageNet and sentences", {}, "data/x", towers, "embeddings",
    )  # fmt: skip
    assert both.third == ("imagenet=timm:a", "sentences=hf-text:d") and both.start.image == "timm:a"


def test_the_page_is_made_of_records_alone(scripts: Any, tmp_path: Path) -> None:
    plan, results = scripts("plan"), scripts("results")
    records = {}
    machine = {"cores": 2, "cpu": "a CPU", "torch": "2"}
    for number, (unit, corpus, label) in enumerate(plan.main_units()):
        if corpus in ("icons-20000", "clipart"):
            score = 0.1 + 0.1 * ("warm" in label) + 0.001 * (number % 5)
            curve = [[50, 60.0, score / 2], [100, 120.0, score]]
            described = {"seconds": 120.0, "curve": curve, "num_main": 1_000_000, "machine": machine}
            control = {"chosen": 0.3} if label == "LiT" else None
            metrics = (
                {results.SCORE: score, "zero_shot/top1": 0.5}
                if corpus != "clipart"
                else {results.SCORE: score}
            )
            settings = {
                "part": "main",
                "label": unit.label,
                "seed": unit.seed,
                "size": unit.size,
                "third": unit.third,
            }
            records[unit.name] = Record(settings, metrics, None, control, described=described)
    for unit, family, _, _ in plan.tuning_units():
        if family == "clipart":
            settings = {
                "part": "tuning",
                "label": unit.label,
                "seed": 0,
                "size": unit.size,
                "third": unit.third,
            }
            records[unit.name] = Record(settings, {"val/mean_r@1": 0.2}, described={"machine": machine})
    results.write_page(tmp_path / "real.md", records)
    text = (tmp_path / "real.md").read_text()
    assert "24 of 72 tuning and 66 of 170 runs" in text and "2 cores of a CPU" in text
    assert "## icons-20000" in text and "## clipart" in text and "## icons-2000\n" not in text
    assert "| LiT | " in text and "| 30.0 ± 0.0 |" in text and "3T main warm − LiT unlocked" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| 3T main warm −")}
    assert widths == {5} and "Validation R@1 after 2.0 minutes" in text
