"""The toy benchmark: pairs that differ in one attribute, and what the gain has cost.

    python -m toy.benchmark pairs FOLDER       the pairs on unmentioned subjects, in MMVP-VLM's own
                                               format: what eval_mmvp.py --benchmark reads
    python -m toy.benchmark classes FOLDER     1000 unseen scenes, a folder per subject, and
                                               captions.json: what eval_zeroshot.py reads
    python -m toy.benchmark picture FILE.png   one pair per pattern

MMVP-VLM asks whether CLIP can tell two images apart that differ in one detail. Here the detail is
one of the nine attributes of world.py, and each attribute is asked about twice: on the *mentioned*
subjects, whose captions sometimes name it, and on the *unmentioned* ones, whose captions never do.
The second is what CLIP is blind to; the first, and the subjects themselves, must not be lost.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.encoder import Encoder
from evaluation.pairsets import Item
from evaluation.scoring import ridge_probe
from toy.world import (
    PATTERNS,
    PREFIX,
    SUBJECTS,
    TOY_DIR,
    Scene,
    ToyScenes,
    caption,
    draw,
    mentioned_subjects,
    phrase,
    random_scene,
    to_tensor,
)
from util.cli import printable, run_command
from util.pictures import labelled_rows

TEMPLATE = PREFIX + " {}"
PROBE_TRAIN, PROBE_TEST = 3000, 1500  # scenes for the retention measures


# ------------------------------------------------------------------------------------------------
# Pairs
# ------------------------------------------------------------------------------------------------
def pairs(mentioned: bool, per_pattern: int = 100, seed: int = 0) -> list[Item]:
    """Pairs on subjects that do (or do not) have the attribute in their captions.

    Nuisance is redrawn for the second image, so only meaning tells the two apart. Images are uint8
    arrays (64, 64, 3), captions are statements without the prefix, names are MMVP's "1-2".

    Args: seed: which benchmark; reported figures use 0, choices were made on others.
    """
    items = []
    for number, pattern in enumerate(PATTERNS):
        rng = np.random.default_rng([seed, number, int(mentioned), 271828])
        subjects = [s for s in SUBJECTS if (s in mentioned_subjects(pattern)) == mentioned]
        for k in range(per_pattern):
            scene = random_scene(rng, subjects[k % len(subjects)])
            others = [v for v in PATTERNS[pattern] if v != scene[pattern]]
            twin = scene.replace(pattern, others[rng.integers(len(others))])
            images = draw(scene, rng), draw(twin, rng)
            statements = phrase(scene, [pattern]), phrase(twin, [pattern])
            first = 2 * (number * per_pattern + k) + 1
            items.append(Item(pattern, images, statements, f"{first}-{first + 1}"))
    return items


def write_pairs(items: list[Item], folder: str | Path) -> None:
    """Write pairs as an MMVP-VLM folder: Questions.csv and MMVP_VLM_Images/<Type>/<id>.png.

    MMVP's own pictures are jpg; png keeps ours exact, and the reader takes either.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Question ID", "Type", "Statement"])
        for item in items:
            target = folder / "MMVP_VLM_Images" / item.category
            target.mkdir(parents=True, exist_ok=True)
            numbers = item.name.split("-")
            for number, pixels, text in zip(numbers, item.images, item.captions, strict=True):
                writer.writerow([number, item.category, text])
                Image.fromarray(pixels).save(target / f"{number}.png")


# ------------------------------------------------------------------------------------------------
# Retention: what was the price?
# ------------------------------------------------------------------------------------------------
def held_out_scenes(seed: int = 0) -> list[tuple[Scene, np.ndarray]]:
    """Scenes that no run has trained on, for `retention`."""
    world = ToyScenes(PROBE_TRAIN + PROBE_TEST, seed=31_415_926 + seed)
    return [world.scene(i) for i in range(len(world))]


def retention(encoder: Encoder, scenes: list[tuple[Scene, np.ndarray]]) -> dict:
    """Is "a photo of SUBJECT" nearest for the right subject, and what does a linear probe find in
    the features? The probe is scored on unmentioned subjects: the mentioned are easy and would hide
    what the others gain.

    Returns: "zero_shot", bool per scene; "features" (scenes, d); "probe", accuracy by pattern.
    """
    features = encoder.images([pixels for _, pixels in scenes])  # (scenes, d)
    names = encoder.texts([TEMPLATE.format(s) for s in SUBJECTS])  # (subjects, d)
    subjects = np.array([SUBJECTS.index(scene.subject) for scene, _ in scenes])
    zero_shot = (features @ names.T).argmax(1).numpy() == subjects
    probe = {}
    for pattern, values in PATTERNS.items():
        labels = torch.tensor([list(values).index(scene[pattern]) for scene, _ in scenes])
        found = ridge_probe(features[:PROBE_TRAIN], labels[:PROBE_TRAIN], features[PROBE_TRAIN:])
        told = mentioned_subjects(pattern)
        unmentioned = np.array([scene.subject not in told for scene, _ in scenes[PROBE_TRAIN:]])
        probe[pattern] = float((found == labels[PROBE_TRAIN:]).numpy()[unmentioned].mean())
    return {"zero_shot": zero_shot, "features": features, "probe": probe}


def write_classes(folder: str | Path, count: int = 1000, seed: int = 1_618_033) -> None:
    """Scenes that no run has trained on, as a classification folder (class = subject) with
    captions.json beside: one caption a scene, saying all that captions of its subject ever say.
    A caption that an earlier scene has is left out: nobody could tell whose it is."""
    folder, world, entries, said = Path(folder), ToyScenes(count, seed), [], set()
    for i in range(count):
        scene, pixels = world.scene(i)
        name = f"{scene.subject}/{i:04d}.png"
        (folder / scene.subject).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        text = caption(scene, np.random.default_rng([seed, i]), mention_probability=1.0)
        if text not in said:
            said.add(text)
            entries.append({"file": name, "captions": [text]})
    (folder / "captions.json").write_text(json.dumps(entries, indent=0))


# ------------------------------------------------------------------------------------------------
# What is compared where nobody says, and the command
# ------------------------------------------------------------------------------------------------
def default_models(runs: Path) -> list[str]:
    """The toy CLIP and the enhanced model written last. Raises: FileNotFoundError where there is
    none."""
    found = runs.glob("*/enhanced/open_clip_model.safetensors")
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise FileNotFoundError(
            f"no enhanced model in {runs}/*/enhanced: run python train.py first, or name --model"
        )
    return [str(TOY_DIR / "clip.safetensors"), str(newest.parent)]


def draw_patterns(path: str | Path | None = None) -> Image.Image:
    """One pair of every pattern with its statements, three to a row; saved if there is a path."""
    first = {item.category: item for item in reversed(pairs(False, per_pattern=3, seed=7))}
    rows = []
    for start in range(0, len(PATTERNS), 3):
        items = [first[p] for p in list(PATTERNS)[start : start + 3]]
        tiles = [to_tensor(image) for item in items for image in item.images]
        statements = [text for item in items for text in item.captions]
        rows.append((",  ".join(item.category for item in items), tiles, statements))
    return labelled_rows(rows, path, height=128)


def main() -> None:
    command, *rest = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "pairs" and len(rest) == 1:
        write_pairs(pairs(mentioned=False), rest[0])
        print(printable(f"written: {rest[0]}/Questions.csv, {rest[0]}/MMVP_VLM_Images"))
    elif command == "classes" and len(rest) == 1:
        write_classes(rest[0])
        print(printable(f"written: {rest[0]}, a folder per subject and captions.json"))
    elif command == "picture" and len(rest) == 1:
        draw_patterns(rest[0])
        print(printable(f"written: {rest[0]}"))
    else:
        raise ValueError("expected 'pairs FOLDER', 'classes FOLDER' or 'picture FILE.png'")


if __name__ == "__main__":
    run_command(main)
