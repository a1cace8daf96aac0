"""Build the embedded demo set of labelled drawings, ``blackbox_vlm/data/emoji``.

The pictures are colour emoji of five free sets, taken as SVG from npm packages at exact versions,
drawn on white and stored as small palette PNGs. The table of subjects below is the labelling.

Needs `npm` on the path and, in any environment (the project itself does not use the renderer):

    pip install resvg-py==0.5.0 pillow==13.0.0

Run from the repository root; the target folder is replaced:

    python scripts/build_emoji_set.py blackbox_vlm/data/emoji

With these versions the result is the same byte for byte (`files.json` has every picture's sha256).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image, ImageChops, ImageStat

SIDE = 112  # pixels of a stored picture
MARGIN = 6  # white border inside it
COLOURS = 64  # size of the palette
TRAIN_CAP, TEST_CAP = 34, 14  # pictures of a class that are kept, at most
TRAIN_FLOOR, TEST_FLOOR = 20, 10  # pictures of a class that there must be
TEST_SHARE = 0.3  # part of a class's subjects that goes to the test side
SAME_PICTURE = 6.0  # mean difference of two thumbnails (0 to 255) below which they are one picture

NAME = "emoji"
WRITTEN = "descriptions.json"  # by hand: it outlives a rebuild
TEMPLATE = "a drawing of a {}."
LICENCE = "Apache-2.0 AND CC-BY-4.0 AND MIT"
SPLIT = (
    "By subject: all drawings of one code point, and of code points that show nearly the same thing"
    " (dog, dog face, poodle), are on one side. The side is drawn by a hash of the subject's name."
    " No two pictures are near-copies of each other (checked on thumbnails)."
)
LICENCE_TEXTS = "spdx-license-list@6.12.0"


@dataclass(frozen=True)
class Vendor:
    """One emoji set: where it comes from and what its licence asks to be said."""

    key: str
    title: str
    package: str
    version: str
    licence: str
    holder: str
    home: str
    declared: str = ""  # what the npm package says where that is not `licence`
    note: str = ""

    @property
    def attribution(self) -> str:
        text = f"{self.title}. {self.holder}. {self.home}"
        return f"{text} {self.note}" if self.note else text


VENDORS = (
    Vendor(
        "noto",
        "Noto Emoji",
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "Copyright 2013 Google, Inc. All Rights Reserved",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Vendor(
        "noto-v1",
        "Noto Emoji, first design (until 2017)",
        "@iconify-json/noto-v1",
        "1.2.5",
        "Apache-2.0",
        "Copyright 2013 Google, Inc. All Rights Reserved",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Vendor(
        "twemoji",
        "Twemoji graphics",
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Copyright 2014-2021 Twitter; 2022-present Jason Sofonia and Justine De Caires",
        "https://github.com/jdecked/twemoji",
    ),
    Vendor(
        "fluent",
        "Fluent Emoji (flat)",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Copyright (c) Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Vendor(
        "firefox",
        "Firefox OS Emoji (FxEmojis), visual design",
        "@iconify-json/fxemoji",
        "1.2.2",
        "CC-BY-4.0",
        "Copyright 2015, Mozilla Foundation",
        "https://github.com/mozilla/fxemoji",
        "Apache-2.0",
        "The npm package names Apache-2.0, which upstream gives to its code; the drawings are under"
        " CC-BY-4.0, which is followed here.",
    ),
)

# Class name -> its subjects. A subject is one or more Unicode short names that show nearly the same
# thing; no subject is parted by the split. Names are those of the Noto package.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "mammal": (
        "dog dog-face poodle guide-dog service-dog",
        "cat cat-face black-cat",
        "mouse mouse-face rat hamster",
        "rabbit rabbit-face",
        "horse horse-face zebra donkey",
        "cow cow-face ox water-buffalo bison",
        "tiger tiger-face leopard",
        "lion",
        "pig pig-face boar",
        "ram goat ewe",
        "camel two-hump-camel",
        "llama",
        "elephant mammoth",
        "rhinoceros",
        "hippopotamus",
        "monkey monkey-face gorilla orangutan",
        "wolf",
        "fox",
        "bear polar-bear",
        "panda",
        "koala",
        "chipmunk",
        "hedgehog",
        "bat",
        "deer moose",
        "giraffe",
        "kangaroo",
        "raccoon",
        "badger skunk",
        "sloth",
        "otter",
        "beaver",
    ),
    "bird": (
        "chicken rooster",
        "baby-chick front-facing-baby-chick hatching-chick",
        "bird black-bird dove",
        "penguin",
        "turkey",
        "eagle",
        "duck swan goose",
        "owl",
        "peacock",
        "parrot",
        "dodo",
        "flamingo",
    ),
    "insect": (
        "ant",
        "bug",
        "honeybee",
        "lady-beetle beetle",
        "butterfly",
        "cricket",
        "mosquito",
        "fly",
        "cockroach",
    ),
    "sea animal": (
        "fish tropical-fish",
        "blowfish",
        "shark",
        "octopus",
        "squid",
        "crab",
        "lobster",
        "shrimp",
        "jellyfish",
        "oyster",
    ),
    "flower": (
        "tulip",
        "cherry-blossom blossom",
        "rose wilted-flower",
        "hibiscus",
        "sunflower",
        "bouquet",
        "lotus",
        "hyacinth",
    ),
    "fruit": (
        "grapes",
        "melon",
        "watermelon",
        "tangerine",
        "lemon lime",
        "banana",
        "pineapple",
        "red-apple green-apple",
        "pear",
        "peach",
        "cherries",
        "strawberry",
        "kiwi-fruit",
        "coconut",
        "mango",
        "blueberries",
    ),
    "vegetable": (
        "eggplant",
        "ear-of-corn",
        "hot-pepper bell-pepper",
        "cucumber",
        "potato roasted-sweet-potato",
        "carrot",
        "broccoli",
        "leafy-green",
        "garlic onion",
        "pea-pod",
        "root-vegetable",
    ),
    "dessert": (
        "soft-ice-cream ice-cream shaved-ice",
        "doughnut",
        "cookie",
        "chocolate-bar",
        "candy lollipop",
        "custard",
        "shortcake birthday-cake",
        "pie",
        "cupcake",
        "dango",
    ),
    "drink": (
        "teacup-without-handle",
        "hot-beverage",
        "sake",
        "wine-glass",
        "cocktail-glass",
        "tropical-drink",
        "beer-mug clinking-beer-mugs",
        "bottle-with-popping-cork",
        "clinking-glasses",
        "tumbler-glass",
        "glass-of-milk",
        "cup-with-straw bubble-tea",
        "beverage-box",
        "mate",
    ),
    "vehicle": (
        "automobile oncoming-automobile sport-utility-vehicle taxi oncoming-taxi police-car"
        " oncoming-police-car",
        "bus oncoming-bus trolleybus minibus",
        "ambulance delivery-truck articulated-lorry pickup-truck fire-engine",
        "tractor",
        "locomotive",
        "high-speed-train bullet-train train metro light-rail tram",
        "railway-car tram-car mountain-railway monorail",
        "bicycle",
        "motorcycle motor-scooter",
        "auto-rickshaw",
        "racing-car",
        "airplane small-airplane",
        "helicopter",
        "ship passenger-ship ferry",
        "speedboat motor-boat",
        "sailboat",
        "canoe",
    ),
    "musical instrument": (
        "saxophone",
        "guitar banjo violin",
        "musical-keyboard",
        "trumpet postal-horn",
        "drum",
        "long-drum",
        "maracas",
        "flute",
        "harp",
        "accordion",
    ),
    "building": (
        "house house-with-garden houses derelict-house",
        "office-building department-store",
        "japanese-post-office post-office",
        "hospital",
        "bank classical-building",
        "hotel love-hotel",
        "convenience-store",
        "school",
        "factory",
        "japanese-castle",
        "castle",
        "church wedding",
        "mosque",
        "synagogue",
        "hindu-temple",
        "stadium",
        "hut",
    ),
}

# Where the Firefox set names a drawing otherwise than by the Unicode short name without hyphens.
FIREFOX_NAMES = {
    "dog": "dogside",
    "dog-face": "dog",
    "cat": "catside",
    "cat-face": "cat",
    "mouse": "mouseside",
    "mouse-face": "mouse",
    "hamster": "hampster",
    "rabbit": "bunnyside",
    "rabbit-face": "bunny",
    "tiger": "tigerside",
    "tiger-face": "tiger",
    "leopard": "leopardside",
    "pig": "pigside",
    "pig-face": "pig",
    "ewe": "sheep",
    "camel": "dromedarycamel",
    "two-hump-camel": "bactriancamel",
    "wolf": "wolfface",
    "panda": "pandaface",
    "front-facing-baby-chick": "frontfacingchick",
    "dove": "doveofpeace",
    "ear-of-corn": "earofmaize",
    "hot-pepper": "chilipepper",
    "eggplant": "aubergine",
    "sake": "sakebottleandcup",
    "sport-utility-vehicle": "recreationalvehicle",
    "locomotive": "steamlocomotive",
    "bullet-train": "highspeedtrainbulletnose",
    "racing-car": "racecar",
    "house": "housebuilding",
    "houses": "housebuildings",
    "castle": "europeancastle",
    "post-office": "europeanpostoffice",
}

# Drawings that do not show what their name says, looked at one by one: (vendor, name).
MISDRAWN = {
    ("noto-v1", "cricket"),  # the game's bat and ball
    ("noto-v1", "bug"),  # a centipede
}


@dataclass
class Drawing:
    """One picture of the set, drawn."""

    vendor: str
    codepoint: str
    png: bytes

    @cached_property
    def thumbnail(self) -> Image.Image:
        small = Image.open(io.BytesIO(self.png)).convert("RGB")
        return small.resize((16, 16), Image.Resampling.BOX)


# One side of a class: its pictures in the order in which they are taken.
Sides = dict[str, dict[str, list[Drawing]]]


class IconSet:
    """The drawings of one vendor by Unicode short name."""

    def __init__(self, vendor: Vendor, folder: Path) -> None:
        self.vendor = vendor
        self.data = read_json(folder / "icons.json")
        wanted = vendor.declared or vendor.licence
        licence = read_json(folder / "info.json")["license"]["spdx"]
        if licence != wanted:
            raise SystemExit(f"{vendor.package} says it is under {licence}, wanted {wanted}")

    def icon_name(self, subject: str) -> str:
        if self.vendor.key != "firefox":
            return subject
        return FIREFOX_NAMES.get(subject, subject.replace("-", ""))

    def icon(self, subject: str) -> dict[str, Any] | None:
        """The icon with its own box, through an alias if need be, or None."""
        if (self.vendor.key, subject) in MISDRAWN:
            return None
        name = self.icon_name(subject)
        name = self.data.get("aliases", {}).get(name, {}).get("parent", name)
        found = self.data["icons"].get(name)
        return None if found is None else {**self._box(), **found}

    def _box(self) -> dict[str, Any]:
        return {key: self.data.get(key, 0) for key in ("left", "top", "width", "height")}


def read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fetch(spec: str, into: Path) -> Path:
    """Unpack one npm package, `name@version`; return its folder."""
    folder = into / spec.replace("/", "-").replace("@", "_")
    folder.mkdir()
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), spec]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package"


def draw(icon: dict[str, Any]) -> bytes:
    """The icon on white as a palette PNG."""
    inner = SIDE - 2 * MARGIN
    box = " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{SIDE}" height="{SIDE}"><svg x="{MARGIN}" y="{MARGIN}" width="{inner}"'
        f' height="{inner}" viewBox="{box}">{icon["body"]}</svg></svg>'
    )
    drawn = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
    return to_png(picture)


def to_png(picture: Image.Image) -> bytes:
    few = picture.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


def same_picture(one: Drawing, other: Drawing) -> bool:
    difference = ImageChops.difference(one.thumbnail, other.thumbnail)
    return sum(ImageStat.Stat(difference).mean) / 3 < SAME_PICTURE


def draw_subject(names: list[str], sets: list[IconSet], codes: dict[str, str]) -> list[Drawing]:
    """One picture per vendor; a subject of several names takes them in turn."""
    drawings = []
    for turn, icons in enumerate(sets):
        found = [(name, icon) for name in names if (icon := icons.icon(name))]
        if found:
            name, icon = found[turn % len(found)]
            drawings.append(Drawing(icons.vendor.key, codes[name], draw(icon)))
    return drawings


def drop_repeats(drawings: list[Drawing], seen: list[Drawing]) -> list[Drawing]:
    """Those that are no near-copy of an earlier one; `seen` grows by them."""
    kept = []
    for drawing in drawings:
        if not any(same_picture(drawing, earlier) for earlier in seen):
            seen.append(drawing)
            kept.append(drawing)
    return kept


def shuffled(label: str) -> list[str]:
    """The subjects of a class in an order drawn by hash."""
    return sorted(SUBJECTS[label], key=lambda s: sha256(f"{label}/{s.split()[0]}".encode()))


def interleave(subjects: list[list[Drawing]]) -> Iterator[Drawing]:
    """First one picture of each subject, then a second, each subject starting at another vendor."""
    turned = [s[i % len(s) :] + s[: i % len(s)] for i, s in enumerate(subjects) if s]
    for rank in range(len(VENDORS)):
        yield from (subject[rank] for subject in turned if rank < len(subject))


def build_class(
    label: str, sets: list[IconSet], codes: dict[str, str], seen: list[Drawing]
) -> dict[str, list[Drawing]]:
    subjects = [drop_repeats(draw_subject(s.split(), sets, codes), seen) for s in shuffled(label)]
    border = round(TEST_SHARE * len(subjects))
    sides = {
        "train": list(interleave(subjects[border:]))[:TRAIN_CAP],
        "test": list(interleave(subjects[:border]))[:TEST_CAP],
    }
    if len(sides["train"]) < TRAIN_FLOOR or len(sides["test"]) < TEST_FLOOR:
        raise SystemExit(f"too few pictures of {label}: {[len(s) for s in sides.values()]}")
    return sides


def build_sides(sets: list[IconSet], codes: dict[str, str]) -> Sides:
    seen: list[Drawing] = []
    sides: Sides = {"train": {}, "test": {}}
    for label in SUBJECTS:
        for side, drawings in build_class(label, sets, codes, seen).items():
            sides[side][label] = drawings
    return sides


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def folder_name(label: str) -> str:
    return label.replace(" ", "_")


def write_pictures(sides: Sides, out: Path) -> list[dict[str, str]]:
    """The PNG files; returns the rows of `files.json`."""
    rows = []
    for side, classes in sides.items():
        for label, drawings in classes.items():
            folder = out / side / folder_name(label)
            folder.mkdir(parents=True)
            for drawing in drawings:
                file = folder / f"{drawing.codepoint}_{drawing.vendor}.png"
                file.write_bytes(drawing.png)
                rows.append(row(file.relative_to(out), label, drawing))
    return sorted(rows, key=lambda r: r["path"])


def row(path: Path, label: str, drawing: Drawing) -> dict[str, str]:
    return {
        "path": path.as_posix(),
        "label": label,
        "sha256": sha256(drawing.png),
        "codepoint": drawing.codepoint,
        "vendor": drawing.vendor,
    }


def meta(sides: Sides, rows: list[dict[str, str]]) -> dict[str, Any]:
    per_class = {s: {label: len(d) for label, d in sides[s].items()} for s in sides}
    return {
        "name": NAME,
        "classnames": list(SUBJECTS),
        "class_dirs": [folder_name(label) for label in SUBJECTS],
        "prompt_template": TEMPLATE,
        "licence": LICENCE,
        "source": [source(vendor) for vendor in VENDORS],
        "split": SPLIT,
        "counts": {
            "train": sum(per_class["train"].values()),
            "test": sum(per_class["test"].values()),
            "per_class": per_class,
            "per_vendor": dict(sorted(Counter(r["vendor"] for r in rows).items())),
        },
    }


def source(vendor: Vendor) -> dict[str, str]:
    return {
        "vendor": vendor.key,
        "npm_package": vendor.package,
        "version": vendor.version,
        "licence": vendor.licence,
        "attribution": vendor.attribution,
    }


def write_licences(out: Path, texts: Path) -> None:
    for vendor in VENDORS:
        text = read_json(texts / "licenses" / f"{vendor.licence}.json")["licenseText"]
        text = text.replace("Copyright (c) <year> <copyright holders>", f"{vendor.holder}.")
        head = (
            f"{vendor.attribution}\n\nThe files of this folder named *_{vendor.key}.png are"
            f" drawings of this set under {vendor.licence}.\nChanges: drawn from SVG at {SIDE} x"
            f" {SIDE} pixels on white, reduced to {COLOURS} colours.\n\n{'-' * 80}\n\n"
        )
        target = out / f"LICENSE-{vendor.key}.txt"
        target.write_text(head + text.strip() + "\n", encoding="utf-8")


def write_readme(out: Path, counts: dict[str, Any]) -> None:
    credits = "\n".join(
        f"- `*_{v.key}.png`: {v.attribution}"
        f" - {v.licence}, see [LICENSE-{v.key}.txt](LICENSE-{v.key}.txt)."
        for v in VENDORS
    )
    (out / "README.md").write_text(
        f"# emoji: a small set of labelled drawings\n\n"
        f"Drawings, not photographs, and no benchmark: colour emoji of five free sets, made for the"
        f" demo and the tests. {len(SUBJECTS)} classes, {counts['train']} training and"
        f" {counts['test']} test pictures, {SIDE} x {SIDE} pixels on white. Numbers measured on it"
        f" say nothing about photographs.\n\n"
        f"The labels are ours (the table in `scripts/build_emoji_set.py`, which rebuilds this"
        f" folder).\n\nThe split: {SPLIT[0].lower()}{SPLIT[1:]}\n\n"
        f"Credits, and the licence of each picture (the end of its name tells the set):\n\n"
        f"{credits}\n\n"
        f"Changes to all of them: drawn from SVG on white, reduced to {COLOURS} colours. None of"
        f" the named owners endorses this project.\n\n"
        f"`{WRITTEN}` says in a few sentences how each class looks, in the CuPL format (class name"
        f" -> sentences). It was written for this project - Apache-2.0, as the code is.\n",
        encoding="utf-8",
    )


def codepoints(folder: Path) -> dict[str, str]:
    """Unicode short name -> code points in hexadecimal, without the variation selector."""
    table = read_json(folder / "chars.json")
    return {name: code.replace("-fe0f", "") for code, name in table.items()}


def build(out: Path) -> str:
    """Make the set in `out`, which is replaced; return one line about it."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [fetch(f"{v.package}@{v.version}", Path(scratch)) for v in VENDORS]
        sets = [IconSet(vendor, folder) for vendor, folder in zip(VENDORS, folders, strict=True)]
        sides = build_sides(sets, codepoints(folders[0]))
        written = (out / WRITTEN).read_bytes() if (out / WRITTEN).exists() else b"{}"
        shutil.rmtree(out, ignore_errors=True)
        rows = write_pictures(sides, out)
        (out / WRITTEN).write_bytes(written)
        about = meta(sides, rows)
        write_json(out / "meta.json", about)
        write_json(out / "files.json", rows)
        write_licences(out, fetch(LICENCE_TEXTS, Path(scratch)))
        write_readme(out, about["counts"])
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    counts = about["counts"]
    return f"{len(SUBJECTS)} classes, {counts['train']} train, {counts['test']} test, {size} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded set of drawings.")
    parser.add_argument("out", type=Path, help="folder to make; replaced if it exists")
    sys.stdout.write(build(parser.parse_args().out) + "\n")


if __name__ == "__main__":
    main()
