"""Pictures and their captions, for image-text retrieval: four formats, one result.

    this project's     [{"file": "a.jpg", "captions": ["…", "…"]}, …]
    COCO               {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy's split   {"images": [{"filename", "split", "sentences": [{"raw"}]}]}; its test part
    Flickr30k          a csv: image_name| comment_number| comment

This module imports nothing of this project.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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
        try:
            found = _captions_json(json.loads(file.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"--captions {source} is not JSON ({error})") from None
        except (KeyError, TypeError, AttributeError):
            raise shape from None
    found = {name: texts for name, texts in found.items() if texts}
    texts = [text for group in found.values() for text in group]
    if not texts or not all(isinstance(text, str) for text in [*found, *texts]):
        raise shape
    pictures = [folder / name for name in found]
    missing = next((p for p in pictures if not p.is_file()), None)
    if missing:
        raise FileNotFoundError(
            f"--captions {source}: picture {missing} is missing; say where they are with --images"
        )
    owner = np.repeat(np.arange(len(found)), [len(group) for group in found.values()])
    return Captions(file.stem, pictures, texts, owner)


def _captions_json(content) -> dict[str, list[str]]:
    """File name → its captions.

    Raises: KeyError, TypeError or AttributeError where `content` has another shape.
    """
    if isinstance(content, list):  # ours
        # A text alone would come apart into letters.
        texts = [[c] if isinstance(c, str) else c for c in (e["captions"] for e in content)]
        found = {entry["file"]: [] for entry in content}
        for entry, own in zip(content, texts, strict=True):  # a file may be listed twice
            found[entry["file"]] += own
        return found
    if "annotations" in content:  # COCO
        names = {image["id"]: image["file_name"] for image in content["images"]}
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            found[names[annotation["image_id"]]].append(annotation["caption"].strip())
        return found
    return {  # Karpathy's split: only its test part
        image["filename"]: [s["raw"] for s in image["sentences"]]
        for image in content["images"]
        if image.get("split", "test") == "test"
    }


def _captions_csv(file: Path, shape: ValueError) -> dict[str, list[str]]:
    """Flickr30k's results.csv: ``image_name| comment_number| comment``."""
    found: dict[str, list[str]] = {}
    with open(file, newline="", encoding="utf-8-sig") as handle:
        for number, row in enumerate(csv.reader(handle, delimiter="|", quoting=csv.QUOTE_NONE)):
            head = number == 0 and not (len(row) > 1 and row[1].strip().isdigit())
            if not row or head:  # an empty line, or the names of the columns
                continue
            if len(row) < 3:
                raise shape
            found.setdefault(row[0].strip(), []).append("|".join(row[2:]).strip())
    return found
