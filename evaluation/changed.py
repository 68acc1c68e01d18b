"""The pairs that a model won or lost, to look at: what a percentage cannot say.

A verdict flips in a pair that was near a tie as easily as in one that was plainly misjudged. So the
pictures show the pairs whose margin moved most, with the cosines that decide them.

Letters: K items; similarities are (K, texts, pictures), as scoring.similarities gives them.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.encoder import open_picture
from evaluation.pairsets import Item
from evaluation.scoring import margins
from util.pictures import picture_table

MOST = 4  # shown of those won, and of those lost
SIDE = 160  # pixels of a tile: seven lines of text beside it


def moved_most(items: list[Item], moved: np.ndarray, mask: np.ndarray, most: int) -> list[int]:
    """Which to show. First the one that moved most of every pattern, the pattern with most changes
    first; places that are left go to whatever else moved most.

    Args: moved: how far in the direction that is asked about (K,); mask: who may be shown (K,).
    Returns: indices, at most `most`.
    """
    order = [int(i) for i in np.argsort(-moved, kind="stable") if mask[i]]
    by_pattern: dict[str, list[int]] = {}
    for i in order:
        by_pattern.setdefault(items[i].category, []).append(i)
    best = [group[0] for group in sorted(by_pattern.values(), key=len, reverse=True)]
    return [*best, *(i for i in order if i not in best)][:most]


def changed_picture(
    items: list[Item], before: Tensor, after: Tensor, task: str, path: Path
) -> list[Path]:
    """Items won and lost in a task, with pictures, captions and cosines before and after.

    Args: before, after: similarities of the two models; task: one of scoring.margins'.
    Returns: the file, or nothing where nothing changed.
    """
    old, new = margins(before)[task], margins(after)[task]
    won, lost = (old <= 0) & (new > 0), (old > 0) & (new <= 0)
    rows = []
    for label, mask, moved in (("won", won, new - old), ("lost", lost, old - new)):
        for i in moved_most(items, moved, mask, MOST):
            head = f"{label}: {items[i].category} {items[i].name}"
            lines = [f"{head}, margin {old[i]:+.3f} to {new[i]:+.3f}"]
            rows.append(
                ([as_tile(image) for image in items[i].images],
                 lines + cosine_lines(items[i], before[i], after[i], task))
            )  # fmt: skip
    if not rows:
        path.unlink(missing_ok=True)  # of an earlier call: it would be no longer true
        return []
    names = ["first picture", "second picture"] if items[0].paired else ["picture"]
    words = f"{won.sum()} won, {lost.sum()} lost; here: those whose margin moved most (cosines)"
    picture_table([*names, words], rows, path, height=SIDE)
    return [path]


def cosine_lines(item: Item, before: Tensor, after: Tensor, task: str) -> list[str]:
    """Six lines. Of a pair: each text with its own picture and with the other one, or, image-to-
    text, each picture with its own text and with the other. Of one picture: the right caption, and
    the two that come nearest to it.

    Args: before, after: (texts, pictures) of this item.
    """
    lines = []
    if item.paired:
        by_text = task != "image-to-text"
        for k, text in enumerate(item.captions):
            lines.append(f"“{text}”" if by_text else f"{('first', 'second')[k]} picture: “{text}”")
            for when, cosine in (("before", before), ("after", after)):
                own, other = cosine[k, k], cosine[k, 1 - k] if by_text else cosine[1 - k, k]
                sign = ">" if own > other else "<" if own < other else "="
                what = "picture" if by_text else "text"
                lines.append(f"   {when}: its {what} {own:.3f} {sign} {other:.3f} the other")
        return lines
    rivals = torch.maximum(before[1:, 0], after[1:, 0])[: len(item.captions) - 1]
    nearest = 1 + rivals.argsort(descending=True)[:2]
    for k in (0, *nearest.tolist()):
        lines.append(f"{'right' if k == 0 else 'wrong'}: “{item.captions[k]}”")
        lines.append(f"   before {float(before[k, 0]):.3f}, after {float(after[k, 0]):.3f}")
    return lines


def as_tile(picture) -> Tensor:
    """(3, H, W) in [0, 1], no larger than it will be shown."""
    image = open_picture(picture)
    if max(image.size) > 2 * SIDE:
        image.thumbnail((2 * SIDE, 2 * SIDE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
