"""Which models can be a frozen tower: `threetowers towers [WORD|SPEC]`. Downloads no weights."""

import re
from pathlib import Path

import open_clip
import timm

from threetowers.errors import UsageError
from threetowers.settings import did_you_mean
from threetowers.towers.frozen.base import Card, num_parameters
from threetowers.towers.frozen.load import KINDS, kind_of, load_frozen

MOST = 40  # names of one library that a search shows


# one or two of each kind and size that have a reason to be tried first
CURATED = (
    ("resnet50.a1_in1k", "small and fast, ImageNet labels"),
    ("convnext_base.fb_in22k", "convolutions, 22k labels"),
    ("vit_base_patch16_224.augreg_in21k", "ViT on 21k labels, the paper's kind of tower"),
    ("vit_large_patch16_224.augreg_in21k", "the same, larger"),
    ("vit_small_patch14_dinov2.lvd142m", "self-supervised, no labels or captions; 518 pixels are slow"),
    ("vit_base_patch16_dinov3.lvd1689m", "self-supervised; its weights have a licence of their own"),
    ("convnext_tiny.dinov3_lvd1689m", "the same, small and convolutional"),
    ("vit_base_patch16_siglip_224.v2_webli", "trained on captions itself"),
)


def towers(name: str = "") -> str:
    """The text of the verb: an overview without a name, matching names for a word, a card for a full spec.

    Raises UsageError for a word that matches nothing and what load_frozen raises for a spec that means nothing.
    """
    if not name:
        return _overview()
    if ":" in name and name.partition(":")[0] in {kind.prefix for kind in KINDS}:
        return describe(name).text()
    return _search(name)


def _overview() -> str:
    pairs = open_clip.list_pretrained()
    counts = (
        f"timm offers {len(timm.list_models(pretrained=True)):,} published towers, open_clip {len(pairs):,}"
    )
    rows = [(f"timm:{model}", describe(f"timm:{model}"), why) for model, why in CURATED]
    return "\n".join(
        [
            "A frozen third tower is named by its library:",
            "",
            *(f"  {kind.forms[0]:<24} {kind.help}" for kind in KINDS),
            "",
            f"{counts}; hf: takes any vision model of its kind.",
            "`threetowers towers dino` lists the names with that word, `threetowers towers timm:NAME` describes one.",
            "",
            "Good first choices:",
            "",
            f"  {'tower':<44} {'parameters':>10}  {'pixels':>6}  {'width':>5}",
            *(
                f"  {spec:<44} {card.num_parameters / 1e6:>8.1f} M  {card.image.size if card.image else 0:>6}  "
                f"{card.width:>5}  {why}"
                for spec, card, why in rows
            ),
        ]
    )


def _search(word: str) -> str:
    found = {
        "timm": [
            f"timm:{name}" for name in timm.list_models(pretrained=True) if word.lower() in name.lower()
        ],
        "open_clip": [
            f"open_clip:{model}@{tag}"
            for model, tag in open_clip.list_pretrained()
            if word.lower() in f"{model}@{tag}".lower()
        ],
    }
    if not any(found.values()):
        near = did_you_mean(word, _families())
        raise UsageError(
            f"towers: no published name of timm or open_clip has {word!r} in it"
            + (
                near
                if near.startswith(";")
                else "; try a family such as vit, resnet, convnext, dino or siglip"
            )
        )
    lines = []
    for library, names in found.items():
        if not names:
            continue
        lines += [f"{len(names)} of {library}", *(f"  {name}" for name in names[:MOST])]
        if len(names) > MOST:
            lines.append(f"  and {len(names) - MOST} more; a longer word finds fewer")
    return "\n".join(lines)


def _families() -> list[str]:
    return sorted({re.split("[_.]", name)[0] for name in timm.list_models(pretrained=True)})


def describe(spec: str) -> Card:
    """The card of one tower; networks with published weights are built without memory and without weights."""
    kind, name = kind_of(spec)
    local = (
        name.startswith("local-dir:") or Path(name).is_dir() or Path(name.partition("@")[2] or "\0").exists()
    )
    return _loaded(spec) if kind.card is None or local else kind.card(spec, name)


def _loaded(spec: str) -> Card:
    tower = load_frozen(spec)
    count = num_parameters(tower.module)
    if tower.reads == "images":
        return Card(spec, count, tower.width, tower.image)
    limit = tower.tokenizer.as_dict().get("limit") or tower.tokenizer(["a"]).shape[1]
    return Card(spec, count, tower.width, context=limit)
