"""One of the twelve claims as the notebooks show it: its verdicts in words, its arms as bars.

    from claim_figure import draw, tell

    tell(1)  # claim 1 of docs/EVIDENCE.md: both verdicts, then arm by arm
    draw(1)

Everything comes from the records of ablations.py, by the rule of verdicts.py; an arm without
records is "not run yet".
"""

import textwrap

import matplotlib.pyplot as plt
from ablations import ARMS, SEEDS
from verdicts import CLAIMS, judge, points_gained, said, t_interval


def verdict_of(number: int) -> tuple[str, str]:
    """As trained, and at equal retention: each "holds", "holds not", "undecided", "not run yet"."""
    found = [judge(equal)[number - 1] for equal in (False, True)]
    return tuple(one["verdict"] if one else "not run yet" for one in found)


def tell(number: int) -> None:
    """Prints the claim, what the paper measured, both verdicts, and what each arm gained."""
    claim = CLAIMS[number - 1]
    print(f"{claim.title} ({claim.source})\n  the paper: {claim.paper}")
    for words, equal in (("as trained", False), ("at equal retention", True)):
        print(f"  {words}: {said(judge(equal)[number - 1]).replace('**', '')}")
    if claim.finding:
        print(textwrap.fill(claim.finding, 96, initial_indent="  ", subsequent_indent="  "))
    for arm in claim.arms:
        gain = points_gained(arm)
        if not len(gain):
            print(f"  {arm:24} not run yet")
            continue
        print(f"  {arm:24} {gain.mean():+5.1f} points, {len(gain)} seeds: {ARMS[arm].flags}")
        for step in ARMS[arm].steps:
            print(f"  {f'after {step} steps':>24} {points_gained(arm, step=step).mean():+5.1f}")


def draw(number: int) -> None:
    """A bar an arm, as trained and at equal retention: dots are seeds, lines 95 % intervals."""
    arms = CLAIMS[number - 1].arms
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.36 * len(arms)))
    for place, arm in enumerate(arms):
        for offset, equal, color in ((-0.18, False, "C0"), (0.18, True, "C1")):
            gain = points_gained(arm, equal)
            if not len(gain):
                axis.text(0.1, place, "not run yet", va="center", fontsize=9, color="gray")
                break
            axis.barh(place + offset, gain.mean(), 0.34, color=color, alpha=0.4)
            axis.plot(gain, [place + offset] * len(gain), "o", color=color, markersize=3)
            if len(gain) == len(SEEDS):
                axis.plot(t_interval(gain)[:2], [place + offset] * 2, color="black", linewidth=1)
    axis.set_yticks(range(len(arms)), arms, fontsize=9)
    axis.set_xlabel("unmentioned pairs, points. Blue: as trained; orange: at equal retention")
    axis.invert_yaxis()
    figure.tight_layout()
