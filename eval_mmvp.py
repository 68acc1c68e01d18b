"""MMVP-VLM, its like, and the toy benchmark: does CLIP see what it was blind to, and how sure are
we?

    python eval_mmvp.py         toy benchmark: original and newest enhanced model
    python eval_mmvp.py --benchmark MMVP_VLM --model ViT-L-14-quickgelu:openai \\
        --model runs/NAME/enhanced
    python eval_mmvp.py --benchmark winoground.json --model … --template "{}"

Nine patterns, pairs of images that differ in one of them, one statement per image (Tong et al.;
Sec. 5.1, Tab. 1). For each of a pair's two texts: which of the **two images** is more similar? The
pair counts only if both answers are right; a tie is wrong, so that a constant encoder scores 0 and
not everything. Chance is 25 %. Other sets of look-alikes come as JSON (pairsets.py).

What is printed beside the percentage decides whether it means anything. MMVP-VLM has 135 pairs: one
pair is 0.74 points, the standard error at 32 % is 4.0. Hence hits and n, a Wilson 95 % interval,
for before/after the exact McNemar test, which looks only at the pairs whose verdict changed, and a
line where two models differ by less than the noise. MMVP does not notice when image and text tower
drift apart (only two images compete), so the toy run shows what it cost in the same breath; for
real models eval_zeroshot.py does.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import toyworld
from checkpoints import write_atomically
from cli import OneLineParser, run_command
from judge import Judge, default_models, load_judges, open_picture, ridge_probe
from pairsets import Item, PairSet, apply_doubts, read_pair_set
from pictures import labelled_rows
from scoring import MMVP_PATTERNS, markdown, noise_line, pair_verdicts, plain_table, summarise

PROBE_TRAIN, PROBE_TEST = 3000, 1500  # scenes for the retention measures

# Tab. 1: original, DIVA and GenHancer per pattern in the paper's order, and the average.
PAPER = {
    "ViT-L-14-quickgelu:openai": (
        "13.3 13.3 20.0 20.0 13.3 53.3 20.0 6.7 13.3 19.3",
        "13.3 20.0 40.0 6.7 20.0 53.3 46.7 20.0 13.3 25.9",
        "13.3 33.3 33.3 20.0 6.7 73.3 46.7 20.0 40.0 31.9",
    ),
    "ViT-L-14-336-quickgelu:openai": (
        "0.0 20.0 40.0 20.0 6.7 20.0 33.3 6.7 33.3 20.0",
        "26.7 20.0 33.3 13.3 13.3 46.7 26.7 6.7 40.0 25.2",
        "6.7 20.0 33.3 20.0 6.7 73.3 53.3 26.7 26.7 29.6",
    ),
    "ViT-L-14-quickgelu:metaclip_fullcc": (
        "13.3 6.7 66.7 6.7 33.3 46.7 20.0 6.7 13.3 23.7",
        "6.7 6.7 60.0 0.0 26.7 66.7 20.0 20.0 40.0 27.4",
        "13.3 20.0 53.3 13.3 26.7 80.0 33.3 13.3 33.3 31.9",
    ),
    "ViT-H-14-quickgelu:metaclip_fullcc": (
        "6.7 13.3 60.0 13.3 6.7 53.3 26.7 13.3 33.3 25.2",
        "13.3 20.0 53.3 33.3 13.3 66.7 33.3 13.3 40.0 31.9",
        "20.0 20.0 66.7 26.7 26.7 66.7 33.3 20.0 53.3 37.0",
    ),
    "ViT-SO400M-14-SigLIP:webli": (
        "26.7 20.0 53.3 40.0 20.0 66.7 40.0 20.0 53.3 37.8",
        "13.3 26.7 60.0 46.7 13.3 73.3 53.3 26.7 53.3 40.7",
        "20.0 20.0 66.7 60.0 20.0 86.7 40.0 13.0 53.3 42.2",
    ),
    "ViT-SO400M-14-SigLIP-384:webli": (
        "20.0 26.7 60.0 33.3 13.3 66.7 33.3 26.7 53.3 37.0",
        "26.7 33.3 53.3 26.7 13.3 80.0 40.0 26.7 46.7 38.5",
        "26.7 20.0 66.7 33.3 13.3 86.7 40.0 26.7 46.7 40.0",
    ),
}


# ------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------
def score(judge: Judge, items: list[Item], template: str) -> dict[str, np.ndarray]:
    """Verdicts by task, bool (K,): "text-to-image", "image-to-text" and "group" for pairs of
    images, "image-to-text" for single ones. (A set holds items of one kind; see `evaluate`.)"""
    images = judge.images([image for item in items for image in item.images])
    texts = judge.texts([template.format(c) for item in items for c in item.captions])
    if items[0].paired:
        return pair_verdicts(images.view(len(items), 2, -1), texts.view(len(items), 2, -1))
    hits, start = [], 0
    for item, image in zip(items, images, strict=True):
        similarity = texts[start : start + len(item.captions)] @ image  # (captions,)
        hits.append(bool((similarity[0] > similarity[1:]).all()))  # strictly: a tie is wrong
        start += len(item.captions)
    return {"image-to-text": np.array(hits)}


def toy_items(mentioned: bool, pairs_per_pattern: int, seed: int) -> list[Item]:
    """The toy benchmark as items; pictures are arrays."""
    pairs = toyworld.benchmark(mentioned, pairs_per_pattern, seed)
    return [Item(p.pattern, p.images, p.statements, f"{p.ids[0]}-{p.ids[1]}") for p in pairs]


TOY_TEMPLATE = toyworld.PREFIX + " {}"


# ------------------------------------------------------------------------------------------------
# Retention in the toy world: what was the price?
# ------------------------------------------------------------------------------------------------
def toy_retention(judge: Judge, scenes: list) -> dict:
    """Is "a photo of SUBJECT" nearest for the right subject (bool per scene), and what does a
    linear probe find in the features? The probe is scored on unmentioned subjects: the mentioned
    are easy and would hide what the others gain."""
    features = judge.images([pixels for _, pixels in scenes])  # (scenes, d)
    names = judge.texts([TOY_TEMPLATE.format(s) for s in toyworld.SUBJECTS])  # (S, d)
    subjects = np.array([toyworld.SUBJECTS.index(scene.subject) for scene, _ in scenes])
    zero_shot = (features @ names.T).argmax(1).numpy() == subjects
    probe = {}
    for pattern, values in toyworld.PATTERNS.items():
        labels = torch.tensor([list(values).index(scene[pattern]) for scene, _ in scenes])
        found = ridge_probe(features[:PROBE_TRAIN], labels[:PROBE_TRAIN], features[PROBE_TRAIN:])
        told = toyworld.mentioned_subjects(pattern)
        unmentioned = np.array([scene.subject not in told for scene, _ in scenes[PROBE_TRAIN:]])
        probe[pattern] = float((found == labels[PROBE_TRAIN:]).numpy()[unmentioned].mean())
    return {"zero_shot": zero_shot, "features": features, "probe": probe}


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
    """Items won and lost, at most one per pattern and kind, with images and captions."""
    rows = []
    for label, mask in (
        ("won: wrong before, right after", ~before & after),
        ("lost: right before, wrong after", before & ~after),
    ):
        shown, tiles, captions = set(), [], []
        for i in np.flatnonzero(mask):
            if (items[i].category not in shown or items[i].category == "all") and len(shown) < most:
                shown.add(items[i].category if items[i].category != "all" else i)
                tiles += [
                    torch.from_numpy(np.array(open_picture(im))).permute(2, 0, 1) / 255
                    for im in items[i].images
                ]
                texts = items[i].captions[: len(items[i].images)]
                captions += [s if len(s) < 21 else s[:19] + "…" for s in texts]
        if tiles:
            rows.append((f"{label} ({int(mask.sum())} pairs)", tiles, captions))
    if rows:
        labelled_rows(rows, path, height=128)


# ------------------------------------------------------------------------------------------------
# Evaluations
# ------------------------------------------------------------------------------------------------
def evaluate_toy(
    judges: list[Judge], pairs_per_pattern: int, seed: int, out: Path
) -> tuple[dict, str]:
    """Unmentioned and mentioned subjects, retention, pictures. Returns results and their text."""
    results, text = {}, []
    for side, mentioned in (("unmentioned", False), ("mentioned", True)):
        items = toy_items(mentioned, pairs_per_pattern, seed)
        hits = {
            j.name: score(j, items, TOY_TEMPLATE)["text-to-image"]
            for j in tqdm(judges, f"{side} pairs", leave=False)
        }
        results[side] = summarise([i.category for i in items], hits)
        text.append(markdown(f"Toy benchmark, {side} subjects", results[side]))
        text += noise_line(results[side][-1])
        changed_pictures(items, hits, out, f"changed_{side}")
    held_out = toyworld.ToyScenes(PROBE_TRAIN + PROBE_TEST, seed=31_415_926 + seed)
    scenes = [held_out.scene(i) for i in range(len(held_out))]
    measured = {j.name: toy_retention(j, scenes) for j in tqdm(judges, "retention", leave=False)}
    results["subject_zero_shot"] = summarise(
        ["Subject"] * len(scenes), {n: m["zero_shot"] for n, m in measured.items()}
    )[:1]
    text.append(
        markdown("Retention: zero-shot accuracy on the subject", results["subject_zero_shot"])
    )
    first = measured[judges[0].name]
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
    judges: list[Judge], pair_set: PairSet, templates: list[str], doubts: str, out: Path
) -> tuple[dict, str]:
    """A pair set: every task it allows, sensitivity to the prompt, doubts, pictures. Returns
    results and their text."""
    results, text = {}, []
    for paired in (True, False):
        items = [item for item in pair_set.items if item.paired == paired]
        if not items:
            continue
        title = f"{pair_set.name}, {len(items)} {'pairs' if paired else 'single images'}"
        found, more = _evaluate_kind(judges, items, templates, title, out)
        results |= found
        text += more
        if doubts:
            kept = apply_doubts(items, doubts)
            title += f"; without {len(items) - len(kept)} in doubt, {doubts} applied"
            found, more = _evaluate_kind(judges, kept, templates[:1], title, None)
            results |= {f"{task}, doubts applied": rows for task, rows in found.items()}
            text += more
    return results, "\n".join(text)


def _evaluate_kind(
    judges: list[Judge], items: list[Item], templates: list[str], title: str, out: Path | None
) -> tuple[dict, list[str]]:
    """Items of one kind. Returns rows by task, and lines of text."""
    results, text = {}, []
    categories = [item.category for item in items]
    verdicts = {
        t: {j.name: score(j, items, t) for j in tqdm(judges, "pairs", leave=False)}
        for t in templates
    }
    for task in next(iter(verdicts[templates[0]].values())):
        hits = {name: tasks[task] for name, tasks in verdicts[templates[0]].items()}
        rows = results[task] = summarise(categories, hits)
        point = f"one is {100 / len(items):.2f} points"
        text.append(markdown(f"{title}, {task}; prompt {templates[0]!r}; {point}", rows))
        text += noise_line(rows[-1])
        changed = {}
        (first, before), *others = hits.items()
        for name, after in others:
            won = [items[i].name for i in np.flatnonzero(~before & after)]
            lost = [items[i].name for i in np.flatnonzero(before & ~after)]
            changed[name] = {"won": won, "lost": lost}
            if out and len(won) + len(lost) <= 60:
                text.append(f"{name} against {first}: won {' '.join(won) or 'none'}; lost "
                            f"{' '.join(lost) or 'none'}\n")  # fmt: skip
        results[f"{task}, changed"] = changed
        if out:
            changed_pictures(items, hits, out, "changed" if task == "text-to-image" else
                             f"changed_{task}")  # fmt: skip
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
# Command
# ------------------------------------------------------------------------------------------------
def command_line() -> argparse.Namespace:
    summary, example = __doc__.split("\n\n")[:2]
    parser = OneLineParser(
        description=summary,
        epilog=example,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--benchmark",
        default="toy",
        metavar="SET",
        help="'toy', an MMVP-VLM folder, or a JSON file in the format of pairsets.py",
    )
    add(
        "--model",
        action="append",
        metavar="MODEL",
        help="open_clip NAME:TAG or NAME:FILE, FILE.safetensors, an enhanced FOLDER or one in "
        "transformers' layout; repeat to compare with the first (default: the toy CLIP and the "
        "newest enhanced model)",
    )
    add(
        "--template",
        action="append",
        metavar="TEXT",
        help="prompt with {} for the statement (default: the set's own, 'a photo of {}' for MMVP); "
        "repeat to see how far the wording moves the score",
    )
    add(
        "--doubts",
        default="",
        metavar="FILE",
        help='JSON {"leave_out": [ids], "swap": [ids]}: labels known to be doubtful; both figures '
        "are printed",
    )
    add("--runs", default="runs", help="where enhanced models are looked for (default: runs)")
    add("--out", default="", metavar="DIR", help="where results go (default: eval/ beside the "
        "model)")  # fmt: skip
    add("--pairs", type=int, default=100, help="toy: pairs per pattern and side (default: 100)")
    add("--seed", type=int, default=0, help="toy: which benchmark; reported figures use 0")
    add(
        "--cache",
        default="",
        metavar="DIR",
        help="where features are kept for the next call (default: RUNS/features; 'none': nowhere)",
    )
    args = parser.parse_args()
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs}: at least 1")
    for template in args.template or []:
        if "{}" not in template:
            raise ValueError(f"--template {template!r}: put {{}} where the statement goes")
    if args.benchmark == "toy" and (args.template or args.doubts):
        raise ValueError("--template and --doubts are for real benchmarks, not for the toy's")
    return args


def cache_folder(args: argparse.Namespace) -> Path | None:
    return None if args.cache == "none" else Path(args.cache or Path(args.runs) / "features")


def main() -> None:
    args = command_line()
    pair_set = None if args.benchmark == "toy" else read_pair_set(args.benchmark)
    models = args.model or default_models(Path(args.runs))
    last = Path(models[-1])
    beside = last.parent if last.is_dir() else Path(args.runs)
    out = Path(args.out) if args.out else beside / "eval"

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judges = load_judges(models, device, cache_folder(args))
    if not args.model:
        judges[0].name, judges[1].name = "original", "enhanced"
    start = time.time()
    if pair_set is None:
        results, text = evaluate_toy(judges, args.pairs, args.seed, out)
    else:
        templates = args.template or [pair_set.template]
        results, text = evaluate(judges, pair_set, templates, args.doubts, out)
        text += "\n" + paper_table(models) if pair_set.name == "MMVP-VLM" else ""
    about = {
        "benchmark": args.benchmark,
        "seed": args.seed,
        "models": {j.name: m for j, m in zip(judges, models, strict=True)},
        "date": time.strftime("%Y-%m-%d"),
        "device": str(device),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 1),
    }
    print(text)
    write_atomically(out / "mmvp.json", json.dumps({**about, **results}, indent=1))
    write_atomically(out / "mmvp.md", text)
    print(
        f"written: {out}/mmvp.json, mmvp.md"
        + (" and pictures of the pairs that changed" if len(judges) > 1 else "")
    )


if __name__ == "__main__":
    run_command(main)
