"""Every flag of every command, given everything that people and programs give by mistake.

Nothing is listed twice here: fields, types, choices and bounds are read off each command's own
dataclass, so a new setting is asked at once. Bounds say what is sense. Where one is missing this
still knows that no number is nan, below nothing or 1e300: a setting without a lower bound fails.
"""

import dataclasses
import functools
import itertools
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

from .inputs import ACCEPTED, EITHER, REFUSED, Input

TRAIN = (
    "train.py --runs {here}/runs --name x --cache= --workers 0 --toy_images 16 --stage1_steps 2 "
    "--stage2_steps 2"
).split()
MMVP = (
    "eval_mmvp.py --model {toy}/clip.safetensors --runs {here}/runs --out {here}/out --cache none "
    "--benchmark {world}/pairs.json"
).split()
ZEROSHOT = (
    "eval_zeroshot.py --model {toy}/clip.safetensors --runs {here}/runs --out {here}/out "
    "--cache none --classify {world}/classes"
).split()
PRETRAIN = "toy.pretrain --out {here}/out --only vae --scenes 513".split()
# Where a flag means something only beside others.
BESIDE = {
    "cache_dtype": ["--cache", "memory"],
    "crop_min": ["--data", "{world}/pictures"],
    "gpus": ["--plan"],
    "loss_weights": ["--denoiser", "flow+perceiver"],
    "pairs": ["--benchmark", "toy"],
    "root": ["--classify", "cifar100"],
    "images": ["--captions", "{world}/captions.json"],
}
# Numbers: what is never one, and what no number here can be.
NO_NUMBER = ("", " ", "many", "0x10", "1,5", "1e", "--1", "1_0_", "٣x", "None", "9" * 5000)
NO_SETTING = ("nan", "inf", "-1", "1e300", "1000000000000", "0")
EDGES = ("-inf", "-0.5", "-1e-300", "1e-300", "9223372036854775808", "4294967296")
TEXTS = ("", "\x1b[31mred", "line\nline", "bad\udcff", "x" * 5000, "-", "a/../b", "{", "%s%n", "🦆")


# ------------------------------------------------------------------------------------------------
# Places
# ------------------------------------------------------------------------------------------------
def make_places(here: Path, world: Path) -> None:
    """One of everything that a path can be and that is not what was meant."""
    (here / "folder").mkdir()
    (here / "file").write_bytes(b"neither text nor picture \x00\xff\n" * 3)
    (here / "words.json").write_text('{"a": 1}')
    (here / "halt.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    (here / "loop").symlink_to(here / "loop")
    (here / "astray").symlink_to(here / "nowhere")
    os.mkfifo(here / "pipe")
    os.mkfifo(here / "pipe.safetensors")
    os.mkfifo(here / "pipe.json")
    (here / "sealed").mkdir()
    (here / "sealed" / "0.png").write_bytes(b"")
    (here / "sealed").chmod(0)
    (here / "sealed.json").write_text("{}")
    (here / "sealed.json").chmod(0)


PLACES = (
    "nowhere", "nowhere/below", "folder", "file", "file/below", "words.json", "halt.safetensors",
    "loop", "astray", "pipe", "pipe.safetensors", "pipe.json", "sealed", "sealed.json",
    "new\nline", "esc\x1b[31m", "bad\udcff", "x" * 300, "x/" * 3000, "*", "{0..3}", "[",
)  # fmt: skip
MORE_PLACES = ("/dev/null", "/dev/zero", "/proc/self/mem", ".", "..", "~", "http://x/y")
# What may lie at a flag's path. Whatever is not said here is a mistake. A folder to be written may
# have any name that a file system takes; that features cannot be kept is said, and no matter.
NEW_NAMES = {"nowhere", "nowhere/below", "folder", "new\nline", "esc\x1b[31m", "bad\udcff", "*",
             "{0..3}", "[", "sealed", ".", "..", "~", "http://x/y"}  # fmt: skip
ANY = {*PLACES, *MORE_PLACES}
PATHS = {
    "train.py": {
        "runs": NEW_NAMES, "cache": NEW_NAMES, "data": {".", ".."}, "clip": set(), "vae": set(),
        "flux": set(), "vqgan": set(), "stage1_from": set(),
    },
    "eval_mmvp.py": {
        "benchmark": set(), "model": set(), "doubts": {"sealed.json"}, "runs": ANY,
        "out": NEW_NAMES, "cache": ANY,
    },
    "eval_zeroshot.py": {
        "model": set(), "classify": set(), "captions": set(), "root": set(), "runs": ANY,
        "out": NEW_NAMES, "cache": ANY, "images": {".", ".."},
    },
    "toy.pretrain": {"out": NEW_NAMES},
}  # fmt: skip
# A name that is too long, or holds what only the file system knows, may be refused or not.
DOUBTFUL = {"{0..3}", "*", "[", "sealed", "sealed.json", ".", "..", "~", "http://x/y", "bad\udcff",
            "new\nline", "esc\x1b[31m"}  # fmt: skip


def places_of(flag: str, allowed: set[str]) -> Iterator[tuple[str, str]]:
    """Paths for a flag, and what must come of each."""
    for place in (*PLACES, *MORE_PLACES):
        wanted = REFUSED if place not in allowed else EITHER if place in DOUBTFUL else ACCEPTED
        if allowed is ANY:
            wanted = EITHER
        beyond = place in MORE_PLACES
        yield place if beyond else "{here}/" + place, wanted
    yield "bad\x01name", EITHER if allowed else REFUSED


# ------------------------------------------------------------------------------------------------
# Flags of the dataclasses
# ------------------------------------------------------------------------------------------------
@functools.cache
def commands() -> tuple[tuple[tuple[str, ...], type], ...]:
    """Each command with a base line that works, and its dataclass."""
    import eval_mmvp
    import eval_zeroshot
    import settings
    import toy.pretrain

    return (
        (tuple(TRAIN), settings.Settings),
        (tuple(MMVP), eval_mmvp.Settings),
        (tuple(ZEROSHOT), eval_zeroshot.Settings),
        (tuple(PRETRAIN), toy.pretrain.Settings),
    )


def inputs() -> Iterator[Input]:
    """All of them, in one order."""
    for base, settings in commands():
        yield Input(f"{base[0]} as it is", base, wanted=ACCEPTED)
        for field in dataclasses.fields(settings):
            yield from inputs_of(base, field)
    yield from by_hand()


def inputs_of(base: tuple[str, ...], field: dataclasses.Field) -> Iterator[Input]:
    """One flag's."""
    kind, flag = type(field.default), f"--{field.name}"
    beside = list(BESIDE.get(field.name, ()))
    if only := field.metadata.get("only"):
        beside = ["--denoiser", only] if only != "flow" else beside
    if base[0] == "train.py" and field.name in ("data", "clip", "vae", "flux", "vqgan", "cache"):
        beside += ["--preset", "toy"]
    line = (*base, *beside)

    def one(words: list[str], wanted: str) -> Input:
        return Input(f"{base[0]} {' '.join(words)!r:.90}", (*line, *words), make_places, wanted)

    yield one([f"{flag}x=1"], REFUSED)
    yield one([f"{flag[:-1]}=1"], REFUSED)
    if kind is bool:
        yield one([f"{flag}=perhaps"], REFUSED)
        yield one([flag, "5"], REFUSED)
        return
    yield one([flag], REFUSED)
    if kind in (int, float):
        given = (*NO_SETTING, *some((*NO_NUMBER, *EDGES), flag), *bounds_of(field))
        for text in dict.fromkeys(given):
            yield one([f"{flag}={text}"], sense_of(field, text))
        return
    if choices := field.metadata["choices"]:
        for text in (*some(TEXTS, flag), choices[0].upper(), choices[0] + "x", choices[-1][:-1]):
            yield one([f"{flag}={text}"], EITHER if text in choices else REFUSED)
        return
    if field.name in PATHS[base[0]]:
        for text, wanted in places_of(field.name, PATHS[base[0]][field.name]):
            yield one([f"{flag}={text}"], wanted)
    for text, wanted in words_of(field.name):
        if field.name == "cache" and base[0] != "train.py":
            continue  # there it may be a folder of any name
        yield one([f"{flag}={text}"], wanted)


def some(texts: tuple[str, ...], flag: str) -> list[str]:
    """Four of them, others for each flag: all go through one parser."""
    return random.Random(flag).sample(texts, 4)


def bounds_of(field: dataclasses.Field) -> list[str]:
    """The numbers at a field's bounds and beyond them."""
    notes = field.metadata
    step = 1 if type(field.default) is int else 0.01
    found = [(notes[k], notes[k] + way * step) for k, way in BEYOND.items() if k in notes]
    return [str(number) for pair in found for number in pair]


BEYOND = {"at_least": -1, "at_most": 1, "above": 1}  # above a bound that is no part of its range


def sense_of(field: dataclasses.Field, text: str) -> str:
    """What must come of a number at this field."""
    kind, notes = type(field.default), field.metadata
    try:
        value = kind(text)
    except ValueError:
        return REFUSED
    if not math.isfinite(value) or value < 0 or value >= 1e300:
        return REFUSED
    if value < notes.get("at_least", -math.inf) or value > notes.get("at_most", math.inf):
        return REFUSED
    if value <= notes.get("above", -math.inf):
        return REFUSED
    # Within its own bounds it may still not fit another flag: heads and width, batch and micro.
    return EITHER


def words_of(name: str) -> list[tuple[str, str]]:
    """Texts for flags that are neither numbers nor choices."""
    numbers = ("nan", "-1", "1e300", "1,,2", ",", "1,2,3,4", "a,b,c", "inf,1", "-1,1", "0,0", "1")
    known = {
        "name": [(t, REFUSED) for t in (".", "..", "a/b", "a\\b", "x" * 5000)]
        + [(t, EITHER) for t in ("\x1b[31m", "new\nline", "bad\udcff", "-", " ", "x" * 300)],
        "rope_axes": [(t, REFUSED) for t in (*numbers[:-1], "8,12,13", "1e1,1,1", "8, 12", "9,9")],
        "loss_weights": [(t, REFUSED) for t in numbers] + [("1,0.2", ACCEPTED), ("0,1", ACCEPTED)],
        "cache": [(t, REFUSED) for t in ("no", "off", "true", "NONE", "Memory ")][:4],
        "template": [(t, REFUSED) for t in ("", "{", "}", "{0}", "{x}", "a photo", "\x1b[31m")]
        + [(t, EITHER) for t in ("{}", "{}{}", "{}\x1b[31m", "{}" * 500, "bad\udcff {}", "{} %s")],
        "clip": [
            (t, REFUSED)
            for t in ("", ":", "ViT-B-32", "ViT-B-32:", ":openai", "ViT-B-32:nowhere", "a:b:c",
                      "ViT-B-32:{here}/file", "ViT-B-32:{here}/pipe", "ViT-B-32:/dev/zero",
                      "ViT-B-32:{here}/pipe.safetensors", "hf-hub:x/y", "local-dir:{here}/folder",
                      "local-dir:..", "ViT-B-32:{toy}/clip.safetensors", "{toy}/vae.safetensors")
        ],
        "vae": [("{toy}/clip.safetensors", REFUSED), ("{toy}/vqgan.safetensors", REFUSED),
                ("{toy}/vae.safetensors", ACCEPTED)],
        "vqgan": [("{toy}/clip.safetensors", REFUSED), ("{toy}/vae.safetensors", REFUSED),
                  ("{toy}/vqgan.safetensors", ACCEPTED)],
        "flux": [("{toy}/vae.safetensors", REFUSED)],
        "data": [("{world}/pictures", ACCEPTED), ("{world}/list.txt", ACCEPTED),
                 ("{world}/shards", ACCEPTED), ("{world}/shards/{0..9}.tar", REFUSED),
                 ("{world}/shards/{9..0}.tar", REFUSED), ("{world}/shards/{0..1000000000000}.tar",
                 REFUSED), ("{world}/shards/{0,1}{0,1}{0,1}.tar", REFUSED),
                 ("{world}/shards/" + "{0,1}" * 40 + ".tar", REFUSED),
                 ("{world}/shards/" + "{" * 500, REFUSED), ("{world}/shards/*.rat", REFUSED)],
        "classify": [("cifar100", REFUSED), ("imagenet", REFUSED), ("cars", REFUSED),
                     ("{world}/classes", EITHER), ("{world}/pictures", REFUSED)],
        "captions": [("{world}/captions.json", ACCEPTED), ("{world}/pairs.json", REFUSED)],
        "benchmark": [("{world}/pairs.json", ACCEPTED), ("{world}/mmvp", EITHER),
                      ("{world}/captions.json", REFUSED), ("Toy", REFUSED)],
        "doubts": [("{world}/doubts.json", ACCEPTED), ("{world}/pairs.json", REFUSED)],
        "stage1_from": [("{world}/runs/done", REFUSED), (",", REFUSED), ("a,b", REFUSED)],
    }  # fmt: skip
    if name == "model":
        return [(text, wanted) for text, wanted in known["clip"] if wanted == REFUSED]
    return known.get(name, [])


# ------------------------------------------------------------------------------------------------
# Commands whose few arguments are no dataclass
# ------------------------------------------------------------------------------------------------
def by_hand() -> Iterator[Input]:
    """Export, blend, curves and the toy's benchmark."""
    run = "{world}/runs/done"
    blend = ("training.blend", run, "--out", "{here}/blend")
    bases = {
        ("export_hf.py", "--model"): ("--out", "{here}/out"),
        ("export_hf.py", "--out"): ("--model", "{toy}/clip.safetensors"),
        ("training.blend", ""): ("--out", "{here}/blend"),
        ("training.blend", "--out"): (run,),
        ("training.blend", "--original"): (run, "--out", "{here}/blend"),
        ("training.curves", ""): (),
        ("training.curves", "--out"): (run,),
        ("toy.benchmark", "pairs"): (),
        ("toy.benchmark", "picture"): (),
    }
    for (script, flag), beside in bases.items():
        writes = flag in ("--out", "pairs", "picture")
        for place in (*PLACES, *MORE_PLACES):
            text = place if place in MORE_PLACES else "{here}/" + place
            words = (f"{flag}={text}",) if flag.startswith("--") else (flag, text)
            words = tuple(w for w in words if w)
            wanted = EITHER if writes else REFUSED
            name = f"{script} {' '.join(words)!r:.90}"
            yield Input(name, (script, *beside, *words), make_places, wanted)
    yield Input("training.blend as it is", blend, wanted=ACCEPTED)
    yield Input("export_hf.py as it is", ("export_hf.py", "--model", run, "--out", "{here}/out"),
               wanted=ACCEPTED)  # fmt: skip
    weights = ("nan", "inf", "-1", "2.1", "1e300", "", ",", "a", "1,1", "1e", "0x1", "9" * 12)
    for text in weights:
        yield Input(f"training.blend --weights={text}", (*blend, f"--weights={text}"),
                   wanted=REFUSED)  # fmt: skip
    for words in ("--wieghts 1", "--out", "--weights", "--original=ViT-B-32:nowhere", "--nonsense"):
        yield Input(f"training.blend {words}", (*blend, *words.split()), wanted=REFUSED)
    scripts = ("train.py", "eval_mmvp.py", "eval_zeroshot.py", "export_hf.py", "training.blend",
               "training.curves", "toy.benchmark", "toy.pretrain")  # fmt: skip
    strange = ("--", "-", "--=", "-z", "--no-", "--\udcff", "--\x1b[31m", "stray", "-9", "@file")
    for script, word in itertools.product(scripts, strange):
        base = next((b for b, _ in commands() if b[0] == script), (script,))
        wanted = EITHER if word == "--" else REFUSED
        yield Input(f"{script} {word!r}", (*base, word), make_places, wanted)
