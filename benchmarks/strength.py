"""How strong should the change be? The dial of training/blend.py, turned on the toy benchmark.

    python benchmarks/strength.py --run runs/demo --run runs/demo-perceiver     → strength.md

Every run alone at strengths 0, 0.25, … 2; of runs that differ in their seed alone (NAME-seed1,
NAME-seed2 …) the mean of those curves; of several runs also their average, one model:

    θ = θ0 + s · mean_i (θ_i − θ0)

whose strength goes on until every change is added twice. Both ways to blend are on this one line: n
runs averaged at strength n are the plain sum of their changes, with weight s / n = 1 each.

What training taught is read from the unmentioned pairs, what it cost from mentioned pairs, from
subject zero-shot, and from the cosine to the original feature (toy benchmark 0, and the scenes of
`toy.benchmark.retention`). Nothing is trained and no model is read twice: pictures are made ready
once, texts are encoded once (the text tower is the same in all), and for each strength only the
weights of one image tower are exchanged.

Letters: K pairs, N scenes, C subjects, H W height and width, d width of the joint space.
"""

import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from report import CPU, facts, headline, parser, publish, spread, table
from torch import Tensor
from tqdm import tqdm

from evaluation.encoder import Encoder, open_picture
from evaluation.scoring import compared, pair_similarities, verdicts
from pretrained.backbones import describe_clip, load_clip
from toy.benchmark import TEMPLATE, held_out_scenes, pairs
from toy.world import SUBJECTS, TOY_DIR
from training.blend import blend, folder_of, name_of, originals_of, read_family
from training.preflight import differences
from util.cli import run_command

TOY = str(TOY_DIR / "clip.safetensors")
STRENGTHS = tuple(step / 4 for step in range(9))  # 0, 0.25, … 2
MEASURES = {
    "unmentioned": "unmentioned pairs",
    "mentioned": "mentioned pairs",
    "subject": "subject zero-shot",
}
SIDES = {"unmentioned": False, "mentioned": True}
BATCH = 64  # as in Encoder.images: the same sums in the same order, so the same features


# ------------------------------------------------------------------------------------------------
# What is asked
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Questions:
    """The toy's pictures, ready for the tower, and the texts that they are compared with."""

    pictures: dict[str, Tensor]
    """normalised: both sides (2K, 3, H, W), the two of a pair in turn; "subject" (N, 3, H, W)"""
    captions: dict[str, list[str]]
    """both sides: 2K prompts, caption k for picture k; "subject": C prompts"""
    subjects: np.ndarray
    """what each scene shows, as an index into its prompts (N,)"""


@functools.cache
def questions(per_pattern: int = 100, scenes: int | None = None) -> Questions:
    """Drawn and preprocessed once a process, which takes longer than looking at one model.

    Args: per_pattern: pairs of each pattern and side; scenes: how many, by default all.
    """
    transform = Encoder("toy", *load_clip(TOY)).transform
    items = {side: pairs(told, per_pattern, seed=0) for side, told in SIDES.items()}
    judged = held_out_scenes()[:scenes]
    pictures = {s: [image for item in items[s] for image in item.images] for s in items}
    captions = {s: [TEMPLATE.format(c) for item in items[s] for c in item.captions] for s in items}
    pictures["subject"] = [pixels for _, pixels in judged]
    captions["subject"] = [TEMPLATE.format(subject) for subject in SUBJECTS]
    ready = {s: torch.stack([transform(open_picture(p)) for p in pictures[s]]) for s in pictures}
    return Questions(ready, captions, np.array([SUBJECTS.index(s.subject) for s, _ in judged]))


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------
def measure_strengths(
    original_state: dict[str, Tensor],
    enhanced_states: Sequence[dict[str, Tensor]],
    strengths: Sequence[float],
    asked: Questions | None = None,
    enough: Callable[[dict], bool] = lambda row: False,
) -> list[dict]:
    """What a blend is worth at each strength s: θ0 + s · mean_i (θ_i − θ0).

    Args:
        original_state, enhanced_states: whole toy CLIPs by open_clip's names; one or several.
        strengths: from 0 to 2 n for n models, since a weight s / n goes up to 2.
        asked: by default all of `questions`: K = 900 pairs a side, N = 4500 scenes.
        enough: after a row of which it says so, no stronger one is looked at.
    Returns: for each strength a dict: "strength" s, "weight" s / n, verdicts "unmentioned" (K,),
        "mentioned" (K,) and "subject" (N,), all bool, and "cosine", the mean over scenes of the
        cosine to the original's feature.
    Raises: ValueError as `blend`.
    """
    asked, count = asked or questions(), len(enhanced_states)
    clip, info = load_clip(TOY)
    clip.load_state_dict(original_state)
    judge = Encoder("strength", clip, info, CPU, progress=False)
    texts = {what: judge.texts(captions) for what, captions in asked.captions.items()}
    base = look(clip, asked, texts)
    rows = []
    for strength in tqdm(strengths, "strengths", leave=False, disable=None):
        weight, found = strength / count, base  # at 0 a blend is the original, bit by bit
        if strength:
            clip.load_state_dict(blend(original_state, enhanced_states, [weight] * count))
            found = look(clip, asked, texts)
        cosine = F.cosine_similarity(base["features"], found["features"]).mean()
        verdict = {measure: found[measure] for measure in MEASURES}
        rows.append({"strength": strength, "weight": weight, **verdict, "cosine": float(cosine)})
        if enough(rows[-1]):
            break
    return rows


@torch.no_grad()
def look(clip: torch.nn.Module, asked: Questions, texts: dict[str, Tensor]) -> dict:
    """One model's verdicts, by the rules of eval_mmvp.py and `retention`, and the features (N, d)
    of the scenes. texts: unit vectors of `asked.captions`."""
    features = {
        what: torch.cat([clip.encode_image(part, normalize=True) for part in batch.split(BATCH)])
        for what, batch in asked.pictures.items()
    }
    found: dict = {"features": features["subject"]}
    for side in SIDES:
        both = (features[side].unflatten(0, (-1, 2)), texts[side].unflatten(0, (-1, 2)))  # (K,2,d)
        found[side] = verdicts(pair_similarities(*both))["text-to-image"]
    nearest = (features["subject"] @ texts["subject"].T).argmax(1).numpy()  # (N,)
    return found | {"subject": nearest == asked.subjects}


# ------------------------------------------------------------------------------------------------
# Saying it
# ------------------------------------------------------------------------------------------------
def figures(row: dict, base: dict) -> dict:
    """One row of `measure_strengths` for the JSON: of every measure the percentage, its interval,
    and what the paired comparison with the original, `base`, says."""
    found = {k: row[k] for k in ("strength", "weight", "cosine")}
    for measure in MEASURES:
        found[measure] = compared({"original": base[measure], "blend": row[measure]})["blend"]
    return found


def cells(row: dict) -> list[str]:
    """One line of a table, from `figures`. Points of change stand beside the percentage."""
    line = [f"{row['strength']:g}", f"{row['weight']:.4g}"]
    for measure in MEASURES:
        line.append(f"{row[measure]['percent']:.1f} ({row[measure]['change']:+.1f})")
    return [*line, f"{row['cosine']:.3f}"]


def over_seeds(rows: dict[str, list[dict]]) -> list[str]:
    """Of runs called NAME-seed1, NAME-seed2 …: one curve, mean ± standard deviation."""
    families: dict[str, list] = {}
    for title, group in rows.items():
        if found := re.fullmatch(r"(.+)-seed\d+", title):
            families.setdefault(found[1], []).append(group)
    lines = []
    for family, groups in families.items():
        if len(groups) < 2:
            continue
        table_rows = []
        for same in zip(*groups, strict=True):  # one strength, in every run
            changes = (np.array([row[m]["change"] for row in same]) for m in MEASURES)
            cosine = np.mean([row["cosine"] for row in same])
            line = [f"{same[0]['strength']:g}", *(spread(c, "+") for c in changes)]
            table_rows.append([*line, f"{cosine:.3f}"])
        head = ["strength", *MEASURES.values(), "cosine to the original"]
        title = f"**{family}: each of the {len(groups)} seeds alone, mean change**"
        lines += [title, "", *table(head, table_rows), ""]
    return lines


def strengths_of(count: int) -> list[float]:
    """0 to 2 for the average of `count` models, and 0 to 2 for each change in their sum."""
    return sorted({*STRENGTHS, *(count * strength for strength in STRENGTHS)})


def main() -> None:
    flags = parser(__doc__)
    text = "run of the toy preset, as runs/NAME; repeat for the average and the sum"
    flags.add_argument("--run", action="append", required=True, metavar="RUN", help=text)
    flags.add_argument("--original", default="", help="where the toy's CLIP is, if it was moved")
    args = flags.parse_args()
    folders = [folder_of(run) for run in args.run]
    family = read_family(folders, originals_of(folders, args.original))
    if found := differences(describe_clip(TOY)[0].model_cfg, family.info.model_cfg):
        raise ValueError(f"{folders[0]} is no toy CLIP ({found[0]}): give runs of the toy preset")
    names, states = [name_of(folder) for folder in folders], list(family.enhanced.values())
    if len(set(names)) < len(names):
        raise ValueError(f"--run: two of {', '.join(names)} have the same name; copy one elsewhere")
    groups = {name: [state] for name, state in zip(names, states, strict=True)}
    if len(states) > 1:
        groups[f"average of {' and '.join(names)}"] = states
    asked, rows, seconds = questions(), {}, []
    for title, group in groups.items():
        start, strengths = time.time(), strengths_of(len(group))
        measured = measure_strengths(family.original, group, strengths, asked)
        seconds.append((time.time() - start) / len(strengths))
        rows[title] = [figures(row, measured[0]) for row in measured]
    # The names alone: a report tells no path of the machine.
    command = " ".join(["python benchmarks/strength.py", *(f"--run runs/{name}" for name in names)])
    about = {"command": command, **facts(), "threads": torch.get_num_threads()}
    about["seconds_per_strength"] = float(np.mean(seconds))
    n = {what: len(measured[0][what]) for what in MEASURES}
    first = (
        f"{headline(command, about)}. Percent right (points of change) of {n['unmentioned']} "
        f"unmentioned pairs, {n['mentioned']} mentioned pairs and {n['subject']} scenes. One "
        f"strength takes {about['seconds_per_strength']:.1f} s (threads: {about['threads']})."
    )
    lines = [first, "", *over_seeds(rows)]
    for title, group in rows.items():
        head = ["strength", "weight of each", *MEASURES.values(), "cosine to the original"]
        lines += [f"**{title}**", "", *table(head, map(cells, group)), ""]
    publish("strength", lines, {**about, "rows": rows})


if __name__ == "__main__":
    run_command(main)
