"""Sets of look-alikes: MMVP-VLM's folder, and a simple JSON format for all the others.

Three tasks hide behind the word "pair", and their figures must not be mixed up:

    text-to-image   for each of the two captions, which of the two images?    MMVP-VLM; chance 25 %
    image-to-text   for each of the two images, which of the two captions?    Winoground; 25 %
                    for one image, which of the captions?                     SugarCrepe; 50 %
    group           both of the above at once                                 Winoground; 16.7 %

The JSON format, one object:

    {"name": "my set",
     "template": "{}",                                    captions are put in here; optional
     "items": [{"id": 1, "category": "Color",             category is optional
                "images": ["a.jpg", "b.jpg"],             a pair: caption k belongs to image k
                "captions": ["a red car", "a blue car"]},
               {"id": 2, "image": "c.jpg",                a single image: the first caption is right
                "captions": ["a dog", "a cat", "a cow"]}]}

Paths are relative to the file.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from util.cli import printable
from util.schema import read_json as read_checked

MMVP_PAIRS = 135
# What the formats must hold (util/schema.py).
ITEM = {"id?": (int, str), "category?": str, "image?": str, "images?": [str], "captions": [str]}
PAIR_SET = {"name?": str, "template?": str, "items": [ITEM]}
DOUBTS = {"leave_out?": [(int, str)], "swap?": [(int, str)]}
IMAGE_FOLDERS = ("MMVP_VLM_Images", "MLLM_VLM Images", "MLLM_VLM_Images")  # all three are about


@dataclass(frozen=True)
class Item:
    """One or two images and their captions; the first caption belongs to the first image."""

    category: str
    images: tuple
    captions: tuple[str, ...]
    name: str

    @property
    def paired(self) -> bool:
        return len(self.images) == 2


@dataclass(frozen=True)
class PairSet:
    name: str
    items: list[Item]
    template: str = "{}"
    mmvp: bool = False
    """in MMVP-VLM's layout"""


def read_pair_set(source: str | Path) -> PairSet:
    """A folder in MMVP-VLM's layout, or a JSON file. Raises: FileNotFoundError or ValueError naming
    the first thing that is wrong."""
    source = Path(source)
    if source.suffix == ".json" and source.is_file():
        return read_json(source)
    items = read_mmvp(source)
    # Other sets come in this layout too, the toy's among them: only the real one has that name.
    name = "MMVP-VLM" if len(items) == MMVP_PAIRS else source.resolve().name
    return PairSet(name, items, "a photo of {}", mmvp=True)


def read_mmvp(folder: str | Path) -> list[Item]:
    """MMVP-VLM's layout: Questions.csv and an image folder; images stay file names until they are
    needed.

    Rows are keyed by Type and Question ID, never by their order. Pair k is ids (2k − 1, 2k).

    Raises: FileNotFoundError or ValueError naming the first row, id or picture that is wrong.
    """
    folder = Path(folder)
    table = folder / "Questions.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"benchmark: {table} is missing; --benchmark wants an MMVP-VLM folder or a JSON file"
        )
    # The published archive and its mirrors do not agree on the folder's name.
    images = next((folder / n for n in IMAGE_FOLDERS if (folder / n).is_dir()), None)
    if images is None:
        raise FileNotFoundError(
            f"benchmark: {folder} has none of the image folders {', '.join(IMAGE_FOLDERS)}"
        )
    rows = _read_questions(table)
    if min(rows) < 1:
        raise ValueError(f"benchmark: {table} has id {min(rows)}; ids start at 1")
    # An incomplete benchmark would still give a percentage, of something else. Refuse it. (What is
    # absent is counted, not listed: one id of 10¹² would list as many.)
    last = max(rows) + max(rows) % 2
    if absent := last - len(rows):
        first = islice((number for number in range(1, last + 1) if number not in rows), 10)
        raise ValueError(
            f"benchmark: {table} lacks {absent} of the ids 1 to {last}: "
            f"{', '.join(map(str, first))}{' …' if absent > 10 else ''}"
        )
    items = []
    for first in range(1, last, 2):
        (pattern, left), (other, right) = rows[first], rows[first + 1]
        if pattern != other:
            raise ValueError(
                f"benchmark: {table}: ids {first} and {first + 1} are a pair of two types, "
                f"{pattern:.40} and {other:.40}"
            )
        files = tuple(_find_picture(images / pattern, number) for number in (first, first + 1))
        items.append(Item(pattern, files, (left, right), f"{first}-{first + 1}"))
    return items


def _read_questions(table: Path) -> dict[int, tuple[str, str]]:
    """Question ID → (Type, Statement). Statements hold commas and quotes, so only a CSV parser may
    touch them; "utf-8-sig" because some copies went through a spreadsheet."""
    rows: dict[int, tuple[str, str]] = {}
    with reading(table, "benchmark:") as file:
        reader = csv.DictReader(file)
        missing = {"Question ID", "Type", "Statement"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"benchmark: {table} has no column {', '.join(sorted(missing))}")
        for row in reader:
            place = f"benchmark: {table} line {reader.line_num}"
            try:
                number = int(row["Question ID"])
            except (TypeError, ValueError):  # also of a number of 5000 digits
                raise ValueError(
                    f"{place}: Question ID {row['Question ID']!r:.40} is not a number"
                ) from None
            if number in rows:
                raise ValueError(f"{place}: id {number} appears twice")
            if not row["Type"] or not row["Statement"]:
                raise ValueError(f"{place}: id {number} has no Type or no Statement")
            rows[number] = (printable(row["Type"]), row["Statement"].strip())
    if not rows:
        raise ValueError(f"benchmark: {table} has no rows")
    return rows


@contextmanager
def reading(table: Path, what: str) -> Iterator[TextIO]:
    """A table of comma- or bar-separated values, opened. Raises: ValueError naming the file where
    what is read from it is no text or no table."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{what} {table} cannot be read as a table ({error})") from None


def _find_picture(folder: Path, number: int) -> Path:
    for suffix in (".jpg", ".png", ".jpeg", ".JPG", ".PNG"):
        if (folder / f"{number}{suffix}").is_file():
            return folder / f"{number}{suffix}"
    raise FileNotFoundError(f"benchmark: picture {number}.jpg is missing in {folder}")


def read_json(file: Path) -> PairSet:
    """The format at the top of this file."""
    content = read_checked(file, PAIR_SET, "benchmark:")
    if not content["items"]:
        raise ValueError(f'benchmark: {file} has no "items"; the format is in pairsets.py')
    template = content.get("template", "{}")
    if "{}" not in template:
        raise ValueError(f"benchmark: {file}: template {template!r:.60} has no {{}} for a caption")
    items, seen = [], set()
    for number, entry in enumerate(content["items"]):
        name = printable(str(entry.get("id", number)))
        place = f"benchmark: {file}, item {name:.60}"
        if name in seen:
            raise ValueError(f"{place}: its id appears twice")
        seen.add(name)
        images = entry.get("images") or ([entry["image"]] if "image" in entry else [])
        captions = entry["captions"]
        if not all(captions):
            raise ValueError(f"{place}: a caption is empty")
        if len(images) == 2 and len(captions) != 2 or len(images) == 1 and len(captions) < 2:
            raise ValueError(
                f"{place}: {len(images)} image(s) and {len(captions)} caption(s); two images need "
                "two captions, one image two or more"
            )
        if len(images) not in (1, 2):
            raise ValueError(f"{place}: one image or two, not {len(images)}")
        files = tuple(file.parent / image for image in images)
        missing = next((f for f in files if not f.is_file()), None)
        if missing:
            raise FileNotFoundError(f"{place}: picture {printable(str(missing))} is missing")
        category = printable(entry.get("category", "all"))
        items.append(Item(category, files, tuple(captions), name))
    return PairSet(printable(content.get("name", file.stem)), items, template)


def apply_doubts(items: list[Item], file: str | Path) -> list[Item]:
    """A benchmark without known doubts: ``{"leave_out": [...], "swap": [...]}`` of item names.

    For MMVP-VLM a name is "1-2"; either of its ids will do, unless an item has that very name.
    Swapping exchanges the two captions.

    Raises: FileNotFoundError; ValueError for a file of another shape, a name that is not in the
        benchmark, an id of several pairs, or if nothing is left.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"doubts: no file {file}")
    doubts = read_checked(file, DOUBTS, "doubts:")
    out, swap = ({printable(str(n)) for n in doubts.get(k, [])} for k in ("leave_out", "swap"))
    pairs = [item.name for item in items if re.fullmatch(r"\d+-\d+", item.name)]
    ids = [(one, name) for name in pairs for one in name.split("-")]
    several = Counter(one for one, _ in ids)
    called = {one: name for one, name in ids if several[one] == 1}
    called |= {item.name: item.name for item in items}
    unknown = sorted((out | swap) - called.keys())
    if unknown:
        names = f"{', '.join(unknown[:10]):.200}{' …' if len(unknown) > 10 else ''}"
        where = "not in this benchmark, or in several of its pairs"
        raise ValueError(f"doubts: {file} names {names}, {where}")
    out, swap = {called[n] for n in out}, {called[n] for n in swap}
    kept = [
        Item(i.category, i.images, i.captions[::-1], i.name) if i.name in swap else i
        for i in items
        if i.name not in out
    ]
    if not kept:
        raise ValueError(f"doubts: {file} leaves out every item")
    return kept
