"""PNG grids: what is better looked at than read.

A run leaves what the denoiser draws (`sample_grid`), an evaluation the pairs of the benchmark that
were won and lost (`labelled_rows`); `picture_table` has named columns and words beside each row.
Pillow only, so that they need no plotting library and no screen. This module imports nothing of
this project.
"""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LINE = 4, 13  # pixels between tiles, height of a line of text


def to_pil(image: Tensor, height: int) -> Image.Image:
    """(3, H, W) float in [0, 1] → a Pillow image of the given height, enlarged without
    smoothing."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    width = round(picture.width * height / picture.height)
    return picture.resize((width, height), Image.Resampling.NEAREST)


def labelled_rows(
    rows: list[tuple[str, list[Tensor], list[str]]], path: Path, height: int = 96
) -> None:
    """Draw rows of tiles and save as PNG.

    Args: rows: (label over the row, images (3, H, W) in [0, 1], a caption under each tile or "").
    """
    font = ImageFont.load_default()
    drawn = [(label, [to_pil(i, height) for i in images], words) for label, images, words in rows]
    captioned = any(any(captions) for _, _, captions in drawn)
    row_height = LINE + height + (LINE if captioned else 0) + MARGIN
    width = max(sum(tile.width + MARGIN for tile in tiles) for _, tiles, _ in drawn) + MARGIN
    widest_label = max(font.getlength(label) for label, _, _ in drawn)
    size = int(max(width, widest_label + 2 * MARGIN)), row_height * len(drawn) + MARGIN
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for number, (label, tiles, captions) in enumerate(drawn):
        top = MARGIN + number * row_height
        pen.text((MARGIN, top), label, fill="black", font=font)
        left = MARGIN
        for tile, text in zip(tiles, captions or [""] * len(tiles), strict=True):
            canvas.paste(tile, (left, top + LINE))
            if text:
                pen.text((left, top + LINE + height + 1), text, fill="black", font=font)
            left += tile.width + MARGIN
    save_png(canvas, path)


def save_png(canvas: Image.Image, path: Path) -> None:
    """Written under a temporary name and renamed: never half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    canvas.save(temporary, format="PNG")
    temporary.replace(path)


def sample_grid(rows: dict[str, Tensor], path: Path, height: int = 96) -> None:
    """One labelled row per batch of pictures (B, 3, H, W) in [0, 1]."""
    labelled_rows([(label, list(batch), []) for label, batch in rows.items()], path, height)


def picture_table(
    columns: list[str], rows: list[tuple[list[Tensor], list[str]]], path: Path, height: int = 150
) -> None:
    """Pictures under named columns, with words beside each row, in letters that can be read at a
    web page's width.

    Args:
        columns: a name per tile and one for the words; wrapped to the width of a column.
        rows: tiles (3, H, W) in [0, 1], square, and lines of text; "" leaves a line free.
    """
    gap, line, words_width = 12, 22, 470
    font, bold = ImageFont.load_default(16), ImageFont.load_default(17)
    heads = [textwrap.wrap(name, 18) for name in columns[:-1]] + [textwrap.wrap(columns[-1], 54)]
    head = line * max(map(len, heads)) + gap
    tiles = len(columns) - 1
    size = tiles * (height + gap) + words_width + gap, head + len(rows) * (height + gap) + gap
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for number, lines in enumerate(heads):
        for k, text in enumerate(lines):
            place = gap + number * (height + gap), gap // 2 + k * line
            pen.text(place, text, fill="#124", font=bold)
    for number, (pictures, lines) in enumerate(rows):
        top = head + number * (height + gap)
        for k, picture in enumerate(pictures):
            canvas.paste(to_pil(picture, height), (gap + k * (height + gap), top))
        for k, text in enumerate(lines):
            place = gap + tiles * (height + gap), top + k * line
            pen.text(place, text, fill="black", font=font)
    save_png(canvas, path)
