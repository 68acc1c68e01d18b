"""PNG grids: what is better looked at than read.

A run leaves what the denoiser draws (`sample_grid`), an evaluation the pairs of the benchmark that
were won and lost (`picture_table`: named columns, and words beside each row). Every function gives
the Pillow image, which a notebook shows, and saves it where a path is given. Pillow only, so that
no plotting library and no screen is needed.
"""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.files import replacing

MARGIN, LINE = 4, 13  # pixels between tiles, height of a line of text


def to_pil(image: Tensor, height: int, width: int | None = None) -> Image.Image:
    """(3, H, W) float in [0, 1] → a Pillow image of the given height, enlarged without smoothing;
    lower than that where it would be wider than `width`."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    scale = height / picture.height
    if width is not None:
        scale = min(scale, width / picture.width)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    # A photograph made smaller without smoothing is a speckle.
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, way)


def labelled_rows(
    rows: list[tuple[str, list[Tensor], list[str]]],
    path: str | Path | None = None,
    height: int = 96,
) -> Image.Image:
    """Rows of tiles.

    Args:
        rows: (label over the row, images (3, H, W) in [0, 1], a caption under each tile or "").
        path: a PNG file to write; None writes nothing.
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
    return _saved(canvas, path)


def _saved(canvas: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        save_png(canvas, path)
    return canvas


def save_png(canvas: Image.Image, path: str | Path) -> None:
    """Written under a temporary name and renamed: never half a picture."""
    with replacing(Path(path)) as file:
        canvas.save(file, format="PNG")


def sample_grid(
    rows: dict[str, Tensor], path: str | Path | None = None, height: int = 96
) -> Image.Image:
    """One labelled row per batch of pictures (B, 3, H, W) in [0, 1]; `path` as above."""
    tiles = [(label, list(batch), []) for label, batch in rows.items()]
    return labelled_rows(tiles, path, height)


def picture_table(
    columns: list[str],
    rows: list[tuple[list[Tensor], list[str]]],
    path: str | Path | None = None,
    height: int = 150,
) -> Image.Image:
    """Pictures under named columns, with words beside each row, in letters that can be read at a
    web page's width.

    Args:
        columns: a name per tile and one for the words; wrapped to the width of a column.
        rows: tiles (3, H, W) in [0, 1], fitted into squares of `height` pixels, and lines of text;
            "" leaves a line free, and a line that is too long ends in dots.
        path: a PNG file to write; None writes nothing.
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
            tile = to_pil(picture, height, width=height)
            left, free = gap + k * (height + gap), height - tile.height
            canvas.paste(tile, (left + (height - tile.width) // 2, top + free // 2))
        for k, text in enumerate(lines):
            place = gap + tiles * (height + gap), top + k * line
            pen.text(place, _cut(text, font, words_width - gap), fill="black", font=font)
    return _saved(canvas, path)


def _cut(text: str, font, width: int) -> str:
    """As much of a line as fits into so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
