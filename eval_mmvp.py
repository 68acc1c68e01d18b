"""MMVP-VLM, its like, and the toy benchmark: does CLIP see what it was blind to, and how sure are
we?

    python eval_mmvp.py         toy benchmark: original and newest enhanced model
    python eval_mmvp.py --benchmark MMVP_VLM --model ViT-L-14-quickgelu:openai \\
        --model runs/NAME/enhanced
    python eval_mmvp.py --benchmark winoground.json --model … --template "{}"

Nine patterns, pairs of images that differ in one of them, one statement per image (Tong et al.;
Sec. 5.1, Tab. 1). For each of a pair's two texts: which of the **two images** is more similar? The
pair counts only if both answers are right; a tie is wrong, so that a constant encoder scores 0 and
not everything. Chance is 25 %. Other sets of look-alikes come as JSON
(evaluation/pairsets.py).

What is printed beside the percentage decides whether it means anything. MMVP-VLM has 135 pairs: one
pair is 0.74 points, the standard error at 32 % is 4.0. Hence hits and n, a Wilson 95 % interval,
for before/after the exact McNemar test, which looks only at the pairs whose verdict changed, and a
line where two models differ by less than the noise. MMVP does not notice when image and text tower
drift apart (only two images compete), so the toy run shows what it cost in the same breath; for
real models eval_zeroshot.py does.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluation.encoder import Encoder, cache_folder, load_encoders, open_picture
from evaluation.pairsets import Item, PairSet, apply_doubts, read_pair_set
from evaluation.scoring import MMVP_PATTERNS, markdown, noise_line, plain_table, score, summarise
from toy import benchmark as toy
from util.cli import parse_settings, run_command, setting
from util.files import write_atomically
from util.pictures import labelled_rows

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
def evaluate_toy(
    encoders: list[Encoder], per_pattern: int, seed: int, out: Path
) -> tuple[dict, str]:
    """Unmentioned and mentioned subjects, retention, pictures. Returns results and their text.

    Args: per_pattern: pairs per pattern and side; seed: which benchmark; out: folder of pictures.
    """
    results, text = {}, []
    # What CLIP was blind to, then what it could see already and must not lose.
    for side, mentioned in (("unmentioned", False), ("mentioned", True)):
        items = toy.pairs(mentioned, per_pattern, seed)
        hits = {
            encoder.name: score(encoder, items, toy.TEMPLATE)["text-to-image"]
            for encoder in tqdm(encoders, f"{side} pairs", leave=False)
        }
        results[side] = summarise([item.category for item in items], hits)
        text.append(markdown(f"Toy benchmark, {side} subjects", results[side]))
        text += noise_line(results[side][-1])
        changed_pictures(items, hits, out, f"changed_{side}")
    # The pairs would not notice if image and text tower had drifted apart together with the whole
    # set; naming the subject among eight does.
    scenes = toy.held_out_scenes(seed)
    measured = {e.name: toy.retention(e, scenes) for e in tqdm(encoders, "retention", leave=False)}
    zero_shot = {name: m["zero_shot"] for name, m in measured.items()}
    results["subject_zero_shot"] = summarise(["Subject"] * len(scenes), zero_shot)[:1]
    title = "Retention: zero-shot accuracy on the subject"
    text.append(markdown(title, results["subject_zero_shot"]))
    # Is the information in the features at all (probe), and how far have they moved (cosine)?
    first = measured[encoders[0].name]
    for name, m in measured.items():
        probe = 100 * float(np.mean(list(m["probe"].values())))
        cosine = float(F.cosine_similarity(first["features"], m["features"]).mean())
        results.setdefault("features", {})[name] = {"probe": m["probe"], "cosine_to_first": cosine}
        text.append(
            f"{name}: linear probe of the nine attributes on unmentioned subjects {probe:.1f} %, "
            f"mean cosine to the first model's features {cosine:.4f}\n"
        )
    return results, "\n".join(text)


def evaluate(
    encoders: list[Encoder], pair_set: PairSet, templates: list[str], doubts: str, out: Path
) -> tuple[dict, str]:
    """A pair set: every task it allows, sensitivity to the prompt, doubts, pictures.

    Args:
        templates: the first one counts; more show how far the wording moves the score.
        doubts: a file of labels known to be doubtful ("" for none). Both figures are given: nothing
            is corrected silently.
        out: folder of the pictures.
    Returns: results, and their text.
    """
    results, text = {}, []
    # Two images and one image are different tasks, with different chance: never one table.
    for paired in (True, False):
        items = [item for item in pair_set.items if item.paired == paired]
        if not items:
            continue
        title = f"{pair_set.name}, {len(items)} {'pairs' if paired else 'single images'}"
        found, more = _evaluate_kind(encoders, items, templates, title, out)
        results |= found
        text += more
        if doubts:  # the same again without them; the first prompt will do
            kept = apply_doubts(items, doubts)
            title += f"; without {len(items) - len(kept)} in doubt, {doubts} applied"
            found, more = _evaluate_kind(encoders, kept, templates[:1], title, None)
            results |= {f"{task}, doubts applied": rows for task, rows in found.items()}
            text += more
    return results, "\n".join(text)


def _evaluate_kind(
    encoders: list[Encoder], items: list[Item], templates: list[str], title: str, out: Path | None
) -> tuple[dict, list[str]]:
    """Items of one kind. Returns rows by task, and lines of text. No pictures where out is None."""
    results, text = {}, []
    categories = [item.category for item in items]
    verdicts = {
        t: {e.name: score(e, items, t) for e in tqdm(encoders, "pairs", leave=False)}
        for t in templates
    }
    # "text-to-image" is MMVP's rule and comes first; "image-to-text" and "group" are Winoground's.
    for task in next(iter(verdicts[templates[0]].values())):
        hits = {name: tasks[task] for name, tasks in verdicts[templates[0]].items()}
        rows = results[task] = summarise(categories, hits)
        point = f"one is {100 / len(items):.2f} points"
        text.append(markdown(f"{title}, {task}; prompt {templates[0]!r}; {point}", rows))
        text += noise_line(rows[-1])
        # Which pairs changed can be looked up and looked at; a percentage cannot.
        changed = {}
        (first, before), *others = hits.items()
        for name, after in others:
            won = [items[i].name for i in np.flatnonzero(~before & after)]
            lost = [items[i].name for i in np.flatnonzero(before & ~after)]
            changed[name] = {"won": won, "lost": lost}
            if out and len(won) + len(lost) <= 60:
                text.append(
                    f"{name} against {first}: won {' '.join(won) or 'none'}; "
                    f"lost {' '.join(lost) or 'none'}\n"
                )
        results[f"{task}, changed"] = changed
        if out:
            suffix = "" if task == "text-to-image" else f"_{task}"
            changed_pictures(items, hits, out, f"changed{suffix}")
        if len(templates) > 1:
            averages = {
                name: [100 * float(verdicts[t][name][task].mean()) for t in templates]
                for name in hits
            }
            results[f"{task}, by prompt"] = {"templates": templates, **averages}
            text.append(_prompt_table(task, templates, averages))
    return results, text


def _prompt_table(task: str, templates: list[str], averages: dict[str, list[float]]) -> str:
    """How far the wording of the prompt moves the average: often as far as a method."""
    rows = [["prompt", *averages]]
    for i, template in enumerate(templates):
        rows.append([f"`{template}`", *(f"{values[i]:.1f}" for values in averages.values())])
    rows.append(["spread, max − min", *(f"{max(v) - min(v):.1f}" for v in averages.values())])
    return plain_table(f"Sensitivity to the prompt, {task}", rows)


def paper_table(models: list[str]) -> str:
    """Tab. 1's own rows for the backbones among `models` ("" if there is none). An enhanced
    model's backbone is in its run's config.json."""
    rows = [["paper, Tab. 1", *MMVP_PATTERNS, "Average"]]
    known = []
    for model in models:
        config = Path(model).parent / "config.json"
        if config.is_file():
            model = json.loads(config.read_text()).get("settings", {}).get("clip", "")
        if model in PAPER and model not in known:
            known.append(model)
            for method, row in zip(("original", "DIVA", "GenHancer"), PAPER[model], strict=True):
                rows.append([f"{model} {method}", *row.split()])
    return plain_table("The paper's figures (135 pairs)", rows) if known else ""


# ------------------------------------------------------------------------------------------------
# Pictures of what changed
# ------------------------------------------------------------------------------------------------
def changed_pictures(items: list[Item], hits: dict[str, np.ndarray], out: Path, name: str) -> None:
    """One picture for every model but the first; from the third on, its name is in the file's."""
    (_, before), *others = hits.items()
    for number, (model, after) in enumerate(others):
        suffix = f"_{model.replace('/', '_')}" if number else ""
        changed_picture(items, before, after, out / f"{name}{suffix}.png")


def changed_picture(
    items: list[Item], before: np.ndarray, after: np.ndarray, path: Path, most: int = 5
) -> None:
    """Items won and lost, with images and captions: at most `most` of each, one per pattern.

    Args: before, after: verdicts, bool (K,). Nothing is written where nothing changed.
    """
    rows = []
    changes = {
        "won: wrong before, right after": ~before & after,
        "lost: right before, wrong after": before & ~after,
    }
    for label, mask in changes.items():
        shown, tiles, captions = set(), [], []
        for i in np.flatnonzero(mask):
            # Sets without categories call everything "all": there, any item is its own kind.
            item, kind = items[i], items[i].category if items[i].category != "all" else i
            if kind in shown or len(shown) == most:
                continue
            shown.add(kind)
            tiles += [as_tile(image) for image in item.images]
            texts = item.captions[: len(item.images)]
            captions += [text if len(text) < 21 else text[:19] + "…" for text in texts]
        if tiles:
            rows.append((f"{label} ({int(mask.sum())} pairs)", tiles, captions))
    if rows:
        labelled_rows(rows, path, height=128)


def as_tile(picture) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(open_picture(picture))).permute(2, 0, 1) / 255


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """One evaluation."""

    benchmark: str = setting("toy")
    """'toy', an MMVP-VLM folder, or a JSON file in the format of evaluation/pairsets.py"""
    model: tuple[str, ...] = setting(())
    """open_clip NAME:TAG or NAME:FILE, FILE.safetensors, an enhanced FOLDER or one in transformers'
    layout; repeat to compare with the first; none: the toy CLIP and the newest enhanced model"""
    template: tuple[str, ...] = setting(())
    """prompt with {} for the statement; none: the set's own, 'a photo of {}' for MMVP; repeat to
    see how far the wording moves the score"""
    doubts: str = setting("")
    """JSON {"leave_out": [ids], "swap": [ids]}: labels known to be doubtful; both figures are
    printed"""
    runs: str = setting("runs")
    """where enhanced models are looked for"""
    out: str = setting("")
    """where results go; empty: eval/ beside the last model"""
    pairs: int = setting(100, at_least=1)
    """toy: pairs per pattern and side"""
    seed: int = setting(0, at_least=0)
    """toy: which benchmark; reported figures use 0"""
    cache: str = setting("")
    """where features are kept for the next call; empty: RUNS/features; 'none': nowhere"""


def command_line() -> Settings:
    """Raises: ValueError for settings that do not go together."""
    settings = parse_settings(Settings, *__doc__.split("\n\n")[:2])
    for template in settings.template:
        if "{}" not in template:
            raise ValueError(f"--template {template!r}: put {{}} where the statement goes")
    if settings.benchmark == "toy" and (settings.template or settings.doubts):
        raise ValueError("--template and --doubts are for real benchmarks, not for the toy's")
    return settings


def main() -> None:
    """Mistakes first, models next: a wrong path should not cost the minutes of loading them."""
    settings = command_line()
    pair_set = None if settings.benchmark == "toy" else read_pair_set(settings.benchmark)
    models = settings.model or toy.default_models(Path(settings.runs))
    last = Path(models[-1])  # results belong beside the run that they are about
    beside = last.parent if last.is_dir() else Path(settings.runs)
    out = Path(settings.out) if settings.out else beside / "eval"

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = load_encoders(models, device, cache_folder(settings.cache, settings.runs))
    if not settings.model:
        encoders[0].name, encoders[1].name = "original", "enhanced"
    start = time.time()
    if pair_set is None:
        results, text = evaluate_toy(encoders, settings.pairs, settings.seed, out)
    else:
        templates = list(settings.template) or [pair_set.template]
        results, text = evaluate(encoders, pair_set, templates, settings.doubts, out)
        text += "\n" + paper_table(models) if pair_set.name == "MMVP-VLM" else ""
    about = {
        "benchmark": settings.benchmark,
        "seed": settings.seed,
        "models": {e.name: m for e, m in zip(encoders, models, strict=True)},
        "date": time.strftime("%Y-%m-%d"),
        "device": str(device),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 1),
    }
    print(text)  # the same tables for eyes and README; all figures for programs
    write_atomically(out / "mmvp.json", json.dumps({**about, **results}, indent=1))
    write_atomically(out / "mmvp.md", text)
    pictures = " and pictures of the pairs that changed" if len(encoders) > 1 else ""
    print(f"written: {out}/mmvp.json, mmvp.md{pictures}")


if __name__ == "__main__":
    run_command(main)
