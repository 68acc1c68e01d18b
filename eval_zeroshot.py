"""Retention: what did the enhancement cost? Zero-shot classification, retrieval, drift.

    python eval_zeroshot.py --model ORIGINAL --model ENHANCED --classify FOLDER
    python eval_zeroshot.py --model … --classify cifar100 --root DATA --captions captions.json
    python eval_zeroshot.py --model … --classify FOLDER --probe --layers

Post-training moves the image tower; the text tower stays. MMVP cannot notice when the two drift
apart, since only two images compete there; a thousand class names can. The paper reports that
nothing is lost (Tab. 3); users of the released weights found ImageNet accuracy nearly halved. So
every figure here stands beside that of the first model, on the same pictures, with the interval of
the *change* and the exact McNemar test.

    --classify   class names against pictures: a folder with one directory per class, or cifar100,
                 sun397, cars, imagenet as torchvision reads them from --root
    --captions   image-text retrieval, recall@1/5/10 both ways: this project's captions.json,
                 COCO's captions_*.json, Karpathy's dataset_flickr30k.json, or Flickr30k's csv
    --probe      a linear probe on frozen features (with --classify): tells "the information is
                 there" from "the text tower understands it"
    --layers     where in the tower it moved

Letters: K pictures, T texts, C classes, d width of the joint space.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from util.cli import parse_settings, printable, run_command, setting


# ------------------------------------------------------------------------------------------------
# The command line. A mistake in it is answered before PyTorch and open_clip are imported, which
# takes seconds.
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """One evaluation."""

    model: tuple[str, ...] = setting(())
    """as for eval_mmvp.py; repeat it; none: the toy CLIP and the newest enhanced model"""
    classify: tuple[str, ...] = setting(())
    """a folder with a directory per class, or cifar100, sun397, cars, imagenet; repeat for more"""
    root: str = setting("data")
    """where torchvision's data sets lie"""
    template: str = setting("imagenet80")
    """imagenet80, imagenet7, or a text with {} for the class"""
    captions: tuple[str, ...] = setting(())
    """captions for retrieval, in one of four formats; repeat for more"""
    images: str = setting("")
    """where the captions' pictures are; empty: beside the captions"""
    probe: bool = setting(False)
    """linear probe beside each --classify"""
    layers: bool = setting(False)
    """drift after each layer of the image tower"""
    runs: str = setting("runs")
    """where enhanced models are looked for"""
    out: str = setting("")
    """where results go, as DIR/MODEL/zeroshot-SETS-vs-FIRST.md and .json, for every model but the
    first; empty: RUNS/NAME/eval/ for enhanced models, RUNS/eval/MODEL/ for others"""
    wide: bool = setting(False)
    """print Tab. 3's layout with everything about all models in one table, however wide"""
    cache: str = setting("")
    """where features are kept; empty: RUNS/features; 'none': nowhere"""


def command_line() -> Settings:
    """Raises: ValueError for settings that do not go together."""
    settings = parse_settings(Settings, *__doc__.split("\n\n")[:2])
    if not settings.classify and not settings.captions:
        raise ValueError("nothing to do: give --classify SET, --captions FILE, or both")
    if settings.layers and len(settings.model) == 1:
        raise ValueError("--layers compares models: give --model twice")
    if settings.template != Settings.template and not settings.classify:
        raise ValueError("--template needs --classify: captions are sentences already")
    if settings.probe and not settings.classify:
        raise ValueError("--probe needs --classify: a probe is fitted to classes")
    return settings


if __name__ == "__main__":
    run_command(command_line, imports_follow=True)

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from data import SUFFIXES
from evaluation import report, results
from evaluation.captions import Captions, read_captions
from evaluation.cifar100 import read_cifar100
from evaluation.encoder import (
    Encoder,
    cache_folder,
    check_pictures,
    in_turn,
    load_encoders,
    name_models,
)
from evaluation.scoring import compared, mean_cosine, ridge_probe
from toy import benchmark as toy

# CIFAR-100, SUN397, Cars and ImageNet are four of the nine sets of Tab. 3.
DATASETS = ("cifar100", "sun397", "cars", "imagenet")
AT = (1, 5, 10)  # k of recall@k
BLOCK = 1024  # texts that are compared with all pictures at once


# ------------------------------------------------------------------------------------------------
# Pictures with classes
# ------------------------------------------------------------------------------------------------
@dataclass
class Classes:
    """Labelled pictures."""

    title: str
    """what a table calls them"""
    pictures: list
    """files, or uint8 arrays (H, W, 3); K of them"""
    labels: np.ndarray
    """number of each picture's class, int (K,)"""
    names: list[str]
    """what the classes are called in a prompt (C)"""


def read_classes(source: str, root: str) -> Classes:
    """A folder with one directory per class, or one of torchvision's data sets.

    Raises: FileNotFoundError or ValueError naming what is missing.
    """
    if source in DATASETS:
        return _torchvision(source, Path(root))
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--classify {source}: no folder, and none of {', '.join(DATASETS)}"
        )
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    if len(classes) < 2:
        raise ValueError(
            f"--classify {source}: needs a directory per class, at least two; found {len(classes)}"
        )
    pictures, labels = [], []
    for label, directory in enumerate(classes):
        # A file, for a pipe of that name would be waited for.
        found = (p for p in directory.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        files = sorted(p for p in found if p.name[0] != ".")  # hidden: as in data.py
        if not files:
            raise ValueError(f"--classify {source}: class folder {directory.name} has no pictures")
        pictures += files
        labels += [label] * len(files)
    names = [printable(p.name.replace("_", " ")) for p in classes]  # also those that are no UTF-8
    return Classes(printable(Path(os.path.abspath(folder)).name), pictures, np.array(labels), names)


def _torchvision(name: str, root: Path) -> Classes:
    """The test split as torchvision reads it from the disk; nothing is downloaded."""
    import torchvision.datasets as tv

    try:
        if name == "cifar100":  # whose pickles torchvision would let run anything
            pixels, labels, classes = read_cifar100(root)
            names = [n.replace("_", " ") for n in classes]
            return Classes("CIFAR-100", list(pixels), np.array(labels), names)
        if name == "sun397":
            data = tv.SUN397(str(root))
            names = [n.replace("_", " ").replace("/", " ") for n in data.classes]
            return Classes("SUN397", list(data._image_files), np.array(data._labels), names)
        if name == "cars":
            data = tv.StanfordCars(str(root), split="test")
            files, labels = zip(*data._samples, strict=True)
            return Classes("Cars", list(files), np.array(labels), data.classes)
        # torchvision's own class names are WordNet's; open_clip's are those CLIP is judged by.
        data = tv.ImageNet(str(root), split="val")
        files, labels = zip(*data.samples, strict=True)
        return Classes("IN-1K", list(files), np.array(labels), list(IMAGENET_CLASSNAMES))
    except Exception as error:  # its readers, scipy's and pickle's raise many kinds
        raise ValueError(
            f"--classify {name}: torchvision does not find it under --root {root} "
            f"({' '.join(str(error).partition(' You can use')[0].split())[:150]})"
        ) from None


def class_texts(encoder: Encoder, names: list[str], templates: list) -> Tensor:
    """One direction per class: the mean of its prompts' unit vectors, made a unit vector again.

    Averaging over many wordings takes away what is peculiar to each: OpenAI's recipe for Tab. 3's
    kind of figures. Returns: (C, d).
    """
    texts = [t(name) if callable(t) else t.replace("{}", name) for name in names for t in templates]
    each = encoder.texts(texts).view(len(names), len(templates), -1)  # (C, templates, d)
    return F.normalize(each.mean(1), dim=-1)


def prompts(kind: str) -> list:
    """open_clip's ImageNet templates (80, or the 7 that do nearly as well), or one of your own."""
    known = {"imagenet80": OPENAI_IMAGENET_TEMPLATES, "imagenet7": SIMPLE_IMAGENET_TEMPLATES}
    if kind in known:
        return list(known[kind])
    if "{}" not in kind:
        raise ValueError(
            f"--template {kind!r}: imagenet80, imagenet7, or a text with {{}} for the class"
        )
    return [kind]


# ------------------------------------------------------------------------------------------------
# What a model is asked
# ------------------------------------------------------------------------------------------------
def retrieval_hits(images: Tensor, texts: Tensor, owner: np.ndarray) -> dict[str, np.ndarray]:
    """Was the right one among the k nearest?

    Args: images (K, d), texts (T, d): unit vectors; owner (T,).
    Returns: "image@k": for each text (T,), its picture is among the k nearest pictures;
        "text@k": for each picture (K,), one of its captions is among the k nearest captions.
        A tie counts against: whoever scores as high as the right one stands before it. (So does a
        caption that two pictures share word for word.)
    """
    pictures = np.arange(len(images))
    before = np.zeros(len(texts), int)  # other pictures at least as near as the right one
    rivals = np.zeros(len(images), int)  # captions of others at least as near as an own one
    best = np.full(len(images), -np.inf)  # a picture's nearest own caption

    def blocks() -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Some texts, their similarities (t, K), and whose is whose (t, K): all of Flickr30k's at
        once would be 40 GB."""
        for start in range(0, len(texts), BLOCK):
            some = slice(start, start + BLOCK)
            similarity = (texts[some].double() @ images.double().T).numpy()
            yield some, similarity, owner[some, None] == pictures

    for some, similarity, mine in blocks():
        own = similarity[mine]  # (t,): each text has one picture
        before[some] = (similarity >= own[:, None]).sum(1) - 1
        best = np.maximum(best, np.where(mine, similarity, -np.inf).max(0))
    for _, similarity, mine in blocks():
        rivals += ((similarity >= best) & ~mine).sum(0)
    hits = {f"image@{k}": before < k for k in AT}
    return hits | {f"text@{k}": rivals < k for k in AT}


def classify(encoders: list[Encoder], classes: Classes, templates: list) -> dict[str, dict]:
    """Hits per picture by model and task: "top-1" and "top-5" where there are more than 5
    classes."""
    found, names = {}, np.array(classes.names)
    same = np.unique(names, return_inverse=True)[1]  # (C,): one number a name
    earlier = np.array([(names[:i] == name).sum() for i, name in enumerate(names)])  # (C,)
    for encoder in in_turn(encoders, classes.title):
        features = encoder.images(classes.pictures)  # (K, d)
        scores = features @ class_texts(encoder, classes.names, templates).T  # (K, C)
        own = scores[torch.arange(len(scores)), torch.from_numpy(classes.labels)]
        # A tie counts against. But classes of one name (ImageNet has two missiles) have one text:
        # as an argmax would, it means the first of them.
        others = torch.from_numpy(same[None] != same[classes.labels][:, None])  # (K, C)
        before = ((scores >= own[:, None]) & others).sum(1).numpy() + earlier[classes.labels]
        found[encoder.name] = {f"{classes.title} top-1": before < 1}
        if len(classes.names) > 5:
            found[encoder.name][f"{classes.title} top-5"] = before < 5
    return found


def probe(encoders: list[Encoder], classes: Classes, seed: int = 0) -> dict[str, dict]:
    """Ridge regression on frozen features: every picture judged once by a probe that has not seen
    it (two halves, each fitted on the other)."""
    # Folders are read class by class: without shuffling, a half would lack half of the classes.
    order = np.random.default_rng(seed).permutation(len(classes.labels))
    halves = order[::2], order[1::2]
    labels = torch.from_numpy(classes.labels)
    found = {}
    for encoder in encoders:
        features = encoder.images(classes.pictures)
        hits = np.zeros(len(labels), bool)
        for fit, test in (halves, halves[::-1]):
            predicted = ridge_probe(features[fit], labels[fit], features[test])
            hits[test] = (predicted == labels[test]).numpy()
        found[encoder.name] = {f"{classes.title} linear probe": hits}
    return found


def check_layers(encoders: list[Encoder]) -> None:
    """Have all of them the same layers? One blank picture tells, before hours of pictures. Raises:
    ValueError naming a model that has others, or none."""
    blank = np.zeros((32, 32, 3), np.uint8)
    shapes = [[tuple(layer.shape) for layer in encoder.layers([blank])] for encoder in encoders]
    for encoder, shape in zip(encoders, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"--layers: {encoder.name} has {len(shape)} layers of width {shape[0][-1]}, "
                f"{encoders[0].name} {len(shapes[0])} of {shapes[0][0][-1]}: leave --layers out"
            )


def drift(encoders: list[Encoder], pictures: list, per_layer: bool) -> dict[str, dict]:
    """Mean cosine to the first model's features (None where they have another width); on request,
    to its mean token after each layer."""
    first, *others = encoders
    base = first.images(pictures)
    layers = first.layers(pictures) if per_layer else []
    found = {}
    for encoder in others:
        found[encoder.name] = {"features": mean_cosine(base, encoder.images(pictures))}
        if per_layer:
            both = zip(layers, encoder.layers(pictures), strict=True)
            found[encoder.name]["layers"] = [mean_cosine(*pair) for pair in both]
    return found


def verdicts(
    encoders: list[Encoder],
    sets: list[Classes],
    captions: list[Captions],
    templates: list,
    with_probe: bool,
) -> dict[str, dict[str, np.ndarray]]:
    """All of it: model → task → bool per picture or text."""
    # The same pictures for every model, so that each change can be tested pair by pair.
    hits: dict[str, dict] = {encoder.name: {} for encoder in encoders}
    for classes in sets:
        asked = [classify(encoders, classes, templates)]
        asked += [probe(encoders, classes)] if with_probe else []
        for name in hits:
            hits[name] |= {
                task: found for answers in asked for task, found in answers[name].items()
            }
    for group in captions:
        for encoder in in_turn(encoders, group.title):
            images, texts = encoder.images(group.pictures), encoder.texts(group.texts)
            for task, found in retrieval_hits(images, texts, group.owner).items():
                hits[encoder.name][f"{group.title} {task}"] = found
    return hits


# ------------------------------------------------------------------------------------------------
# Saying it
# ------------------------------------------------------------------------------------------------
def compare(hits: dict[str, dict[str, np.ndarray]]) -> list[dict]:
    """Model → task → verdicts, as rows: one per task, every model against the first."""
    tasks = next(iter(hits.values()))
    return [
        {
            "task": task,
            "n": len(verdict),
            "models": compared({name: answers[task] for name, answers in hits.items()}),
        }
        for task, verdict in tasks.items()
    ]


def text_of(
    rows: list[dict], moved: dict[str, dict], names: list[str], n: int, wide: bool = False
) -> str:
    """Some of the models, the first among them, in tables no wider than a terminal.

    Args:
        moved: of `drift`, on n pictures.
        wide: Tab. 3's layout with everything in one table instead of one per model.
    """
    rows, (first, *others) = report.only(rows, names), names
    text, title = [report.legend(names)], "retention, percent right"
    if wide:
        text.append(table3(rows))
    else:
        if len(others) > 1:  # one beside the other; two models fit into the table below
            cosine = {name: about["features"] for name, about in moved.items()}
            by_task = {row["task"]: row for row in rows}
            text.append(report.summary(title.capitalize(), by_task, cosine))
        text += [report.pair_table(title, "task", rows, name) for name in others or [first]]
    lines = drift_text({name: moved[name] for name in others}, first, n).splitlines()
    return "\n".join(text + [report.wrapped(line) for line in lines if line])


def table3(rows: list[dict]) -> str:
    """Tab. 3's layout: a line a model, a column a task; below, the change and its interval."""
    names = list(rows[0]["models"])
    table = [["model", *(row["task"] for row in rows)]]
    table.append(["n", *(str(row["n"]) for row in rows)])
    for name in names:
        table.append([name, *(f"{row['models'][name]['percent']:.1f}" for row in rows)])
    for name in names[1:]:
        cells, tests = [f"{name}: change [95 %]"], ["won/lost, McNemar p"]
        for row in rows:
            m = row["models"][name]
            low, high = m["change_interval"]
            cells.append(f"{m['change']:+.1f} [{low:+.1f}, {high:+.1f}]")
            tests.append(f"{m['won']}/{m['lost']}, {m['p']:.2g}")
        table += [cells, tests]
    return report.plain_table("Retention (Tab. 3's layout), percent", table, width=None)


def drift_text(found: dict[str, dict], first: str, n: int) -> str:
    """What `drift` found, in sentences; `first` is the model it was compared with."""
    lines = []
    for name, about in found.items():
        if about["features"] is not None:
            near = f"{about['features']:.4f}"
            lines.append(f"{name}: mean cosine to {first}'s features on {n} pictures {near}\n")
        if "layers" in about:
            values = " ".join(f"{v:.3f}" for v in about["layers"])
            lines.append(f"{name}: after each layer, mean token: {values}\n")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------
def main() -> None:
    """Mistakes first, models next: a wrong path should not cost the minutes of loading them."""
    settings = command_line()
    templates = prompts(settings.template)
    sets = [read_classes(source, settings.root) for source in settings.classify]
    captions = [read_captions(source, settings.images) for source in settings.captions]
    for group in (sets, captions):  # a task is named after its set
        titles = [s.title for s in group]
        if len(set(titles)) < len(titles):
            raise ValueError(f"two of {', '.join(titles)} have the same name: rename one")
    chosen = settings.model or toy.default_models(Path(settings.runs))
    models = name_models(chosen)
    folders = results.folders_of(models, settings.out, settings.runs)
    pictures = [p for s in [*sets, *captions] for p in s.pictures]
    check_pictures(pictures)
    if not settings.model:
        print(printable(f"newest enhanced model: {chosen[-1]}"))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = cache_folder(settings.cache, settings.runs)
    encoders = load_encoders(list(models.values()), device, cache)
    if settings.layers and len(encoders) > 1:
        check_layers(encoders)
    words = any(encoder.info.words for encoder in encoders)
    if words and settings.template.startswith("imagenet"):
        templates = [toy.TEMPLATE]  # the toy's vocabulary knows no other
    start = time.time()
    # Verdicts per picture first: every figure and every test below is made of them.
    rows = compare(verdicts(encoders, sets, captions, templates, settings.probe))
    # Drift over all pictures at once; it needs neither classes nor captions.
    moved = drift(encoders, pictures, settings.layers) if len(encoders) > 1 else {}
    about = {
        "template": templates if words else settings.template,
        "date": time.strftime("%Y-%m-%d"),
        "device": str(device),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 1),
    }
    asked = {
        "command": "eval_zeroshot.py",
        **{
            k: [results.identity(s) for s in getattr(settings, k)] for k in ("classify", "captions")
        },
        **{k: results.identity(getattr(settings, k)) for k in ("root", "images")},
        **{k: getattr(settings, k) for k in ("template", "probe", "layers")},
    }
    what = "zeroshot-" + "+".join(s.title for s in [*sets, *captions])
    # The same in words, then everything for programs: for each model its own.
    files = []
    for names, stem, evaluation in results.reports(models, folders, what, asked):
        found = {"rows": report.only(rows, names), "drift": {n: moved[n] for n in names[1:]}}
        text = text_of(rows, moved, names, len(pictures))
        files += results.write(stem, {"evaluation": evaluation, **about, **found}, text)
    print(text_of(rows, moved, list(models), len(pictures), settings.wide))
    print(results.written(files))


if __name__ == "__main__":
    run_command(main)
