"""pictures.py: tiles land where they should, in their own colours."""

import numpy as np
import torch
from PIL import Image

from util.pictures import LINE, MARGIN, labelled_rows, picture_table, sample_grid, save_png


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


def test_every_function_gives_the_picture_and_writes_only_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    red = flat(1.0, 0, 0)
    made = [
        labelled_rows([("row", [red], [])]),
        sample_grid({"a": torch.rand(2, 3, 8, 8)}),
        picture_table(["one", "words"], [([red], ["beside"])]),
    ]
    assert not list(tmp_path.iterdir()) and all(isinstance(one, Image.Image) for one in made)
    saved = labelled_rows([("row", [red], [])], str(tmp_path / "deep" / "a.png"), 96)
    assert np.array_equal(np.asarray(saved), np.asarray(Image.open(tmp_path / "deep" / "a.png")))
    assert np.array_equal(np.asarray(saved), np.asarray(made[0]))
    save_png(saved, "b.png")
    assert Image.open("b.png").size == saved.size


def test_a_table_takes_tiles_of_any_shape_and_cuts_long_lines():
    wide = torch.tensor([0, 0, 1.0]).view(3, 1, 1).expand(3, 10, 40)
    pixels = np.asarray(
        picture_table(["one", "two", "words"], [([wide, wide], ["W" * 500])], height=100)
    )
    blue = (pixels == (0, 0, 255)).all(2)
    assert set(blue.sum(1)) == {0, 200} and blue.sum() == 2 * 100 * 25, "fitted, not overlapping"
    assert pixels[:, -8:].min() == 255, "nothing is written beyond the edge"


def test_what_is_made_smaller_is_smoothed():
    stripes = torch.zeros(3, 64, 64)
    stripes[:, :, ::2] = 1
    tile = np.asarray(picture_table(["one", "words"], [([stripes], [])], height=16))
    grey = (tile > 60) & (tile < 200)
    assert grey.all(2).sum() > 16 * 8, "neither black nor white alone"
