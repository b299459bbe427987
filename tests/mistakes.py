"""User mistakes, each made on purpose in a copy of the folder of kit/mistakes.py, and the answers to them.

python tests/mistakes.py       # writes docs/generated/mistakes.md
"""

import contextlib
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from kit.awkward import as_compressed_shard, as_jxl, as_parquet, as_shard, rows_of
from kit.checkpoints import own_class, several_nests
from kit.further import POINTER, other_tower, replaced_by, without_pooling
from kit.machines import without_locks, without_processes
from kit.mistakes import (
    Answer,
    Change,
    Machine,
    add,
    as_pt,
    captions_of,
    coco_without_annotations,
    cut,
    flip,
    full_disk,
    make_kit,
    move,
    offline,
    remove,
    shard,
    small_files,
    swap,
    told,
    without,
    write,
)
from kit.weights import among_others, causal_reader, of_four_channels, of_larger_images, without_vocabulary

COLUMNS, ROWS = 120, 24  # one screen
PROGRESS = re.compile(r"^.*: [\d,]+/[\d,]+ \w+, .*\n", re.MULTILINE)
PAGE = Path(__file__).parent.parent / "docs" / "generated" / "mistakes.md"


@dataclass(frozen=True)
class Mistake:
    """What the user did, the words of the command, and what comes back.

    says: parts of the message without which it cannot be acted on. changes: done to the copy of the kit beforehand.
    """

    what: str
    command: str
    code: int
    says: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    around: Machine = contextlib.nullcontext
    """What is different about the machine."""


TRAIN = "train run.toml"
EXPORTED = (
    write("exported/README.md", "# Mine\n"),
    write("exported/open_clip_config.json", "{}"),
    write("exported/open_clip_model.safetensors", ""),
)

MISTAKES: dict[str, Sequence[Mistake]] = {
    "The command": (
        Mistake("a typo in the command", "trian run.toml", 2, ("trian", "`train`")),
        Mistake("a typo in a preset", "train tinny --data photos", 2, ("tinny", "`tiny`")),
        Mistake("no preset and no file", "train --data photos", 2, ("tiny", "run.toml")),
        Mistake("a file that is not there", "train runs.toml", 2, ("runs.toml", "no such file")),
        Mistake("a typo in a flag", f"{TRAIN} --batch-siz 8", 2, ("--batch-siz", "--batch-size")),
        Mistake("a word where a number belongs", f"{TRAIN} --steps many", 2, ("--steps", "many")),
        Mistake("a method that does not exist", f"{TRAIN} --method clip", 2, ("--method", "clip", "'lit'")),
        Mistake("a flag without its value", f"{TRAIN} --optim.lr", 2, ("--optim.lr", "1 value")),
        Mistake("a value out of range", f"{TRAIN} --steps 0", 2, ("steps: 0", "1 or more")),
        Mistake("a negative learning rate", f"{TRAIN} --optim.lr -0.001", 2, ("optim.lr", "-0.001", "above 0")),
        Mistake("the weights of two rows instead of three", f"{TRAIN} --objective.weights 0.5 0.5", 2,
                ("objective.weights", "three", "[0.5, 0.5]")),
        Mistake("a batch of one", f"{TRAIN} --batch-size 1", 2, ("batch_size: 1", "softmax", "2 or more")),
        Mistake("weights that leave a tower out", f"{TRAIN} --objective.weights 0 1 0", 2,
                ("objective.weights", "txt", "above 0")),
        Mistake("everything frozen", f"{TRAIN} --optim.freeze 'img.*' 'txt.*' 'heads.*' --out new", 2,
                ("optim.freeze", "nothing is left to train", "leave out")),
        Mistake("a CUDA device on a machine without", f"{TRAIN} --device cuda:99", 2, ("cuda:99", "--device")),
        Mistake("a device that does not exist", f"{TRAIN} --device gpu", 2, ("'gpu'", "auto, cpu, cuda")),
        Mistake("a decoder that is not installed", f"{TRAIN} --inputs.decoder simplejpeg --out new", 2,
                ("inputs.decoder", "pip install", "pillow"), around=without("simplejpeg")),
        Mistake("a file where the run folder should be", f"{TRAIN} --out photos/captions.csv", 3,
                ("photos/captions.csv", "--out")),
    ),
    "The TOML file": (
        Mistake("a typo in a key", TRAIN, 2, ("run.toml", "optim.warmup_step", "`warmup_steps`"),
                (add("run.toml", "[optim]\nwarmup_step = 10\n"),)),
        Mistake("text where a number belongs", TRAIN, 2, ("run.toml", "steps", "int", "'4'"),
                (swap("run.toml", "steps = 4", 'steps = "4"'),)),
        Mistake("a mistake in the syntax", TRAIN, 2, ("run.toml", "line 4"),
                (swap("run.toml", "steps = 4", "steps = "),)),
        Mistake("a value where a section belongs", TRAIN, 2, ("run.toml", "optim", "[optim]", "0.001"),
                (swap("run.toml", "steps = 4", "steps = 4\noptim = 0.001"),)),
        Mistake("a preset that does not exist", TRAIN, 2, ("run.toml", "preset", "tyni", "tiny"),
                (swap("run.toml", '"tiny"', '"tyni"'),)),
        Mistake("a typo in an open_clip model", TRAIN, 2, ("pair.model", "ViT-B-23", "`ViT-B-32`"),
                (add("run.toml", '[pair]\nmodel = "ViT-B-23"\n'),)),
        Mistake("a key that open_clip does not have", TRAIN, 2, ("pair.vision.imagesize", "`image_size`"),
                (add("run.toml", "[pair.vision]\nimagesize = 64\n"),)),
        Mistake("a tokenizer.json that is damaged", TRAIN, 2, ("tok/tokenizer.json",),
                (write("tok/tokenizer.json", '{"version": "1.0"'), add("run.toml", '[pair]\ntokenizer = "tok"\n'))),
        Mistake("a mix of a part that is not there", f"{TRAIN} --data mix.toml", 3,
                ("mix.toml", "source 2", "pohtos", "photos"),
                (write("mix.toml", '[[source]]\npath = "photos/captions.csv"\n[[source]]\npath = "pohtos"\n'),)),
        Mistake("a typo in a key of a mix", f"{TRAIN} --data mix.toml", 2, ("mix.toml", "source 1", "`weight`"),
                (write("mix.toml", '[[source]]\npath = "photos"\nweigth = 2\n'),)),
    ),
    "The data": (
        Mistake("no data named", "train tiny --third none --method baseline", 2, ("--data",)),
        Mistake("a path that is not there", f"{TRAIN} --data pohtos", 3, ("pohtos", "photos")),
        Mistake("an empty folder", f"{TRAIN} --data empty", 3, ("empty", "no image"), (write("empty/.keep", ""),)),
        Mistake("a folder of images without captions", f"{TRAIN} --data photos", 3, ("photos", ".txt"),
                (remove("photos/*.csv"),)),
        Mistake("a wrong column name", f"{TRAIN} --inputs.caption-columns captions", 2,
                ("photos/captions.csv", "captions", "`caption`"), ),
        Mistake("a folder of images beside a file of all captions", f"{TRAIN} --data photos", 3,
                ("photos/dataset_photos.json", "no image has a .txt", "open one of them"),
                (remove("photos/*.csv"), write("photos/dataset_photos.json", "{}"))),
        Mistake("captions in objects without a usual key", TRAIN, 3,
                ("photos/captions.csv", "empty caption: 40", "captions.csv:2", '`caption` holds \'{"blip"'),
                (rows_of("image,caption", lambda n: f'{n:02d}.jpg,"{{""blip"": ""a photo""}}"'),)),
        Mistake("images in the cells of a table in base64", TRAIN, 3,
                ("photos/captions.csv", "no path: 40", "captions.csv:2", "8000 characters", "to files first"),
                (rows_of("image,caption", lambda n: f"{'/9j/' * 2000},a photo {n}"),)),
        Mistake("names of images without their endings", TRAIN, 3,
                ("photos/captions.csv", "missing file: 40", "captions.csv:2", "there is 00.jpg"),
                (rows_of("image,caption", lambda n: f"{n:02d},a photo {n}"),)),
        Mistake("a shard that is a pointer of Git LFS", f"{TRAIN} --data shards", 3,
                ("shards/0.tar", "git lfs pull"), (write("shards/0.tar", "version https://git-lfs.github.com/spec/v1"),)),
        Mistake("a table with only a header", TRAIN, 3, ("photos/captions.csv", "no row"),
                (write("photos/captions.csv", "image,caption\n"),)),
        Mistake("a table whose captions are all empty", TRAIN, 3,
                ("photos/captions.csv", "captions in `caption`", "empty caption: 40", "captions.csv:2"),
                (captions_of(""),)),
        Mistake("a table without a header", TRAIN, 3, ("photos/captions.csv", "first line"),
                (swap("photos/captions.csv", "image,caption\n", ""),)),
        Mistake("images missing on disk", TRAIN, 3, ("missing file", "photos/00.jpg", "captions.csv:2",
                "inputs.max_bad_share"), (remove("photos/0*.jpg"),)),
        Mistake("images cut off by a broken download", f"{TRAIN} --out new", 3,
                ("7 of 27", "00.jpg", "inputs.max_bad_share", "new/bad_samples.jsonl"), (cut("photos/0*.jpg"),)),
        Mistake("an image column that points elsewhere", TRAIN, 3, ("../../etc/passwd", "captions.csv:42"),
                (add("photos/captions.csv", "../../etc/passwd,a secret\n"),)),
        Mistake("quotes that do not pair up", TRAIN, 3, ("captions.csv:42", "quotes do not pair up"),
                (add("photos/captions.csv", '00.jpg,"a red photo\n'),)),
        Mistake("a batch larger than the data", f"{TRAIN} --batch-size 512 --out new", 2, ("512", "--batch-size")),
        Mistake("COCO JSON without annotations", f"{TRAIN} --data photos/captions.json", 3,
                ("photos/captions.json", "`images`", "annotations"), (coco_without_annotations,)),
        Mistake("a tar shard cut off by a broken download", f"{TRAIN} --data shards", 3, ("shards/00000.tar", "again"),
                (shard,)),
        Mistake("a range of shards that matches nothing", f"{TRAIN} --data 'shards/{{00000..00007}}.tar'", 3,
                ("expected 8 shards", "shards/00000.tar")),
        Mistake("a spreadsheet as data", f"{TRAIN} --data photos/captions.xlsx", 3, ("captions.xlsx", ".csv", "save"),
                (move("photos/captions.csv", "photos/captions.xlsx"),)),
        Mistake("parquet without pyarrow", f"{TRAIN} --data captions.parquet", 2,
                ("captions.parquet", "pip install pyarrow", "CSV"),
                (write("captions.parquet", "PAR1"),), without("pyarrow")),
        Mistake("shards at an address without fsspec", f"{TRAIN} --data s3://bucket/00000.tar", 2,
                ("s3://bucket", "pip install 'threetowers[remote]'"), around=without("fsspec")),
        Mistake("parts that leave nothing to train on", f"{TRAIN} --inputs.val-fraction 1.0 --out new", 2,
                ("inputs.val_fraction = 1", "less than 1")),
    ),
    "The data as people have it": (
        Mistake("shards that are compressed", f"{TRAIN} --data shards", 3,
                ("shards/00000.tar.gz", "1 shard is compressed", "gunzip"), (as_compressed_shard,)),
        Mistake("captions under a key of their own in the json of shards", f"{TRAIN} --data shards", 3,
                ("no caption: 40", "its json has url, blip", "--inputs.caption-columns"), (as_shard,)),
        Mistake("a key that no json of the shards has", f"{TRAIN} --data shards --inputs.caption-columns blib", 2,
                ("no column `blib`", "json"), (as_shard,)),
        Mistake("an image column of shards", f"{TRAIN} --data shards --inputs.image-column jpg", 2,
                ("shards have no columns", "image_column", "leave it out"), (as_shard,)),
        Mistake("a split column with a name that is no part", TRAIN, 3,
                ("photos/captions.csv: 40 rows", "`split`", "'fold1'", "--inputs.split-column none"),
                (rows_of("image,caption,split", lambda n: f"{n:02d}.jpg,photo {n},fold{n % 2 + 1}"),)),
        Mistake("a split column without a part to train on", TRAIN, 3,
                ("photos/captions.csv", "parts test", "--inputs.split-column none"),
                (rows_of("image,caption,split", lambda n: f"{n:02d}.jpg,photo {n},test"),)),
        Mistake("a typo in the name of the split column", f"{TRAIN} --inputs.split-column fodl", 2,
                ("photos/captions.csv", "`fodl`", "`fold`"),
                (rows_of("image,caption,fold", lambda n: f"{n:02d}.jpg,photo {n},test"),)),
        Mistake("two columns that can be the captions", TRAIN, 2,
                ("photos/captions.csv", "`left`", "`right`", "--inputs.caption-columns"),
                (rows_of("image,left,right", lambda n: f"{n:02d}.jpg,a photo {n},another one {n}"),)),
        Mistake("two columns that can be the images", TRAIN, 2,
                ("photos/captions.csv", "`front`", "`back`", "--inputs.image-column"),
                (rows_of("front,back,caption", lambda n: f"{n:02d}.jpg,{39 - n:02d}.jpg,a photo {n}"),)),
        Mistake("a table of addresses", TRAIN, 3,
                ("photos/captions.csv", "40 addresses", "https://example.org/0.jpg", "img2dataset"),
                (rows_of("url,caption", lambda n: f"https://example.org/{n}.jpg,a photo {n}"),)),
        Mistake("images in parquet without datasets", f"{TRAIN} --data photos.parquet", 2,
                ("photos.parquet", "pip install 'threetowers[datasets]'"), (as_parquet,), without("datasets")),
        Mistake("a folder of pictures of another format", f"{TRAIN} --data phone", 3,
                ("phone", "unsupported format: 40", "00.jxl", "convert it", "00.txt"), (as_jxl,)),
        Mistake("two folders that are one part", f"{TRAIN} --data set", 3, ("set: val and validation", "one folder"),
                (write("set/train/a", ""), write("set/val/a", ""), write("set/validation/a", ""))),
    ),
    "The third tower": (
        Mistake("no third tower for 3T", "train tiny --data photos/captions.csv", 2, ("'3t'", "--third", "baseline")),
        Mistake("`none` as third tower for 3T", f"{TRAIN} --third none", 2, ("'3t'", "--third", "baseline")),
        Mistake("a typo in a timm model", f"{TRAIN} --third timm:resnet5o --out new", 2, ("resnet5o", "`resnet50`")),
        Mistake("a typo in an open_clip tag", f"{TRAIN} --third open_clip:ViT-B-32@opnai --out new", 2,
                ("ViT-B-32@opnai", "`openai`")),
        Mistake("published weights without a network", f"{TRAIN} --third timm:resnet18 --out new", 3,
                ("timm:resnet18", "timm:NAME@FILE"), around=offline),
        Mistake("a transformers model without transformers", f"{TRAIN} --third hf-text:reader --out new", 2,
                ("hf-text:reader", "pip install 'threetowers[hf]'"), around=without("transformers")),
        Mistake("a wrong prefix", f"{TRAIN} --third tim:resnet50 --out new", 2, ("tim:resnet50", "timm:NAME")),
        Mistake("two towers without names", f"{TRAIN} --third timm:resnet18 timm:resnet50", 2,
                ("timm:resnet18", "NAME=SPEC")),
        Mistake("a tower's folder that is not there", f"{TRAIN} --third timm:local-dir:towr --out new", 3,
                ("towr", "no folder")),
        Mistake("a tower's file that is not there", f"{TRAIN} --third timm:resnet18@r18.safetensors --out new", 3,
                ("r18.safetensors", "no such file")),
        Mistake("weights in a .pt file", f"{TRAIN} --third timm:test_resnet@resnet.pt --out new", 3,
                ("resnet.pt", "safetensors"), (as_pt,)),
        Mistake("weights cut off by a broken download", f"{TRAIN} --out new", 3, ("tower/model.safetensors", "again"),
                (cut("tower/model.safetensors"),)),
        Mistake("an @ with nothing behind it", f"{TRAIN} --third timm:test_resnet@ --out new", 2,
                ("timm:test_resnet@", "no file behind the @", "timm:test_resnet@FILE")),
        Mistake("a Git LFS pointer in place of weights", f"{TRAIN} --out new", 3,
                ("tower/model.safetensors", "Git LFS pointer", "git lfs pull"), (replaced_by(POINTER),)),
        Mistake("a web page in place of weights", "convert page.pt --out x.safetensors", 3,
                ("page.pt", "is a web page", "fetch the file itself"), (write("page.pt", "<!DOCTYPE html><html>"),)),
        Mistake("one of several files of a model", "convert pytorch_model-00001-of-00002.bin --out x.safetensors", 3,
                ("pytorch_model-00002-of-00002.bin", "fetch"), (write("pytorch_model-00001-of-00002.bin", "-"),)),
        Mistake("a tower without pooling", f"{TRAIN} --third timm:local-dir:unpooled --out new", 2,
                ("timm:local-dir:unpooled", "does not pool", "third_features = mean"), (without_pooling,)),
        Mistake("a checkpoint with a class of one's own", "convert own.pt --out own.safetensors", 3,
                ("own.pt", "nothing in it was run", "content = torch.load('own.pt', weights_only=False)",
                 "torch.save(content['state_dict'], 'own-weights.pt')"), (own_class,)),
        Mistake("a key that holds no weights", "convert several.pt --out x.safetensors --key model", 3,
                ("--key", "'model'", "--key model_state", "model_state, model_ema"), (several_nests,)),
        Mistake("safetensors to convert that need no change", "convert tower/model.safetensors --out x.safetensors", 2,
                ("tower/model.safetensors", "safetensors already", "module.")),
        Mistake("weights of another architecture",
                f"{TRAIN} --third timm:test_vit@tower/model.safetensors --out new", 3,
                ("tower/model.safetensors", "do not fit")),
        Mistake("a tower's weights among those of a whole model",
                f"{TRAIN} --third timm:test_resnet@pair.safetensors --out new", 3,
                ("pair.safetensors", "stand behind 'visual.trunk.'", "write them alone"), (among_others,)),
        Mistake("weights for images of another size", f"{TRAIN} --third timm:test_vit@vit.safetensors --out new", 3,
                ("vit.safetensors", "pos_embed", "another size", "timm name of that size"), (of_larger_images,)),
        Mistake("a tower for images of four channels", f"{TRAIN} --third timm:local-dir:four --out new", 2,
                ("timm:local-dir:four", "4 channels", "3 channels or 1"), (of_four_channels,)),
        Mistake("the first token of a causal text model",
                f"{TRAIN} --third hf-text:gpt --third-features cls --out new", 2,
                ("hf-text:gpt", "sees nothing of the text", "take mean"), (causal_reader,)),
        Mistake("a text model without its vocabulary", f"{TRAIN} --third hf-text:reader --out new", 3,
                ("hf-text:reader", "no vocabulary", "tokenizer.json"), (without_vocabulary,)),
        Mistake("a main tower at a model of transformers that is no CLIP",
                f"{TRAIN} --method baseline --start.text hf:reader --out new", 2,
                ("start.text: hf:reader", "'bert'", "CLIPModel", "hf-text:DIR_OR_ID")),
        Mistake("LiT with a tower that reads texts", f"{TRAIN} --method lit --third hf-text:reader --out new", 2,
                ("hf-text:reader", "lit", "3t")),
        Mistake("a store of another tower", f"{TRAIN} --third timm:local-dir:other --embeddings store --out new", 2,
                ("store", "weights differ", "threetowers embed")),
        Mistake("a malformed part",
                "embed --tower timm:local-dir:tower --data photos/captions.csv --out new --part 4/4", 2,
                ("--part", "'4/4'", "0/4")),
        Mistake("a folder of something else for a store",
                "embed --tower timm:local-dir:tower --data photos/captions.csv --out photos --device cpu", 2,
                ("photos", "--out")),
    ),
    "Runs and comparisons": (
        Mistake("other settings for a run that is there", f"{TRAIN} --out run --seed 1", 3,
                ("run", "seed: 0 → 1", "--fresh")),
        Mistake("a tower replaced since the run was stopped", f"{TRAIN} --out stopped", 3,
                ("stopped", "timm:local-dir:tower is not what it was", "--fresh"), (other_tower,)),
        Mistake("a tower replaced since the run was trained", "evaluate run", 0,
                ("run", "timm:local-dir:tower is not the one", "put it back"), (other_tower,)),
        Mistake("every checkpoint damaged", f"{TRAIN} --out stopped", 3, ("stopped/checkpoints", "SHA-256", "--fresh"),
                (flip("stopped/checkpoints/*/model.safetensors"),)),
        Mistake("the newest checkpoint damaged", f"{TRAIN} --out stopped", 0,
                ("passed over", "step-00000004", "SHA-256"),
                (flip("stopped/checkpoints/step-00000004/model.safetensors"),)),
        Mistake("training that is not finite", f"{TRAIN} --out new --steps 30 --optim.lr 1e30", 4,
                ("not finite", "Lower optim.lr")),
        Mistake("evaluation of a folder that is no run", "evaluate photos", 3, ("photos", "no run folder")),
        Mistake("evaluation on data that is not there", "evaluate run --data pohtos", 3, ("pohtos", "photos")),
        Mistake("evaluation without its training data", "evaluate run", 3, ("photos/captions.csv", "does not exist"),
                (move("photos", "old"),)),
        Mistake("a run folder on a file system without locks", f"{TRAIN} --out new", 0,
                ("new", "has no locks", "start none there"), around=without_locks),
        Mistake("loader processes that cannot be started", f"{TRAIN} --out new --inputs.workers 2", 0,
                ("cannot be started", "reading without them", "fewer --inputs.workers"), around=without_processes),
        Mistake("evaluation after the data has changed", "evaluate run", 0,
                ("run: the data has changed", "test (as many images", "not comparable"),
                (move("photos/00.jpg", "photos/40.jpg"), swap("photos/captions.csv", "00.jpg", "40.jpg"))),
        Mistake("classes that are no labelled images", f"{TRAIN} --classes photos/captions.csv --out new", 3,
                ("classes", "photos/captions.csv", "no class labels", "one subfolder")),
        Mistake("classes that are not there", f"{TRAIN} --classes pohtos --out new", 3,
                ("classes", "pohtos", "photos")),
        Mistake("classes that are not there, in a comparison", "compare run.toml --classes pohtos", 3,
                ("classes", "pohtos", "photos")),
        Mistake("classes that are not there, of a run to validate", "validate run.toml --classes pohtos", 3,
                ("classes", "pohtos", "photos")),
        Mistake("export of a run that is not finished", "export stopped --out exported", 3, ("stopped", "train")),
        Mistake("export to an unknown format", "export run --to onx --out exported", 2, ("--to", "onx", "`onnx`")),
        Mistake("export without a folder", "export run", 2, ("--out",)),
        Mistake("a push of a run instead of an export", "push run me/photos --yes", 2,
                ("run folder", "threetowers export run")),
        Mistake("a push of a folder that is no export", "push photos me/photos --yes", 2,
                ("photos", "open_clip_config.json", "threetowers export")),
        Mistake("a push to a name without its owner", "push exported photos --yes", 2,
                ("'photos'", "USER/photos"), EXPORTED),
        Mistake("a push while the Hub is switched off", "push exported me/photos --yes", 2,
                ("HF_HUB_OFFLINE", "unset"), EXPORTED, around=offline),
        Mistake("the same seed twice", "compare run.toml --seeds 0 0", 2, ("--seeds", "0, 0")),
        Mistake("several learning rates, no validation data",
                "compare run.toml --inputs.val-fraction 0 --methods baseline --lrs 1e-3 2e-3", 2,
                ("learning rate", "--inputs.val-fraction", "--lrs")),
        Mistake("LiT compared on a tower that reads texts", "compare run.toml --third hf-text:reader", 2,
                ("hf-text:reader", "--methods baseline 3t")),
        Mistake("a disk that is full", f"{TRAIN} --out new", 3, ("new/checkpoints", "1 MB are free", "Free the disk"),
                around=full_disk),
        Mistake("embeddings on a disk that fills up",
                "embed --tower timm:local-dir:other --data photos/captions.csv --out new --views 20 --device cpu", 3,
                ("new", "features.safetensors", "give another --out"), around=small_files),
        Mistake("an export to a disk that fills up", "export run --out exported", 3,
                ("exported/open_clip_model.safetensors", "give another --out"), around=small_files),
    ),
}  # fmt: skip


def made(mistake: Mistake, kit: Path, folder: Path) -> Answer:
    """What a mistake is answered that is made in a copy of the kit in `folder`."""
    shutil.copytree(kit, folder)
    for change in mistake.changes:
        change(folder)
    with mistake.around():
        return told(mistake.command, folder)


def screen(output: str) -> list[str]:
    """The rows that the output takes on a terminal COLUMNS wide."""
    rows: list[str] = []
    for line in output.rstrip().splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        rows += textwrap.wrap(line, COLUMNS, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return rows


def every() -> Iterator[Mistake]:
    for mistakes in MISTAKES.values():
        yield from mistakes


def page(kit: Path, scratch: Path) -> str:
    """docs/generated/mistakes.md: every mistake with its command, its exit code and its message."""
    lines = [
        "# Mistakes and what they say",
        "",
        f"[tests/mistakes.py](../../tests/mistakes.py) makes {len(list(every()))} mistakes on purpose. Each is shown",
        "with its command, the message on standard error without progress lines, and the exit code: 0 done, 2 usage,",
        "3 data or checkpoint, 4 non-finite training, 75 stopped and resumable. Each message fits on one screen;",
        f"lines are broken here at {COLUMNS} columns. `python tests/mistakes.py` writes this page, and",
        "`tests/test_mistakes.py` checks every message's exit code, length and necessary words.",
    ]
    for section, mistakes in MISTAKES.items():
        lines += ["", f"## {section}"]
        for number, mistake in enumerate(mistakes):
            folder = scratch / f"{section.replace(' ', '-')}-{number}"
            answer = made(mistake, kit, folder)
            lines += ["", f"### {mistake.what[0].upper()}{mistake.what[1:]}", ""]
            message = PROGRESS.sub("", answer.message.replace(f"{folder}/", ""))
            lines += ["```text", f"$ threetowers {mistake.command}", *screen(message)]
            lines += [f"exit {answer.code}", "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["THREETOWERS_CACHE"] = f"{name}/cache"
        PAGE.write_text(page(make_kit(Path(name) / "kit"), Path(name)), encoding="utf-8")
    print(f"written: {PAGE}")
