"""Does a model not see the difference, or does one picture simply win everything?

MMVP's rule is strict: each of a pair's two texts must prefer its own picture. A model can fail it
without being blind. Where one picture is close to every text (its image bias), it takes both texts,
although the two differences between them may be read correctly. scoring.margin_and_bias splits a
pair into a margin m and a bias b, so that it is right exactly when m/2 > |b|. Here that becomes
rows for the tables of report.py, and a picture in which both can be looked at.

Why it matters for before and after: training can raise the score by seeing more (m grows) or by
evening out the pictures (|b| shrinks), and the percentage alone cannot tell which.

Letters: K pairs; similarities are (K, texts, pictures), as scoring.similarities gives them.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evaluation.report import shorten
from evaluation.scoring import bootstrap_interval, by_pattern, compared, margin_and_bias, verdicts
from util.pictures import save_png


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------
def measured(similarity: Tensor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What one model's pairs are measured by, in the order of the tables.

    Args: similarity: (K, 2, 2).
    Returns: name → bool (K,), of which shares are taken; name → cosine (K,), of which medians are.
    """
    right, split = verdicts(similarity), margin_and_bias(similarity)
    shares = {
        "official": right["text-to-image"],  # MMVP's rule; Sec. 5.1, Tab. 1
        "group match": split["group match"],
        "image-to-text": right["image-to-text"],
        "group": right["group"],  # text-to-image and image-to-text; Winoground, Thrush et al. 2022
        "one image wins both": split["one image wins both"],
    }
    return shares, {"half margin": split["margin"] / 2, "bias": np.abs(split["bias"])}


def margin_rows(patterns: list[str], similarity: dict[str, Tensor]) -> list[dict]:
    """A row per pattern and one for the average: every model's measures, and against the first
    model what changed, with its paired interval.

    Args: patterns: one name per pair (K); similarity: model → (K, 2, 2), the first one first.
    Returns: {"pattern", "n", "models": {name: {measure: figures}}}. A share's figures are those of
        scoring.compared, in percent; a median's are "median", "change" and "change_interval", in
        cosine. The measures are those of `measured`; "half margin" is m/2 and "bias" is |b|.
    """
    found = {name: measured(s) for name, s in similarity.items()}
    shares, sizes = next(iter(found.values()))
    rows = []
    for pattern, mask in by_pattern(patterns):
        models: dict[str, dict] = {name: {} for name in found}
        for measure in shares:
            about = compared({name: hits[measure][mask] for name, (hits, _) in found.items()})
            for name, figures in about.items():
                models[name][measure] = figures
        for measure in sizes:
            about = medians({name: values[measure][mask] for name, (_, values) in found.items()})
            for name, figures in about.items():
                models[name][measure] = figures
        rows.append({"pattern": pattern, "n": int(mask.sum()), "models": models})
    return rows


def medians(values: dict[str, np.ndarray]) -> dict[str, dict]:
    """Model → values (K,) as model → median and, for every model but the first, how far it is from
    the first one's. A median, since a few pairs of great margin would carry a mean."""
    found, first = {}, next(iter(values))
    for name, value in values.items():
        found[name] = {"median": float(np.median(value))}
        if name != first:
            change = found[name]["median"] - found[first]["median"]
            interval = list(bootstrap_interval(values[first], value))
            found[name] |= {"change": change, "change_interval": interval}
    return found


def match_line(label: str, row: dict) -> dict[str, dict]:
    """Group match as a line of report.summary, below the line of the part that it belongs to.

    Args: label: the part's, MMVP's rule or a side of the toy's; row: of `margin_rows`.
    """
    _, rule, rest = label.rpartition("text-to-image")
    line = f"group match{rest}" if rule else f"group match, {label}"
    return {line: {**row, "models": {n: m["group match"] for n, m in row["models"].items()}}}


# ------------------------------------------------------------------------------------------------
# The picture: bias across, half the margin up, a point a pair
# ------------------------------------------------------------------------------------------------
WIDTH, HEIGHT = 900, 500  # pixels
FINE = 2  # drawn so many times larger and reduced: Pillow's own edges are jagged
PANELS = ((64, 66, 436, 408), (514, 66, 886, 408))  # left, top, right, bottom
UNIT = "cosine times 100"  # Pillow's own font has no multiplication sign
RIGHT, WRONG, LINE = "#1a62a8", "#d9730d", "#333333"  # blue and orange: told apart by everybody


@dataclass
class Panel:
    """A square of the picture with its own scale. All places are in pixels of the final picture."""

    pen: ImageDraw.ImageDraw
    box: tuple[int, int, int, int]
    """left, top, right, bottom"""
    x: tuple[float, float]
    """smallest and largest, cosine × 100"""
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies, enlarged."""
        left, top, right, bottom = self.box
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return FINE * (left + across * (right - left)), FINE * (bottom - up * (bottom - top))

    def line(self, start: tuple[float, float], end: tuple[float, float], fill: str, wide: int):
        """From value to value, `wide` half pixels."""
        self.pen.line([self.at(*start), self.at(*end)], fill=fill, width=wide)


def margin_picture(similarity: dict[str, Tensor], title: str, path: Path) -> list[Path]:
    """Before and after side by side on one scale: every pair as a point at (b, m/2).

    What lies inside of the V, m/2 > |b|, is right. Above the dashed line (m > 0) is group match: a
    pair between that line and the V is perceived, but its bias is larger than its margin.

    Args: similarity: model → (K, 2, 2), two models; title: over both; path: a PNG file to write.
    Returns: the file.
    """
    split = {name: margin_and_bias(s) for name, s in similarity.items()}
    across = 100 * np.concatenate([found["bias"] for found in split.values()])
    up = 50 * np.concatenate([found["margin"] for found in split.values()])
    # A little room around the outermost points; never an empty scale, and 0 is always in view.
    widest = 1.05 * max(float(np.abs(across).max()), 1e-3)
    room = 0.05 * max(float(up.max() - up.min()), 1e-3)
    low, high = min(float(up.min()), 0.0) - room, max(float(up.max()), 0.0) + room
    canvas = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), "white")
    pen = ImageDraw.Draw(canvas, "RGBA")  # points are a little transparent: crowds are darker
    _words(pen, (WIDTH / 2, 16), shorten(title, 100), 17)
    for box, (name, found) in zip(PANELS, split.items(), strict=True):
        panel = Panel(pen, box, (-widest, widest), (low, high))
        right = verdicts(similarity[name])["text-to-image"]
        _axes(panel)
        _points(panel, found, right)
        _rules(panel)
        shares = [100 * float(hits.mean()) for hits in (right, found["group match"])]
        middle = (box[0] + box[2]) / 2
        _words(pen, (middle, 38), shorten(name, 44), 15)
        said = "right {:.1f} %, group match {:.1f} %".format(*shares)
        _words(pen, (middle, 56), said, 14)
        _words(pen, (middle, box[3] + 34), f"image bias b, {UNIT}", 14)
        _sideways(canvas, (box[0] - 46, (box[1] + box[3]) / 2), f"half margin m/2, {UNIT}")
    _legend(pen)
    save_png(canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), path)
    return [path]


def _axes(panel: Panel) -> None:
    """Grid and numbers."""
    (left, right), (low, high) = panel.x, panel.y
    for x in _ticks(left, right):
        panel.line((x, low), (x, high), "#e6e6e6", FINE)
        place = panel.at(x, low)[0] / FINE, panel.box[3] + 12
        _words(panel.pen, place, f"{x:g}", 13)
    for y in _ticks(low, high):
        panel.line((left, y), (right, y), "#e6e6e6", FINE)
        place = panel.box[0] - 17, panel.at(left, y)[1] / FINE
        _words(panel.pen, place, f"{y:g}", 13)


def _rules(panel: Panel) -> None:
    """What decides, drawn over the crowd: m = 0 dashed, and the two lines |b| = m/2."""
    (left, right), (_, high) = panel.x, panel.y
    for k in range(0, 40, 2):
        start, end = (left + (right - left) * part / 40 for part in (k, k + 1))
        panel.line((start, 0), (end, 0), "#777777", 2 * FINE)
    reach = min(high, right)  # where the V leaves the panel
    for side in (-1, 1):
        panel.line((0, 0), (side * reach, reach), LINE, 2 * FINE)
    corners = [FINE * place for place in panel.box]
    panel.pen.rectangle(corners, outline="#777777", width=FINE)


def _points(panel: Panel, split: dict[str, np.ndarray], right: np.ndarray) -> None:
    """A dot a pair, smaller where there are many."""
    radius = FINE * (2.2 if len(right) > 300 else 3.5)
    for b, m, hit in zip(split["bias"], split["margin"], right, strict=True):
        x, y = panel.at(100 * b, 50 * m)
        place = (x - radius, y - radius, x + radius, y + radius)
        panel.pen.ellipse(place, fill=(RIGHT if hit else WRONG) + "b0")


def _legend(pen: ImageDraw.ImageDraw) -> None:
    """What colours and lines mean, in one line at the foot."""
    for x, colour, text in ((110, RIGHT, "right: m/2 > |b|"), (262, WRONG, "wrong")):
        place = [FINE * v for v in (x - 5, HEIGHT - 25, x + 5, HEIGHT - 15)]
        pen.ellipse(place, fill=colour)
        _words(pen, (x + 12, HEIGHT - 20), text, 14, anchor="lm")
    for x, text in ((344, "the two lines |b| = m/2"), (574, "m = 0: above it, group match")):
        dashes = (0, 22) if text.startswith("the") else (0, 8, 14, 22)
        for start, end in zip(dashes[::2], dashes[1::2], strict=True):
            place = [FINE * v for v in (x + start, HEIGHT - 20, x + end, HEIGHT - 20)]
            pen.line(place, fill=LINE if dashes == (0, 22) else "#777777", width=2 * FINE)
        _words(pen, (x + 30, HEIGHT - 20), text, 14, anchor="lm")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, at most nine: steps of 1, 2 or 5 times a power of 10."""
    rough = (high - low) / 9
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _words(pen, place: tuple[float, float], text: str, size: int, anchor: str = "mm") -> None:
    """Text around a place, or with "lm" to the right of it."""
    font = ImageFont.load_default(FINE * size)
    pen.text((FINE * place[0], FINE * place[1]), text, fill="black", font=font, anchor=anchor)


def _sideways(canvas: Image.Image, place: tuple[float, float], text: str) -> None:
    """Text that reads upwards, around a place."""
    font = ImageFont.load_default(FINE * 14)
    strip = Image.new("RGB", (int(font.getlength(text)) + 4, 20 * FINE), "white")
    middle = strip.width / 2, strip.height / 2
    ImageDraw.Draw(strip).text(middle, text, fill="black", font=font, anchor="mm")
    turned = strip.rotate(90, expand=True)
    x, y = FINE * place[0] - turned.width / 2, FINE * place[1] - turned.height / 2
    canvas.paste(turned, (int(x), int(y)))
