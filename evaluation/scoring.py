"""Who was right, how sure are we, and did it change? The arithmetic behind every table.

A percentage of 135 pairs means little by itself. This file holds the rule that makes a pair count,
the interval that belongs to a proportion, and the paired test that belongs to before/after.
report.py prints them. This module imports nothing of this project.

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


# ------------------------------------------------------------------------------------------------
# From a model to verdicts: similarities → margins → verdicts
# ------------------------------------------------------------------------------------------------
def score(encoder, items: list, template: str) -> dict[str, np.ndarray]:
    """Who is right? Task → bool (K,).

    Whoever wants to see more than right and wrong takes the same three steps apart:

        before, after = (similarities(encoder, items, template) for encoder in encoders)
        gain = margins(after)["text-to-image"] - margins(before)["text-to-image"]  # (K,)
        verdicts(after)["text-to-image"]  # bool (K,), what this function gives

    Arguments as for `similarities`; the tasks are those of `margins`.
    """
    return verdicts(similarities(encoder, items, template))


def similarities(encoder, items: list, template: str) -> Tensor:
    """Cosines between the texts and the pictures of every item.

    Args:
        encoder: gives unit vectors for `images` and `texts` (encoder.py).
        items: K of one kind, all paired or all single (pairsets.py).
        template: the prompt, with {} for the caption.
    Returns: (K, texts, pictures): (K, 2, 2) for pairs; (K, T, 1) for single pictures, where T is
        the largest number of captions and an item with fewer is filled up with -inf.
    """
    images = encoder.images([image for item in items for image in item.images])
    # Not str.format: a caption may hold braces, and so may the rest of a prompt.
    texts = encoder.texts([template.replace("{}", c) for item in items for c in item.captions])
    if items[0].paired:
        return pair_similarities(images.view(len(items), 2, -1), texts.view(len(items), 2, -1))
    groups = texts.split([len(item.captions) for item in items])
    found = [group @ image for group, image in zip(groups, images, strict=True)]  # (captions,)
    padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-math.inf)
    return padded[:, :, None]


def pair_similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (K, 2, d) of both → cosines (K, 2, 2): rows are texts, columns pictures."""
    return torch.einsum("ktd,kid->kti", texts, images)


def margins(similarity: Tensor) -> dict[str, np.ndarray]:
    """By how much is each item right? Task → (K,), in cosine; wrong where it is not above 0.

    Two pictures, two texts, text k belongs to picture k. An item is as right as its worse half:

    * "text-to-image": text's own picture − the other picture, the smaller of both (MMVP's rule);
    * "image-to-text": picture's own text − the other text, the smaller of both;
    * "group": the smaller of these two (Winoground).

    One picture: only "image-to-text", the first caption − the nearest of the others.

    Args: similarity: (K, texts, pictures), of `similarities`.
    """
    if similarity.shape[2] == 1:
        return {"image-to-text": (similarity[:, 0, 0] - similarity[:, 1:, 0].amax(1)).numpy()}
    own = torch.stack([similarity[:, 0, 0], similarity[:, 1, 1]], 1)  # (K, 2): what belongs
    of_text = torch.stack([similarity[:, 0, 1], similarity[:, 1, 0]], 1)  # same text, other picture
    of_image = of_text.flip(1)  # same picture, other text
    t2i, i2t = (own - of_text).amin(1), (own - of_image).amin(1)
    found = {"text-to-image": t2i, "image-to-text": i2t, "group": torch.minimum(t2i, i2t)}
    return {task: margin.numpy() for task, margin in found.items()}


def verdicts(similarity: Tensor) -> dict[str, np.ndarray]:
    """Right or wrong, bool (K,), by the tasks of `margins`. All comparisons are strict: a tie is
    wrong, so that a constant encoder scores nothing."""
    return {task: margin > 0 for task, margin in margins(similarity).items()}


def margin_and_bias(similarity: Tensor) -> dict[str, np.ndarray]:
    """A pair's four cosines as what was perceived and what stood in its way.

    Text 1 prefers its own picture by d1 = s11 − s12, text 2 by d2 = s22 − s21 (rows texts, columns
    pictures). MMVP's rule wants both above 0. Their sum and difference say why they are not:

    * "margin", m = d1 + d2 = s11 + s22 − s12 − s21: do the texts tell the pictures apart at all?
    * "bias", b = ½ (d1 − d2) = ½ [(s11 − s12) + (s21 − s22)]: how far picture 1 wins both texts;
      below 0 it is picture 2.

    d1 = m/2 + b and d2 = m/2 − b, of which the smaller is m/2 − |b|: right ⇔ m/2 > |b|, ties wrong.

    * "group match", bool: m > 0, the better of two ways to pair texts with pictures, published as a
      metric at ICLR 2026. Chance is 50 %. (`margins`' "group" is Winoground's, and stricter.)
    * "one image wins both" texts, bool: 2 |b| > |m|, so d1 and d2 have opposite signs. Chance is
      50 %. What is neither right nor this prefers the wrong picture twice, or is a tie.

    Args: similarity: (K, 2, 2), of `similarities`.
    Returns: name → (K,), margin and bias in cosine. In float64, where sums and differences of
        float32 cosines are exact (but for those below 1e-8): the identity holds, ties included.
    Raises: ValueError for anything but pairs.
    """
    if tuple(similarity.shape[1:]) != (2, 2):
        raise ValueError(f"margin and bias are of pairs, (K, 2, 2), not {tuple(similarity.shape)}")
    s = similarity.double().numpy()
    of_text1, of_text2 = s[:, 0, 0] - s[:, 0, 1], s[:, 1, 1] - s[:, 1, 0]  # (K,): d1, d2
    m, b = of_text1 + of_text2, (of_text1 - of_text2) / 2
    wins_both = 2 * np.abs(b) > np.abs(m)
    return {"margin": m, "bias": b, "group match": m > 0, "one image wins both": wins_both}


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------
def mean_cosine(first: Tensor, other: Tensor) -> float | None:
    """How near features (K, d) have stayed to the first model's. None where d differs: two spaces
    have no angle between them."""
    if first.shape != other.shape:
        return None
    return float(F.cosine_similarity(first, other, dim=-1).mean())


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
    tail, ways = 0, 1  # ways to choose k of n, from one k to the next
    for k in range(min(won, lost) + 1):
        tail, ways = tail + ways, ways * (n - k) // (k + 1)
    return won, lost, min(1.0, 2 * tail / 2**n)


def paired_interval(won: int, lost: int, n: int, z: float = 1.959963984540054) -> tuple:
    """95 % interval of a change (won − lost) / n between two models on the same n items, after
    Bonett and Price (2012): a pseudo-count on either side keeps it honest where little changed.
    Returns fractions."""
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def bootstrap_interval(
    before: np.ndarray, after: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of median(after) − median(before) between two models on the same items.

    Efron's percentile bootstrap: the items are drawn anew with replacement, as many as there are,
    and the middle 95 % of what `draws` such sets give is the interval. An item takes both its
    values along, so what makes it large for both models cancels.

    Args: before, after: one value an item (K,). Returns: low and high, in the values' unit.
    """
    rng, n, changes = np.random.default_rng(seed), len(before), []
    size = max(1, min(draws, 1_000_000 // n))  # sets at once: 8 MB an array, however many items
    for done in range(0, draws, size):
        drawn = rng.integers(0, n, (min(size, draws - done), n))  # (sets, K)
        changes.append(np.median(after[drawn], axis=1) - np.median(before[drawn], axis=1))
    low, high = np.percentile(np.concatenate(changes), [2.5, 97.5])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------
# Rows: every model against the first
# ------------------------------------------------------------------------------------------------
def compared(hits: dict[str, np.ndarray]) -> dict[str, dict]:
    """Model → verdicts, bool (K,), as model → figures in percent: hits and Wilson interval, and for
    every model but the first what the paired comparison with it says."""
    found, first = {}, next(iter(hits))
    for name, verdict in hits.items():
        count, n = int(verdict.sum()), len(verdict)
        interval = [100 * x for x in wilson_interval(count, n)]
        found[name] = {"hits": count, "percent": 100 * count / n, "interval": interval}
        if name != first:
            won, lost, p = mcnemar(hits[first], verdict)
            interval = [100 * x for x in paired_interval(won, lost, n)]
            change = {"change": 100 * (won - lost) / n, "change_interval": interval}
            found[name] |= {**change, "won": won, "lost": lost, "p": p}
    return found


def by_pattern(patterns: list[str]) -> list[tuple[str, np.ndarray]]:
    """A table's rows in Tab. 1's order, the average last: (name, who is in it, bool (K,))."""
    order = [p for p in MMVP_PATTERNS if p in patterns] + sorted(set(patterns) - set(MMVP_PATTERNS))
    found = [(name, np.array([p == name for p in patterns])) for name in order]
    return [*found, ("Average", np.ones(len(patterns), bool))]


def summarise(patterns: list[str], hits: dict[str, np.ndarray]) -> list[dict]:
    """Tab. 1's rows: one per pattern and one for the average, every model against the first.

    With equally many pairs per pattern, as in MMVP-VLM, the average of the patterns is hits /
    pairs; otherwise the last row weighs pairs, not patterns, equally, so that its interval is a
    proportion's.

    Args: patterns: one name per pair (K); hits: model name → bool (K,).
    """
    rows = []
    for pattern, mask in by_pattern(patterns):
        models = compared({name: verdict[mask] for name, verdict in hits.items()})
        rows.append({"pattern": pattern, "n": int(mask.sum()), "models": models})
    return rows
