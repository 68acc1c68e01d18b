"""The twelve claims, the rule that judges them, and docs/EVIDENCE.md, made from the records alone.

    python benchmarks/ablations.py --report

The rule, fixed before the runs. A claim names arms that should be ahead and arms that should be
behind (or "original": the CLIP before training). Its *effect* is the mean difference in points of
unmentioned pairs, over its arms, over pairs and seeds. Two tests ask whether it is more than
chance: a sign-flip test whose unit is the pair (differences summed over seeds), since the same
pairs are asked each time, and a paired t test whose unit is the seed. The larger of both p values
counts, corrected for twelve claims after Holm. The 95 % interval is the t test's. (Along stage 2
nothing is scaled: that claim has the same verdict as trained and at equal retention.)

    "ahead"      holds       the effect is above 0 with p < 0.05
                 holds not   it is below 0 with p < 0.05, or its interval ends below +1.5 points
    "level"      holds       the interval lies within ±1.5 points
                 holds not   p < 0.05 and the effect is outside ±1.5
    "no worse"   holds       the interval begins above −1.5
                 holds not   the effect is below 0 with p < 0.05 and below −1.5
    otherwise    undecided

Letters: R seeds, K pairs.
"""

import json
import math
import re
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from ablations import ARMS, RECORDS, SEEDS, record_of, stage1_steps
from report import ROOT, each, spread, table
from toy_seeds import sign_flip

from util.files import write_atomically

MARGIN = 1.5  # points: an effect that would matter to nobody
LOST = 0.5  # points of subject zero-shot: where arms are compared at equal retention
PAIRS = 900


@dataclass(frozen=True)
class Claim:
    """What the paper (or this project) says, as arms."""

    title: str
    source: str
    paper: str
    """what the paper measured"""
    ahead: tuple[str, ...]
    behind: tuple[str, ...]
    """arms, each beside the one of `ahead` in the same place"""
    rule: str = "ahead"
    shown: tuple[str, ...] = field(default=())
    """further arms in the claim's table"""
    step: tuple[int, int] = (0, 0)
    """along stage 2: the step that should be ahead, and the other"""
    finding: str = ""
    """what was found, in a sentence; written after the runs"""

    @property
    def arms(self) -> list[str]:
        """Each arm once, those that are compared first."""
        named = dict.fromkeys([*self.ahead, *self.behind, *self.shown])
        return [arm for arm in named if arm != "original"]


BOTH = ("flow", "perceiver")
CLAIMS = (
    Claim(
        "Only [CLS] teaches more than [CLS] + patches",
        "Fig. 5, Key Point #1",
        "10 % of the local tokens already cost most of the gain",
        ahead=BOTH * 3,
        behind=("flow-local10", "perceiver-local10", "flow-local50", "perceiver-local50",
                "flow-local100", "perceiver-local100"),
        finding="The more of them, the less is taught: of 8.0 points of the flow denoiser 10, 50 "
        "and 100 % leave 5.0, 4.1 and 1.2, of the Perceiver's 5.8 they leave 3.9, 2.3 and 0.4. But "
        "10 % (2 of 16 tokens here) leave two thirds.",
    ),
    Claim(
        "Two stages teach more than end to end",
        "Fig. 6, Key Point #2.1",
        "end to end loses more than 5 points",
        ahead=("flow-lambda0",),
        behind=("flow-end-to-end-lambda0",),
        shown=("flow", "flow-end-to-end"),
        finding="Without a drift term two stages lose 15 points of subjects, end to end 44; scaled "
        "back to half a point lost, both keep 2 to 3 points of gain. With it, 300 steps end to end "
        "gain 7.1 points, at the cost at which 800 + 300 steps in two stages gain 8.0.",
    ),
    Claim(
        "Logit-normal times teach more than uniform ones",
        "Tab. 4, Key Point #2.2",
        "31.9 against 21.5; 29.6 against 22.2; 31.9 against 23.7",
        ahead=("flow",),
        behind=("flow-uniform",),
        shown=("flow-scale0.1", "flow-scale0.5", "flow-scale5", "flow-scale10"),
        finding="Uniform times gain no less, and lose 1.0 points of subjects instead of 0.4; at "
        "equal retention seeds decide nothing. The wider the times, the harder the pull: s = 0.1, "
        "0.5, 1, 5, 10 gain 5.2, 6.2, 8.0, 9.9, 9.2; at equal retention 7.9, 8.4, 7.9, 5.0, 4.6.",
    ),
    Claim(
        "A light denoiser teaches as much as a larger one",
        "Tab. 5, Key Point #2.3",
        "41.5, 42.2, 42.2, 41.5 for m = 1 to 4; 41.5, 43.7, 45.2, 43.7 for 2 to 8 layers",
        ahead=BOTH,
        behind=("flow-blocks4", "perceiver-layers8"),
        rule="no worse",
        shown=("flow-blocks2", "flow-blocks3", "perceiver-layers2", "perceiver-layers6"),
        finding="m = 1 to 4 gain 8.0 to 8.3 points, 2 to 8 layers 5.8 to 6.5; at equal retention "
        "the deepest are 0.8 ahead of m = 1 and 4 layers, no more than the seeds differ by.",
    ),
    Claim(
        "Mask ratios 50 to 90 % teach more than 90 %",
        "Tab. S1",
        "28.9 against 25.9; 28.1 with 50 %, 28.9 with 70 %",
        ahead=("perceiver",),
        behind=("perceiver-mask90",),
        shown=("perceiver-mask50", "perceiver-mask70"),
        finding="50, 70, 90 % throughout gain 4.3, 5.0, 7.1 and lose 0.4, 0.6, 1.3 of subjects (a "
        "range: 5.8, 0.7); at equal retention 4.6, 4.8, 5.4 (5.2): more hidden, harder pull.",
    ),
    Claim(
        "LoRA teaches more than direct training",
        "Fig. S2",
        "LoRA is ahead on every backbone",
        ahead=("flow", "flow"),
        behind=("flow-direct", "flow-direct-tenth"),
        finding="Direct training at LoRA's learning rate gains a point more and loses four times "
        "as many subjects; turned down to half its strength it is LoRA's equal.",
    ),
    Claim(
        "Training the denoiser along matters little",
        "Fig. S4",
        "marginal, if stage 1 was long enough",
        ahead=("flow",),
        behind=("flow-all",),
        rule="level",
        finding="Training along gains 1.8 points more and costs hardly more; whether it would "
        "still do so after a longer stage 1 was not tried.",
    ),
    Claim(
        "More steps of stage 2 are not always better",
        "Fig. 1 i",
        "the reconstruction improves on, MMVP does not",
        ahead=("flow-long",),
        behind=("flow-long",),
        rule="no worse",
        step=(400, 1200),
        finding="The gain flattens and does not fall: +8.2, +9.1, +9.6 points after 200, 400, 1200 "
        "steps, while subjects lose about half a point from 100 steps on.",
    ),
    Claim(
        "Both kinds of denoiser teach",
        "Tab. 6, Key Point #3",
        "+12.6 and +9.6 on OpenAI's L/14; +4.4 and +7.4 on SigLIP",
        ahead=BOTH,
        behind=("original", "original"),
        shown=("joint",),
        finding="Every seed gains more than 5 points (joint: with frozen denoisers, as each).",
    ),
    Claim(
        "Light from scratch equals heavy pretrained",
        "Tab. 7",
        "31.9 against 32.6; 37.1 against 37.1",
        ahead=("flow",),
        behind=("flow-heavy",),
        rule="no worse",
        finding="A frozen denoiser 3.3 times as heavy, pretrained on what captions say, gains 0.2 "
        "points more; at equal retention 1.2, within what the seeds differ by.",
    ),
    Claim(
        "A light drift term costs no gain",
        "Eq. (5); this project's λ",
        "λ is not in the paper's experiments",
        ahead=("flow", "perceiver", "joint"),
        behind=("flow-lambda0", "perceiver-lambda0", "joint-lambda0"),
        rule="no worse",
        finding="It costs no gain and saves the subjects: without it 9 to 20 points of them are "
        "lost, and at equal retention 2 to 3 points of gain are left.",
    ),
    Claim(
        "A better generator is not always a better teacher",
        "title; Fig. 1",
        "perfect generation does not always yield optimal representations",
        ahead=("flow",),
        behind=("flow-stage1-2800",),
        rule="no worse",
        shown=("flow-stage1-100", "flow-stage1-200", "flow-stage1-400", "flow-stage1-1400"),
        finding="From 100 to 2800 steps of stage 1 drawings get better throughout (held-out loss "
        "1.12 to 0.30, pairs told apart in them 12 to 42 %). The gain does not: 1.9, 7.0, 7.6, "
        "8.0, 7.5, 6.9. After 200 steps it is nearly whole, long before drawings beat chance; from "
        "800 to 2800 a point is lost, within what the seeds differ by.",
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------
def as_bits(text: str) -> np.ndarray:
    """Which pairs were right, (K,): as evidence.py wrote it."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:PAIRS].astype(float)


@cache
def record(arm: str, seed: int) -> dict | None:
    """None where it was not run."""
    file = record_of(arm, seed)
    return json.loads(file.read_text()) if file.is_file() else None


@cache
def original() -> dict:
    """The CLIP before training: its verdicts, and how well it names subjects."""
    return json.loads((RECORDS / "original.json").read_text())


def point(arm: str, seed: int, step: int = 0) -> dict:
    """As trained: verdicts "unmentioned" and "mentioned" (K,), "subject" in percent, "cosine"."""
    if arm == "original":
        found = {**original(), "cosine": 1.0}
    elif step:
        found = next(p for p in record(arm, seed)["steps"] if p["step"] == step)
    else:
        found = next(p for p in record(arm, seed)["strengths"] if p["strength"] == 1)
    bits = {side: as_bits(found[side]) for side in ("unmentioned", "mentioned")}
    return {**bits, "subject": found["subject"], "cosine": found["cosine"]}


def at_equal_retention(arm: str, seed: int) -> tuple[np.ndarray, float]:
    """Verdicts (K,), between 0 and 1, where the subject has lost `LOST` points for the first time,
    and the strength of that. An arm that never loses so much is read at its greatest strength."""
    base = point("original", seed)
    before = {"strength": 0.0, "lost": 0.0, "right": base["unmentioned"]}
    if arm == "original":
        return before["right"], 0.0
    for p in record(arm, seed)["strengths"]:
        now = {
            "strength": p["strength"],
            "lost": base["subject"] - p["subject"],
            "right": as_bits(p["unmentioned"]),
        }
        if now["lost"] >= LOST:
            share = (LOST - before["lost"]) / (now["lost"] - before["lost"])
            mixed = before["right"] + share * (now["right"] - before["right"])
            return mixed, before["strength"] + share * (now["strength"] - before["strength"])
        before = now
    return before["right"], before["strength"]


def points_gained(arm: str, equal: bool = False, step: int = 0) -> np.ndarray:
    """On unmentioned pairs, seed by seed (R,): as trained, at equal retention, or after `step`
    steps of stage 2. Empty where it was not run."""
    base = point("original", 0)["unmentioned"].mean()
    seeds = [seed for seed in SEEDS if record(arm, seed)]
    right = [
        at_equal_retention(arm, s)[0] if equal else point(arm, s, step)["unmentioned"]
        for s in seeds
    ]
    return np.array([100 * (r.mean() - base) for r in right])


# ------------------------------------------------------------------------------------------------
# The rule
# ------------------------------------------------------------------------------------------------
def differences(claim: Claim, equal: bool) -> np.ndarray | None:
    """Ahead − behind, per seed and pair (R, K); None where a record is missing."""
    arms = {a for a in claim.ahead + claim.behind if a != "original"}
    if any(record(arm, seed) is None for arm in arms for seed in SEEDS):
        return None

    def right(arm: str, seed: int, step: int) -> np.ndarray:
        if equal and not step:
            return at_equal_retention(arm, seed)[0]
        return point(arm, seed, step)["unmentioned"]

    return np.stack([
        np.mean([
            right(a, seed, claim.step[0]) - right(b, seed, claim.step[1])
            for a, b in zip(claim.ahead, claim.behind, strict=True)
        ], axis=0)
        for seed in SEEDS
    ])  # fmt: skip


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Of a mean over R seeds: both ends of its 95 % interval, and the two-sided p of 0.

    Student's t with R − 1 = 4 degrees of freedom has a distribution function in closed form.
    """
    if len(values) != 5:
        raise ValueError(f"{len(values)} seeds: the closed form is that of five")
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = 2.7764451051977987 * error
    if error == 0:
        return values.mean(), values.mean(), float(values.mean() == 0)
    t = abs(values.mean()) / error
    share = t / math.sqrt(4 + t * t)
    p = 1 - share * (1 + 2 / (4 + t * t))
    return values.mean() - half, values.mean() + half, max(0.0, p)


def holm(p: list[float | None], tests: int) -> list[float | None]:
    """Corrected for `tests` tests, of which some may not have been run yet."""
    order = sorted((x, i) for i, x in enumerate(p) if x is not None)
    corrected, least = list(p), 0.0
    for rank, (x, i) in enumerate(order):
        least = max(least, min(1.0, (tests - rank) * x))
        corrected[i] = least
    return corrected


def verdict(rule: str, effect: float, interval: tuple[float, float], p: float) -> str:
    """By the rule at the top of this file."""
    low, high = interval
    if rule == "ahead":
        holds, not_so = effect > 0 and p < 0.05, (effect < 0 and p < 0.05) or high < MARGIN
    elif rule == "level":
        holds = low > -MARGIN and high < MARGIN
        not_so = p < 0.05 and abs(effect) > MARGIN
    else:
        holds, not_so = low > -MARGIN, p < 0.05 and effect < -MARGIN
    return "holds" if holds else "holds not" if not_so else "undecided"


@cache
def judge(equal: bool) -> list[dict | None]:
    """A verdict per claim; None: not run."""
    found: list[dict | None] = []
    for claim in CLAIMS:
        difference = differences(claim, equal)
        if difference is None:
            found.append(None)
            continue
        by_seed = 100 * difference.mean(1)  # (R,)
        low, high, p_seeds = t_interval(by_seed)
        p = max(sign_flip(difference.sum(0)), p_seeds)
        effect = float(by_seed.mean())
        found.append({"effect": effect, "by_seed": by_seed, "interval": (low, high), "p": p})
    corrected = holm([f and f["p"] for f in found], len(CLAIMS))
    for claim, one, p in zip(CLAIMS, found, corrected, strict=True):
        if one:
            one |= {"holm": p, "verdict": verdict(claim.rule, one["effect"], one["interval"], p)}
    return found


# ------------------------------------------------------------------------------------------------
# The document
# ------------------------------------------------------------------------------------------------
def said(one: dict | None) -> str:
    """A verdict in a cell."""
    if one is None:
        return "not run yet"
    low, high = one["interval"]
    interval = f"[{low:+.1f}, {high:+.1f}]"
    return f"**{one['verdict']}** {one['effect']:+.1f} {interval}, p = {one['holm']:.2g}"


def summary() -> list[str]:
    """Twelve rows: the claim, what the paper says, and both verdicts."""
    rows = []
    for i, (claim, trained, equal) in enumerate(
        zip(CLAIMS, judge(False), judge(True), strict=True), 1
    ):
        rows.append([i, claim.title, claim.source, said(trained), said(equal)])
    head = ["", "claim", "source", "as trained", "at equal retention"]
    return table(head, rows)


def arm_row(arm: str) -> list[str]:
    """What an arm gained and cost, over the seeds that were run."""
    seeds = [seed for seed in SEEDS if record(arm, seed)]
    if not seeds:
        return [arm, "not run yet", *[""] * 6]
    base, points = point("original", 0), [point(arm, seed) for seed in seeds]

    known = np.array([100 * (p["mentioned"].mean() - base["mentioned"].mean()) for p in points])
    subject = np.array([p["subject"] - base["subject"] for p in points])
    gain, equal = points_gained(arm), points_gained(arm, equal=True)
    strength = np.mean([at_equal_retention(arm, seed)[1] for seed in seeds])
    costs = [record(arm, seed)["cost"] for seed in seeds]
    seconds = np.mean([c.get("seconds1", 0) + c.get("seconds2", 0) for c in costs])
    trained = max(c.get("trained1", 0) for c in costs) / 1e6
    return [
        arm,
        spread(gain, "+"),
        each(gain),
        spread(known, "+"),
        spread(subject, "+"),
        f"{spread(equal, '+')} at {strength:.2f}",
        f"{seconds:.0f}",
        f"{trained:.2f}" if trained else "",
    ]


HEAD = [
    "arm", "unmentioned", "seed by seed", "mentioned", "subject", "unmentioned at equal retention",
    "seconds of its own stages", "M trained in stage 1",
]  # fmt: skip


def stage2_table(arm: str) -> list[str]:
    """Along stage 2."""
    seeds = [seed for seed in SEEDS if record(arm, seed)]
    rows = []
    for step in ARMS[arm].steps if seeds else ():
        before = point("original", 0)["subject"]
        subject = np.array([point(arm, seed, step)["subject"] - before for seed in seeds])
        rows.append([step, spread(points_gained(arm, step=step), "+"), spread(subject, "+")])
    return ["", *table(["steps of stage 2", "unmentioned", "subject"], rows)] if rows else []


def drawing_table(arms: list[str]) -> list[str]:
    """What stage 1 has learnt to draw, beside what it taught."""
    rows = []
    for arm in arms:
        found = [record(arm, seed) for seed in SEEDS if record(arm, seed)]
        drawn = [r["drawings"] for r in found if "drawings" in r]
        if drawn:
            loss = np.array([d["loss"] for d in drawn])
            pairs = np.array([d["pairs"]["Average"] for d in drawn])
            rows.append([arm, f"{loss.mean():.3f}", spread(pairs), arm_row(arm)[1]])
    told = "pairs told apart in drawings, % (chance 25)"
    head = ["arm", "held-out loss", told, "unmentioned"]
    return ["", *table(head, rows)] if rows else []


def details(i: int, claim: Claim) -> list[str]:
    """One claim with its arms."""
    arms = claim.arms
    about = f"{claim.source}; the paper: {claim.paper}. Rule: {claim.rule}."
    lines = [f"## {i}. {claim.title}", "", about]
    lines += ["", claim.finding] if claim.finding else []
    lines += ["", *table(HEAD, map(arm_row, arms))]
    for arm in arms:
        if ARMS[arm].steps:
            lines += stage2_table(arm)
    if any(arm.startswith("flow-stage1") for arm in arms):
        lines += drawing_table(sorted(arms, key=lambda a: stage1_steps(ARMS[a])))
    return [*lines, ""]


def document() -> str:
    """docs/EVIDENCE.md."""
    done = sum(record(arm, seed) is not None for arm in ARMS for seed in SEEDS)
    about = [
        "# Twelve claims, tried",
        "",
        "Made by `python benchmarks/ablations.py --report` from the records in "
        f"`benchmarks/evidence/`; {done} of {len(ARMS) * len(SEEDS)} runs are there. Toy world, "
        "seeds 1 to 5, the same 900 unmentioned pairs for all. Arms stand at the top of "
        "`benchmarks/ablations.py`, the rule of the verdicts at the top of "
        "`benchmarks/verdicts.py`; both were written before the runs, but for strengths below "
        "0.25, measured afterwards where 0.25 had cost half a point already (that turned claim 2 "
        "at equal retention from undecided into holds not). Points are percentage points of "
        "change. A claim about the full size is not decided by a toy. Where a claim names "
        "several arms, its effect is their mean; each arm stands in the claim's table. Seconds are "
        "of shared cores that were up to ten times as fast on some days as on others: they say "
        "what an arm took, not what it takes beside another.",
        "",
        *summary(),
        "",
    ]
    for i, claim in enumerate(CLAIMS, 1):
        about += details(i, claim)
    return "\n".join(about).rstrip() + "\n"


# ------------------------------------------------------------------------------------------------
# The README
# ------------------------------------------------------------------------------------------------
BLOCK = re.compile(r"(<!-- verdicts -->\n).*?(<!-- end -->)", re.S)


def in_short() -> list[str]:
    """What has been judged, a row each, and what has not."""
    rows, waiting = [], []
    for claim, trained, equal in zip(CLAIMS, judge(False), judge(True), strict=True):
        if trained and equal:
            verdicts = (f"{one['verdict']} ({one['effect']:+.1f})" for one in (trained, equal))
            rows.append([claim.title, claim.source.split(";")[0].split(",")[0], *verdicts])
        else:
            waiting.append(claim.source.split(";")[0].split(",")[0])
    lines = table(["claim", "paper", "as trained", "at equal retention"], rows) if rows else []
    return lines + ([f"\nNot run yet: {'; '.join(waiting)}."] if waiting else [])


def refreshed(readme: str) -> str:
    """The README with these rows."""
    return BLOCK.sub(lambda found: f"{found[1]}{chr(10).join(in_short())}\n{found[2]}", readme)


def write_verdicts() -> None:
    """The document, the README's rows, and the twelve on the terminal."""
    write_atomically(ROOT / "docs" / "EVIDENCE.md", document())
    readme = ROOT / "README.md"
    write_atomically(readme, refreshed(readme.read_text(encoding="utf-8")))
    print("\n".join(summary()))
