"""pictures.py: tiles land where they should, in their own colours."""

import numpy as np
import torch
from PIL import Image

from util.pictures import LINE, MARGIN, labelled_rows, sample_grid


def flat(*color):
    return torch.tensor(color).view(3, 1, 1).expand(3, 8, 8)


def test_tiles_in_place(tmp_path):
    rows = [
        ("first", [flat(1.0, 0, 0), flat(0, 1.0, 0)], []),
        ("second", [flat(0, 0, 1.0)], ["below"]),
    ]
    labelled_rows(rows, tmp_path / "deep" / "grid.png", height=32)
    picture = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    middle = MARGIN + LINE + 16
    assert tuple(picture[middle, MARGIN + 16]) == (255, 0, 0)
    assert tuple(picture[middle, MARGIN + 32 + MARGIN + 16]) == (0, 255, 0)
    row_height = LINE + 32 + LINE + MARGIN
    assert tuple(picture[middle + row_height, MARGIN + 16]) == (0, 0, 255)
    caption = picture[row_height + MARGIN + LINE + 33 : row_height + MARGIN + LINE + 45, :40]
    assert caption.min() < 100, "the caption is written under its tile"
    assert not list(tmp_path.rglob("*.tmp"))


def test_sample_grid_has_a_row_per_label(tmp_path):
    batch = torch.rand(4, 3, 16, 16)
    sample_grid({"a": batch, "b": batch, "c": batch}, tmp_path / "s.png", height=48)
    picture = Image.open(tmp_path / "s.png")
    assert picture.height == 3 * (LINE + 48 + MARGIN) + MARGIN
