"""MMVP-VLM, its like, and the toy benchmark: does CLIP see what it was blind to, and how sure are
we?

    python eval_mmvp.py         toy benchmark: original and newest enhanced model
    python eval_mmvp.py --benchmark MMVP_VLM --model ViT-L-14-quickgelu:openai --model runs/NAME
    python eval_mmvp.py --benchmark winoground.json --model … --template "{}"

Nine patterns, pairs of images that differ in one of them, one statement per image (Tong et al.;
Sec. 5.1, Tab. 1). For each of a pair's two texts: which of the **two images** is more similar? The
pair counts only if both answers are right; a tie is wrong, so that a constant encoder scores 0 and
not everything. Chance is 25 %. Other sets of look-alikes come as JSON (evaluation/pairsets.py).

A pair can be wrong although the difference was seen, since one picture may win both texts. Group
match (chance 50 %) forgives that bias, and the tables of margins show both (evaluation/margins.py).

What is printed beside the percentage decides whether it means anything. MMVP-VLM has 135 pairs: one
pair is 0.74 points, the standard error at 32 % is 4.0. Hence n, the 95 % interval of the change,
the exact McNemar test, which looks only at the pairs whose verdict changed, and a line where two
models differ by less than the noise. MMVP does not notice when image and text tower drift apart
(only two images compete), so the toy run shows what it cost in the same breath; for real models
eval_zeroshot.py does.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.pairsets import Item, PairSet, apply_doubts, read_pair_set
from util.cli import parse_settings, printable, run_command, setting


# ------------------------------------------------------------------------------------------------
# The command line. A mistake in it is answered before PyTorch and open_clip are imported, which
# takes seconds.
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """One evaluation."""

    benchmark: str = setting("toy")
    """'toy', an MMVP-VLM folder, or a JSON file in the format of evaluation/pairsets.py"""
    model: tuple[str, ...] = setting(())
    """open_clip NAME:TAG or NAME:FILE, FILE.safetensors, a run (runs/NAME), an open_clip FOLDER or
    one in transformers' layout; repeat to compare with the first; none: the toy CLIP and the newest
    enhanced model"""
    template: tuple[str, ...] = setting(())
    """prompt with {} for the statement; none: the set's own, 'a photo of {}' for MMVP; repeat to
    see how far the wording moves the score"""
    doubts: str = setting("")
    """JSON {"leave_out": [ids], "swap": [ids]}: labels known to be doubtful; both figures are
    printed"""
    runs: str = setting("runs")
    """where enhanced models are looked for"""
    out: str = setting("")
    """where results go, as DIR/MODEL/BENCHMARK-vs-FIRST.md, .json and pictures, for every model but
    the first; empty: RUNS/NAME/eval/ for enhanced models, RUNS/eval/MODEL/ for others"""
    wide: bool = setting(False)
    """print one table per task with everything about all models, however wide"""
    pairs: int = setting(100, at_least=1, at_most=10_000)
    """toy: pairs per pattern and side"""
    seed: int = setting(0, at_least=0)
    """toy: which benchmark; reported figures use 0"""
    cache: str = setting("")
    """where features are kept for the next call; empty: RUNS/features; 'none': nowhere"""


def command_line() -> tuple[Settings, PairSet | None]:
    """The settings and, but for the toy, what they ask about. Raises: ValueError or OSError for
    settings that do not go together, and as `read_pair_set` and `apply_doubts`."""
    settings = parse_settings(Settings, *__doc__.split("\n\n")[:2])
    for template in settings.template:
        if "{}" not in template:
            raise ValueError(f"--template {template!r}: put {{}} where the statement goes")
    if settings.benchmark == "toy" and (settings.template or settings.doubts):
        raise ValueError("--template and --doubts are for real benchmarks, not for the toy's")
    if settings.benchmark != "toy" and (settings.pairs, settings.seed) != (Settings.pairs, 0):
        raise ValueError("--pairs and --seed draw the toy's pairs; a real benchmark has its own")
    pair_set = None if settings.benchmark == "toy" else read_pair_set(settings.benchmark)
    if settings.doubts:
        apply_doubts(pair_set.items, settings.doubts)
    return settings, pair_set


if __name__ == "__main__":
    run_command(command_line, imports_follow=True)

import numpy as np
import torch
from torch import Tensor

from evaluation import report, results
from evaluation.changed import changed_picture
from evaluation.encoder import (
    Encoder,
    cache_folder,
    check_pictures,
    in_turn,
    load_encoders,
    name_models,
)
from evaluation.margins import margin_picture, margin_rows, match_line
from evaluation.scoring import MMVP_PATTERNS, mean_cosine, similarities, summarise, verdicts
from settings import settings_of_run
from toy import benchmark as toy

# Tab. 1 as printed: original, DIVA and GenHancer per pattern in the paper's order, and the average.
# Each pattern has 15 pairs, so 6.7 points are one pair. (SigLIP's 13.0 is the paper's rounding.)
PAPER = {
    "ViT-L-14-quickgelu:openai": (  # OpenAI, 224 px
        "13.3 13.3 20.0 20.0 13.3 53.3 20.0 6.7 13.3 19.3",
        "13.3 20.0 40.0 6.7 20.0 53.3 46.7 20.0 13.3 25.9",
        "13.3 33.3 33.3 20.0 6.7 73.3 46.7 20.0 40.0 31.9",
    ),
    "ViT-L-14-336-quickgelu:openai": (  # OpenAI, 336 px
        "0.0 20.0 40.0 20.0 6.7 20.0 33.3 6.7 33.3 20.0",
        "26.7 20.0 33.3 13.3 13.3 46.7 26.7 6.7 40.0 25.2",
        "6.7 20.0 33.3 20.0 6.7 73.3 53.3 26.7 26.7 29.6",
    ),
    "ViT-L-14-quickgelu:metaclip_fullcc": (  # MetaCLIP L/14
        "13.3 6.7 66.7 6.7 33.3 46.7 20.0 6.7 13.3 23.7",
        "6.7 6.7 60.0 0.0 26.7 66.7 20.0 20.0 40.0 27.4",
        "13.3 20.0 53.3 13.3 26.7 80.0 33.3 13.3 33.3 31.9",
    ),
    "ViT-H-14-quickgelu:metaclip_fullcc": (  # MetaCLIP H/14
        "6.7 13.3 60.0 13.3 6.7 53.3 26.7 13.3 33.3 25.2",
        "13.3 20.0 53.3 33.3 13.3 66.7 33.3 13.3 40.0 31.9",
        "20.0 20.0 66.7 26.7 26.7 66.7 33.3 20.0 53.3 37.0",
    ),
    "ViT-SO400M-14-SigLIP:webli": (  # SigLIP, 224 px
        "26.7 20.0 53.3 40.0 20.0 66.7 40.0 20.0 53.3 37.8",
        "13.3 26.7 60.0 46.7 13.3 73.3 53.3 26.7 53.3 40.7",
        "20.0 20.0 66.7 60.0 20.0 86.7 40.0 13.0 53.3 42.2",
    ),
    "ViT-SO400M-14-SigLIP-384:webli": (  # SigLIP, 384 px
        "20.0 26.7 60.0 33.3 13.3 66.7 33.3 26.7 53.3 37.0",
        "26.7 33.3 53.3 26.7 13.3 80.0 40.0 26.7 46.7 38.5",
        "26.7 20.0 66.7 33.3 13.3 86.7 40.0 26.7 46.7 40.0",
    ),
}


# ------------------------------------------------------------------------------------------------
# Evaluations
# ------------------------------------------------------------------------------------------------
@dataclass
class Part:
    """One task, asked of every model about the same items."""

    label: str
    """its line in the summary, its key in the JSON, and part of its picture's name"""
    title: str
    """over its tables"""
    rows: list[dict]
    """of scoring.summarise: a row per pattern and the average"""
    items: list[Item] = field(default_factory=list)
    """what can be looked at (K); none for figures without pictures"""
    task: str = ""
    """one of scoring.margins"""
    similarity: dict[str, Tensor] = field(default_factory=dict)
    """model → (K, texts, pictures)"""
    margins: list[dict] = field(default_factory=list)
    """of margins.margin_rows, where MMVP's rule is asked of pairs"""

    def changed(self, first: str, other: str) -> dict[str, list[str]]:
        """Names of the items that `other` won and lost against `first`."""
        before, after = (verdicts(self.similarity[name])[self.task] for name in (first, other))
        sides = {"won": ~before & after, "lost": before & ~after}
        return {k: [self.items[i].name for i in np.flatnonzero(m)] for k, m in sides.items()}


@dataclass
class Found:
    """All that an evaluation has found out."""

    title: str
    """over the summary"""
    parts: list[Part] = field(default_factory=list)
    features: dict[str, dict] = field(default_factory=dict)
    """toy: model → probe by pattern, cosine to the first model's features"""
    prompts: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """task → prompt → model → average, if there is more than one prompt"""


def part_of(label: str, title: str, items: list[Item], task: str, found: dict) -> Part:
    """A part from similarities; found: model → (K, texts, pictures)."""
    hits = {name: verdicts(similarity)[task] for name, similarity in found.items()}
    rows = summarise([item.category for item in items], hits)
    split = margin_rows([i.category for i in items], found) if task == "text-to-image" else []
    return Part(label, title, rows, items, task, found, split)


def evaluate_toy(encoders: list[Encoder], per_pattern: int = 100, seed: int = 0) -> Found:
    """Unmentioned and mentioned subjects, and what it cost.

    Args: per_pattern: pairs per pattern and side; seed: which benchmark.
    """
    found = Found("Toy benchmark, percent right")
    # What CLIP was blind to, then what it could see already and must not lose.
    for side, mentioned in (("unmentioned", False), ("mentioned", True)):
        items = toy.pairs(mentioned, per_pattern, seed)
        similarity = {
            encoder.name: similarities(encoder, items, toy.TEMPLATE)
            for encoder in in_turn(encoders, f"{side} pairs")
        }
        title = f"toy benchmark, {side} subjects"
        found.parts.append(part_of(side, title, items, "text-to-image", similarity))
    # The pairs would not notice if image and text tower had drifted apart together with the whole
    # set; naming the subject among eight does.
    scenes = toy.held_out_scenes(seed)
    measured = {e.name: toy.retention(e, scenes) for e in in_turn(encoders, "retention")}
    zero_shot = {name: m["zero_shot"] for name, m in measured.items()}
    rows = summarise(["Subject"] * len(scenes), zero_shot)[:1]
    title = "retention, naming the subject among eight"
    found.parts.append(Part("subject zero-shot", title, rows))
    # Is the information in the features at all (probe), and how far have they moved (cosine)?
    first = measured[encoders[0].name]["features"]
    for name, m in measured.items():
        cosine = mean_cosine(first, m["features"])
        found.features[name] = {"probe": m["probe"], "cosine_to_first": cosine}
    return found


def evaluate(
    encoders: list[Encoder], pair_set: PairSet, templates: list[str], doubts: str = ""
) -> Found:
    """A pair set: every task it allows, sensitivity to the prompt, doubts.

    Args:
        templates: the first one counts; more show how far the wording moves the score.
        doubts: a file of labels known to be doubtful ("" for none). Both figures are given: nothing
            is corrected silently.
    """
    found = Found(f"{pair_set.name}, percent right; prompt {templates[0]!r}")
    kept = apply_doubts(pair_set.items, doubts) if doubts else []
    # Two images and one image are different tasks, with different chance: never one table.
    for kind, paired in (("pairs", True), ("single images", False)):
        items = [item for item in pair_set.items if item.paired == paired]
        if not items:
            continue
        asked = {
            template: {e.name: similarities(e, items, template) for e in in_turn(encoders, kind)}
            for template in templates
        }
        first = asked[templates[0]]
        # The same again without doubtful labels; the first prompt will do.
        without = [item for item in kept if item.paired == paired]
        again = {e.name: similarities(e, without, templates[0]) for e in encoders if without}
        # "text-to-image" is MMVP's rule and comes first; others are Winoground's.
        for task in verdicts(first[encoders[0].name]):
            # A set may hold both kinds, and this task is asked of both.
            label = task if paired else f"{task}, one image"
            title = f"{pair_set.name}, {len(items)} {kind}, {task}"
            more = f"prompt {templates[0]!r}; one is {100 / len(items):.2f} points"
            found.parts.append(part_of(label, f"{title}; {more}", items, task, first))
            if again:
                swapped = len({*map(id, without)} - {*map(id, items)})
                title += f", {len(items) - len(without)} left out and {swapped} swapped ({doubts})"
                part = part_of(f"{label}, doubts applied", title, without, task, again)
                plain = Part(part.label, part.title, part.rows, margins=part.margins)
                found.parts.append(plain)  # figures, nothing to look at
            if len(templates) > 1:
                found.prompts[label] = {
                    template: {n: 100 * float(verdicts(s)[task].mean()) for n, s in models.items()}
                    for template, models in asked.items()
                }
    return found


# ------------------------------------------------------------------------------------------------
# Saying it
# ------------------------------------------------------------------------------------------------
def text_of(found: Found, names: list[str], wide: bool = False) -> str:
    """Some of the models, the first among them, in tables: the summary first.

    Args: wide: one table per task with everything about every model, instead of one per model.
    """
    first, others = names[0], names[1:]
    parts = {part.label: report.only(part.rows, names) for part in found.parts}
    cosine = {name: about["cosine_to_first"] for name, about in found.features.items()}
    averages = {}
    for part in found.parts:
        averages[f"**{part.label}**"] = parts[part.label][-1]
        if part.margins:
            row = report.only(part.margins, names)[-1]
            averages |= match_line(part.label, row)
    text = [report.legend(names), report.summary(found.title, averages, cosine)]
    if any(part.margins for part in found.parts):
        text.append(report.wrapped(report.MARGINS))
    groups = [others or [first]] if wide else [[name] for name in others or [first]]
    for group in groups:
        for part in found.parts:
            rows = parts[part.label]
            if wide:
                text.append(report.wide_table(part.title, "pattern", rows))
            else:
                text.append(report.pair_table(part.title, "pattern", rows, group[0]))
            for name in group:
                text.append(report.noise_line(rows[-1], name))
                # Which pairs changed can be looked up; a percentage cannot. (The toy's pairs have
                # no files to look up.)
                if name != first and part.items and not found.features:
                    text.append(_changed_line(part, first, name))
                if part.margins:
                    split = report.only(part.margins, names)
                    text.append(report.margin_tables(part.title, split, name))
    text += [_prompt_table(task, asked, names) for task, asked in found.prompts.items()]
    if found.features:
        probes = [
            f"{letter} {100 * float(np.mean(list(found.features[name]['probe'].values()))):.1f} %"
            for name, letter in report.letters(names).items()
        ]
        said = "Linear probe of the nine attributes on unmentioned subjects: " + ", ".join(probes)
        text.append(report.wrapped(said))
    return "\n".join(line for line in text if line)


def _changed_line(part: Part, first: str, other: str) -> str:
    """The pairs won and lost by name, where they are few enough to be read."""
    sides = part.changed(first, other)
    if sum(map(len, sides.values())) > 60:
        return ""
    said = "; ".join(f"{side} {' '.join(names) or 'none'}" for side, names in sides.items())
    first, other = (report.shorten(name, report.NAME) for name in (first, other))
    return report.wrapped(f"{other} against {first}: {said}")


def _prompt_table(task: str, asked: dict[str, dict[str, float]], names: list[str]) -> str:
    """How far the wording of the prompt moves the average: often as far as a method."""
    columns = [[averages[name] for averages in asked.values()] for name in names]
    rows = [["prompt", *report.letters(names).values()]]
    for template, averages in asked.items():
        rows.append([f"`{template}`", *(f"{averages[name]:.1f}" for name in names)])
    rows.append(["spread, max − min", *(f"{max(values) - min(values):.1f}" for values in columns)])
    return report.plain_table(f"Sensitivity to the prompt, {task}", rows)


def paper_table(models: list[str]) -> str:
    """Tab. 1's own rows for the backbones among `models` ("" if there is none), one table each. An
    enhanced model's backbone is in its run's config.json."""
    tables = []
    for backbone in dict.fromkeys(map(backbone_of, models)):
        if backbone not in PAPER:
            continue
        columns = [["paper, Tab. 1", *MMVP_PATTERNS, "Average"]]
        for method, row in zip(("original", "DIVA", "GenHancer"), PAPER[backbone], strict=True):
            columns.append([method, *row.split()])
        lines = [list(line) for line in zip(*columns, strict=True)]
        tables.append(report.plain_table(f"The paper's figures for {backbone} (135 pairs)", lines))
    return "\n".join(tables)


def backbone_of(model: str) -> str:
    """What a run's enhanced model was before; any other model is its own backbone."""
    try:
        return settings_of_run(Path(model).parent).clip
    except (OSError, ValueError, RecursionError):
        return model


def figures(found: Found, names: list[str]) -> dict:
    """All of it for programs: label → rows, and what else was found."""
    first, others = names[0], names[1:]
    content: dict = {}
    for part in found.parts:
        content[part.label] = report.only(part.rows, names)
        if part.items:
            changed = {name: part.changed(first, name) for name in others}
            content[f"{part.label}, changed"] = changed
        if part.margins:
            content[f"{part.label}, margins"] = report.only(part.margins, names)
    if found.features:
        content["features"] = {name: found.features[name] for name in names}
    for label, asked in found.prompts.items():
        content[f"{label}, by prompt"] = {
            prompt: {name: averages[name] for name in names} for prompt, averages in asked.items()
        }
    return content


def pictures(found: Found, first: str, other: str, stem: Path) -> list[Path]:
    """Pairs won and lost, a file a task, and margin against bias where MMVP's rule is asked of
    pairs. Returns: the files that were written."""
    files = []
    for part in found.parts:
        if part.items:
            path = results.with_ending(stem, f"-changed-{results.slug(part.label)}.png")
            before, after = part.similarity[first], part.similarity[other]
            files += changed_picture(part.items, before, after, part.task, path)
            if part.margins:
                path = results.with_ending(stem, f"-margins-{results.slug(part.label)}.png")
                files += margin_picture({first: before, other: after}, part.title, path)
    return files


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------
def main() -> None:
    """Mistakes first, models next: a wrong path should not cost the minutes of loading them."""
    settings, pair_set = command_line()
    chosen = settings.model or toy.default_models(Path(settings.runs))
    models = name_models(chosen)
    folders = results.folders_of(models, settings.out, settings.runs)
    if pair_set is not None:
        check_pictures(image for item in pair_set.items for image in item.images)
    if not settings.model:
        print(printable(f"newest enhanced model: {chosen[-1]}"))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = cache_folder(settings.cache, settings.runs)
    encoders = load_encoders(list(models.values()), device, cache)
    start = time.time()
    if pair_set is None:
        found = evaluate_toy(encoders, settings.pairs, settings.seed)
        # A quick look at few pairs should not take the place of the real thing.
        other = f"-seed{settings.seed}" * (settings.seed != 0)
        what = f"toy{other}" + f"-{settings.pairs}pairs" * (settings.pairs != 100)
        asked = {"seed": settings.seed, "pairs": settings.pairs}
    else:
        templates = list(settings.template) or [pair_set.template]
        found = evaluate(encoders, pair_set, templates, settings.doubts)
        what = Path(settings.benchmark).resolve().name.removesuffix(".json")
        asked = {"templates": templates, "doubts": results.identity(settings.doubts)}
    # What tells this evaluation from others is kept apart from what may differ on another day.
    about = {
        "benchmark": settings.benchmark,
        "date": time.strftime("%Y-%m-%d"),
        "device": str(device),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 1),
    }
    asked = {"command": "eval_mmvp.py", "benchmark": results.identity(settings.benchmark), **asked}

    def said(names: list[str], wide: bool = False) -> str:
        known = pair_set is not None and pair_set.mmvp
        paper = paper_table([models[name] for name in names]) if known else ""
        return text_of(found, names, wide) + ("\n" + paper if paper else "")

    # Tables for eyes and README, all figures for programs, pictures of what changed: for each model
    # its own. They are written before anything is printed, since whoever reads the first lines and
    # closes the pipe ends the command.
    files = []
    for names, stem, evaluation in results.reports(models, folders, what, asked):
        content = {"evaluation": evaluation, **about, **figures(found, names)}
        files += results.write(stem, content, said(names))
        files += pictures(found, names[0], names[-1], stem) if len(names) > 1 else []
    print(said(list(models), settings.wide))
    print(results.written(files))


if __name__ == "__main__":
    run_command(main)
