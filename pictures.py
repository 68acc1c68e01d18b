"""PNG grids: what is better looked at than read.

Two pictures come out of a run: what the denoiser draws from [CLS] alone (`sample_grid`), and pairs
of the benchmark that were won and lost (`labelled_rows`). Pillow only, so that they need no
plotting library and no screen. This module imports nothing of this project.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LINE = 4, 13  # pixels between tiles, height of a line of text


def to_pil(image: Tensor, height: int) -> Image.Image:
    """(3, H, W) float in [0, 1] → a Pillow image of the given height, enlarged without
    smoothing."""
    array = (
        (image.detach().float().cpu().clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
        .permute(1, 2, 0)
        .numpy()
    )
    picture = Image.fromarray(np.ascontiguousarray(array))
    return picture.resize(
        (round(picture.width * height / picture.height), height), Image.Resampling.NEAREST
    )


def labelled_rows(
    rows: list[tuple[str, list[Tensor], list[str]]], path: Path, height: int = 96
) -> None:
    """Draw rows of tiles and save as PNG.

    Args: rows: (label over the row, images (3, H, W) in [0, 1], a caption under each tile or "").
    """
    font = ImageFont.load_default()
    drawn = [
        (label, [to_pil(image, height) for image in images], captions)
        for label, images, captions in rows
    ]
    captioned = any(any(captions) for _, _, captions in drawn)
    row_height = LINE + height + (LINE if captioned else 0) + MARGIN
    width = max(sum(tile.width + MARGIN for tile in tiles) for _, tiles, _ in drawn) + MARGIN
    widest_label = max(font.getlength(label) for label, _, _ in drawn)
    canvas = Image.new(
        "RGB",
        (int(max(width, widest_label + 2 * MARGIN)), row_height * len(drawn) + MARGIN),
        "white",
    )
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    canvas.save(temporary, format="PNG")
    temporary.replace(path)


def sample_grid(rows: dict[str, Tensor], path: Path, height: int = 96) -> None:
    """One labelled row per batch of pictures (B, 3, H, W) in [0, 1]."""
    labelled_rows([(label, list(batch), []) for label, batch in rows.items()], path, height)
