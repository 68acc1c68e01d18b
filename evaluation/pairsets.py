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
import json
from dataclasses import dataclass
from pathlib import Path

MMVP_PAIRS = 135
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
    # An incomplete benchmark would still give a percentage, of something else. Refuse it.
    last = max(rows) + max(rows) % 2
    absent = sorted(set(range(1, last + 1)) - set(rows))
    if absent:
        raise ValueError(
            f"benchmark: {table} lacks {len(absent)} of the ids 1 to {last}: "
            f"{', '.join(map(str, absent[:10]))}{' …' if len(absent) > 10 else ''}"
        )
    if min(rows) < 1:
        raise ValueError(f"benchmark: {table} has id {min(rows)}; ids start at 1")
    items = []
    for first in range(1, last, 2):
        (pattern, left), (other, right) = rows[first], rows[first + 1]
        if pattern != other:
            raise ValueError(
                f"benchmark: {table}: ids {first} and {first + 1} are a pair of two types, "
                f"{pattern} and {other}"
            )
        files = tuple(_find_picture(images / pattern, number) for number in (first, first + 1))
        items.append(Item(pattern, files, (left, right), f"{first}-{first + 1}"))
    return items


def _read_questions(table: Path) -> dict[int, tuple[str, str]]:
    """Question ID → (Type, Statement). Statements hold commas and quotes, so only a CSV parser may
    touch them; "utf-8-sig" because some copies went through a spreadsheet."""
    rows: dict[int, tuple[str, str]] = {}
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"Question ID", "Type", "Statement"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"benchmark: {table} has no column {', '.join(sorted(missing))}")
        for row in reader:
            place = f"benchmark: {table} line {reader.line_num}"
            try:
                number = int(row["Question ID"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"{place}: Question ID {row['Question ID']!r} is not a number"
                ) from None
            if number in rows:
                raise ValueError(f"{place}: id {number} appears twice")
            if not row["Type"] or not row["Statement"]:
                raise ValueError(f"{place}: id {number} has no Type or no Statement")
            rows[number] = (row["Type"].strip(), row["Statement"].strip())
    if not rows:
        raise ValueError(f"benchmark: {table} has no rows")
    return rows


def _find_picture(folder: Path, number: int) -> Path:
    for suffix in (".jpg", ".png", ".jpeg", ".JPG", ".PNG"):
        if (folder / f"{number}{suffix}").is_file():
            return folder / f"{number}{suffix}"
    raise FileNotFoundError(f"benchmark: picture {number}.jpg is missing in {folder}")


def read_json(file: Path) -> PairSet:
    """The format at the top of this file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"benchmark: {file} is not JSON ({error})") from None
    entries = content.get("items") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'benchmark: {file} has no "items"; the format is in pairsets.py')
    template = content.get("template", "{}")
    if not isinstance(template, str) or "{}" not in template:
        raise ValueError(f"benchmark: {file}: template {template!r} has no {{}} for the caption")
    items, seen = [], set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"benchmark: {file}: item {number} is not an object: {entry!r:.40}")
        name = str(entry.get("id", number))
        place = f"benchmark: {file}, item {name}"
        if name in seen:
            raise ValueError(f"{place}: its id appears twice")
        seen.add(name)
        images = entry.get("images") or ([entry["image"]] if "image" in entry else [])
        captions = entry.get("captions", [])
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise ValueError(f"{place}: images must be a list of files")
        if not isinstance(captions, list) or not all(c and isinstance(c, str) for c in captions):
            raise ValueError(f"{place}: captions must be a list of texts")
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
            raise FileNotFoundError(f"{place}: picture {missing} is missing")
        items.append(Item(str(entry.get("category", "all")), files, tuple(captions), name))
    return PairSet(str(content.get("name", file.stem)), items, template)


def apply_doubts(items: list[Item], file: str | Path) -> list[Item]:
    """A benchmark without known doubts: ``{"leave_out": [...], "swap": [...]}`` of item names.

    For MMVP-VLM a name is "1-2"; either of its ids will do. Swapping exchanges the two captions.

    Raises: FileNotFoundError; ValueError for a file of another shape, a name that is not in the
        benchmark, or if nothing is left.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"doubts: no file {file}")
    try:
        doubts = json.loads(Path(file).read_text(encoding="utf-8"))
        out, swap = ({str(n) for n in doubts.get(k, [])} for k in ("leave_out", "swap"))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"doubts: {file} is no JSON object of lists ({error})") from None
    called = {alias: item.name for item in items for alias in (item.name, *item.name.split("-"))}
    unknown = sorted((out | swap) - called.keys())
    if unknown:
        raise ValueError(f"doubts: {file} names {', '.join(unknown)}, not in this benchmark")
    out, swap = {called[n] for n in out}, {called[n] for n in swap}
    kept = [
        Item(i.category, i.images, i.captions[::-1], i.name) if i.name in swap else i
        for i in items
        if i.name not in out
    ]
    if not kept:
        raise ValueError(f"doubts: {file} leaves out every item")
    return kept
