"""Pictures and their captions, for image-text retrieval: four formats, one result.

    this project's     [{"file": "a.jpg", "captions": ["…", "…"]}, …]
    COCO               {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy's split   {"images": [{"filename", "split", "sentences": [{"raw"}]}]}; its test part
    Flickr30k          a csv: image_name| comment_number| comment

Which one a file is, its outermost shape tells; what that format must hold is then checked.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.pairsets import reading
from util.cli import printable
from util.schema import check, read_json

OURS = [{"file": str, "captions": [str], ...: object}]
COCO = {
    "images": [{"id": (int, str), "file_name": str, ...: object}],
    "annotations": [{"image_id": (int, str), "caption": str, ...: object}],
    ...: object,
}
KARPATHY = {
    "images": [
        {"filename": str, "split?": str, "sentences": [{"raw": str, ...: object}], ...: object}
    ],
    ...: object,
}


@dataclass
class Captions:
    """Pictures and their captions."""

    title: str
    """what a table calls them"""
    pictures: list[Path]
    """K of them"""
    texts: list[str]
    """all captions of all pictures (T)"""
    owner: np.ndarray
    """number of each caption's picture, int (T,)"""


def read_captions(source: str, images: str) -> Captions:
    """One of the formats at the top of this file.

    Args: images: folder of the pictures, if not the file's own.
    Raises: FileNotFoundError or ValueError naming what is missing or of another shape.
    """
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"--captions {source}: no such file")
    folder = Path(images) if images else file.parent
    shape = ValueError(
        f"--captions {source}: none of the known formats: a list of {{file, captions}}, COCO's "
        "{images, annotations}, Karpathy's {images: [{filename, sentences}]}, or a csv "
        "image|number|comment"
    )
    if file.suffix == ".csv":
        found = _captions_csv(file, shape)
    else:
        content = read_json(file, object, "--captions")
        if not isinstance(content, list) and not (
            isinstance(content, dict) and "images" in content
        ):
            raise shape
        try:
            found = _captions_json(content)
        except ValueError as error:
            raise ValueError(f"--captions {source}: {error}") from None
    found = {name: texts for name, texts in found.items() if texts}
    texts = [text for group in found.values() for text in group]
    if not texts:
        raise shape
    pictures = [folder / name for name in found]
    missing = next((p for p in pictures if not p.is_file()), None)
    if missing:
        where = f"picture {printable(str(missing))} is missing"
        raise FileNotFoundError(f"--captions {source}: {where}; say where they are with --images")
    owner = np.repeat(np.arange(len(found)), [len(group) for group in found.values()])
    return Captions(printable(file.stem), pictures, texts, owner)


def _captions_json(content: list | dict) -> dict[str, list[str]]:
    """File name → its captions. Raises: ValueError naming the place that is of another shape."""
    found: dict[str, list[str]] = {}
    if isinstance(content, list):
        check(content, OURS)
        for entry in content:  # a file may be listed twice
            found.setdefault(entry["file"], []).extend(entry["captions"])
    elif "annotations" in content:
        check(content, COCO)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        found = {name: [] for name in names.values()}
        for number, annotation in enumerate(content["annotations"]):
            if annotation["image_id"] not in names:
                raise ValueError(f"annotations[{number}].image_id: no image has that id")
            found[names[annotation["image_id"]]].append(annotation["caption"].strip())
    else:
        check(content, KARPATHY)
        for image in content["images"]:
            if image.get("split", "test") == "test":  # the part that models are compared on
                found[image["filename"]] = [sentence["raw"] for sentence in image["sentences"]]
    return found


def _captions_csv(file: Path, shape: ValueError) -> dict[str, list[str]]:
    """Flickr30k's results.csv: ``image_name| comment_number| comment``."""
    found: dict[str, list[str]] = {}
    with reading(file, "--captions") as handle:
        for number, row in enumerate(csv.reader(handle, delimiter="|", quoting=csv.QUOTE_NONE)):
            head = number == 0 and not (len(row) > 1 and row[1].lstrip()[:1].isdigit())
            if not row or head:  # an empty line, or the names of the columns
                continue
            if len(row) == 2:  # the published file lacks one bar: "2199200615.jpg| 4   A dog runs"
                row[1:] = row[1].split(maxsplit=1)
            if len(row) < 3 or not row[1].strip().isdigit():
                raise ValueError(f"{shape}; line {number + 1} is none of it")
            found.setdefault(row[0].strip(), []).append("|".join(row[2:]).strip())
    return found
