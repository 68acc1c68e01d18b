"""Who was right, how sure are we, and did it change? The arithmetic behind every table.

A percentage of 135 pairs means little by itself. This file holds the rule that makes a pair count,
the interval that belongs to a proportion, the paired test that belongs to before/after, and the
table that prints all of them together. This module imports nothing of this project.

Letters: K pairs, d width of the joint space.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The nine visual patterns in the order of Tab. 1; other names come after them.
MMVP_PATTERNS = (
    "Orientation",
    "Presence",
    "State",
    "Quantity",
    "Spatial",
    "Color",
    "Structural Character",
    "Text",
    "Camera Perspective",
)


def pair_similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (K, 2, d) of both → cosines (K, 2, 2): rows are texts, columns images."""
    return torch.einsum("ktd,kid->kti", texts, images)


def pair_verdicts(similarity: Tensor) -> dict[str, np.ndarray]:
    """Two images, two texts, text k belongs to image k: who found whom?

    Args: similarity: (K, text, image), of `pair_similarities`.
    Returns: bool (K,) each. "text-to-image": both texts found their image among the two (MMVP's
        rule). "image-to-text": both images found their text. "group": both of it (Winoground).
        All comparisons are strict: a tie is wrong.
    """
    own = torch.stack([similarity[:, 0, 0], similarity[:, 1, 1]], 1)  # (K, 2): what belongs
    of_text = torch.stack([similarity[:, 0, 1], similarity[:, 1, 0]], 1)  # same text, other image
    of_image = of_text.flip(1)  # same image, other text
    t2i, i2t = (own > of_text).all(1).numpy(), (own > of_image).all(1).numpy()
    return {"text-to-image": t2i, "image-to-text": i2t, "group": t2i & i2t}


def similarities(encoder, items: list, template: str) -> Tensor:
    """Of pairs: cosines (K, 2, 2), rows are texts, columns images. Arguments as for `score`."""
    images = encoder.images([image for item in items for image in item.images])
    texts = encoder.texts([template.format(c) for item in items for c in item.captions])
    return pair_similarities(images.view(len(items), 2, -1), texts.view(len(items), 2, -1))


def score(encoder, items: list, template: str) -> dict[str, np.ndarray]:
    """Verdicts by task, bool (K,): "text-to-image", "image-to-text" and "group" for pairs of
    images, "image-to-text" for single ones.

    Args:
        encoder: gives unit vectors for `images` and `texts` (encoder.py).
        items: of one kind, all paired or all single (pairsets.py).
        template: the prompt, with {} for the caption.
    """
    if items[0].paired:
        return pair_verdicts(similarities(encoder, items, template))
    images = encoder.images([image for item in items for image in item.images])
    texts = encoder.texts([template.format(c) for item in items for c in item.captions])
    hits, start = [], 0
    for item, image in zip(items, images, strict=True):
        similarity = texts[start : start + len(item.captions)] @ image  # (captions,)
        hits.append(bool((similarity[0] > similarity[1:]).all()))  # strictly: a tie is wrong
        start += len(item.captions)
    return {"image-to-text": np.array(hits)}


def ridge_probe(features: Tensor, labels: Tensor, test: Tensor, strength: float = 1e-2) -> Tensor:
    """A linear probe in closed form: which class does ridge regression on frozen features see?

    It tells whether the information is there, whatever the text tower makes of it.

    Args: features (K, d) and labels (K,) to fit; test (T, d). Returns: classes (T,).
    """
    train, classes = features.double(), int(labels.max()) + 1
    center, target = train.mean(0), F.one_hot(labels, classes).double()
    train = train - center
    # weights = (XᵀX + λI)⁻¹ Xᵀ Y, one column per class
    eye = torch.eye(train.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(
        train.T @ train + strength * eye, train.T @ (target - target.mean(0))
    )  # (d, classes)
    return ((test.double() - center) @ weights + target.mean(0)).argmax(1)


def wilson_interval(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % confidence interval of a proportion that stays honest near 0 and 1. Returns
    fractions."""
    p, z2 = hits / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar(before: np.ndarray, after: np.ndarray) -> tuple[int, int, float]:
    """Exact paired test. Returns pairs won, pairs lost, two-sided p.

    If nothing had changed, a changed pair would be as likely a win as a loss: a fair coin thrown
    won + lost times. Counted in whole numbers and divided once, so p is exact for any n.
    """
    won, lost = int((~before & after).sum()), int((before & ~after).sum())
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return won, lost, min(1.0, 2 * tail / 2**n)


def paired_interval(won: int, lost: int, n: int, z: float = 1.959963984540054) -> tuple:
    """95 % interval of a change (won − lost) / n between two models on the same n items, after
    Bonett and Price (2012): a pseudo-count on either side keeps it honest where little changed.
    Returns fractions."""
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def noise_line(row: dict) -> list[str]:
    """A warning for every model that differs from the first by less than the noise."""
    lines, (first, *others) = [], row["models"].items()
    for name, m in others:
        low, high = (100 * x for x in paired_interval(m["won"], m["lost"], row["n"]))
        if low <= 0 <= high:
            lines.append(
                f"Within the noise: {name} against {first[0]} is {m['change']:+.1f} points, 95 % "
                f"interval {low:+.1f} to {high:+.1f}. This set cannot rank the two.\n"
            )
    return lines


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------
def summarise(patterns: list[str], hits: dict[str, np.ndarray]) -> list[dict]:
    """Tab. 1's rows: one per pattern and one for the average, every model against the first.

    With equally many pairs per pattern, as in MMVP-VLM, the average of the patterns is hits /
    pairs; otherwise the last row weighs pairs, not patterns, equally, so that its interval is a
    proportion's.

    Args: patterns: one name per pair (K); hits: model name → bool (K,).
    """
    rows, first = [], next(iter(hits))
    order = [p for p in MMVP_PATTERNS if p in patterns] + sorted(set(patterns) - set(MMVP_PATTERNS))
    for pattern in [*order, "Average"]:
        mask = np.array([pattern in (p, "Average") for p in patterns])
        row = {"pattern": pattern, "n": int(mask.sum()), "models": {}}
        for name, verdict in hits.items():
            count = int(verdict[mask].sum())
            low, high = wilson_interval(count, row["n"])
            entry = {
                "hits": count,
                "percent": 100 * count / row["n"],
                "interval": [100 * low, 100 * high],
            }
            if name != first:
                won, lost, p = mcnemar(hits[first][mask], verdict[mask])
                entry |= {"change": 100 * (won - lost) / row["n"], "won": won, "lost": lost, "p": p}
            row["models"][name] = entry
        rows.append(row)
    return rows


def markdown(title: str, rows: list[dict]) -> str:
    """A table for terminals and README alike: percent with interval, and for every model but the
    first its change, the pairs won and lost, and the p of the paired test."""
    names = list(rows[0]["models"])
    head = ["pattern", "n"]
    for i, name in enumerate(names):
        head += [f"{name}, % [95 %]"] + (["change", "won/lost", "McNemar p"] if i else [])
    table = [head]
    for row in rows:
        cells = [row["pattern"], str(row["n"])]
        for i, name in enumerate(names):
            m = row["models"][name]
            cells.append(f"{m['percent']:.1f} [{m['interval'][0]:.1f}, {m['interval'][1]:.1f}]")
            if i:
                cells += [f"{m['change']:+.1f}", f"{m['won']}/{m['lost']}", f"{m['p']:.2g}"]
        table.append(cells)
    return plain_table(title, table)


def plain_table(title: str, table: list[list[str]]) -> str:
    """Markdown whose columns line up in a terminal. The first row is the head."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return f"**{title}**\n\n" + "\n".join(lines) + "\n"
