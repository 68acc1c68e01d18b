"""JSON files, wrong in every place: sets of pairs, captions, models, runs, caches, headers.

At each place of a valid file a value is put that is of another type, or the place is removed, or
its key misspelt; then the text itself is cut, coded otherwise or nested a hundred thousand deep.
What types a place may hold is written beside each file (`kinds`), as the schema of its reader has
it, and any other must be refused.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .forks import ROOT
from .inputs import EITHER, REFUSED, Input
from .inputs_flags import MMVP, ZEROSHOT
from .inputs_world import TINY, json_files
from .table import spread

MOST = 45  # wrong ones of a kind: they are many, and all go through one reader
PAIRS = (*MMVP[:3], "--runs", "{here}/runs", "--out", "{here}/out", "--cache", "none")
CAPTIONS = (*ZEROSHOT[:3], *PAIRS[3:], "--images", "{world}", "--captions")
RESUME = (*TINY, "--runs", "{here}/runs", "--name", "half", "--cache", "{here}/cache")
PHOTOS = (*TINY, "--runs", "{here}/runs", "--name", "x", "--cache=")
CLIP, VAE = ROOT / "toy" / "clip.safetensors", ROOT / "toy" / "vae.safetensors"


# By type, what is put at a place.
WRONG = {
    "null": (None,),
    "bool": (True,),
    "number": (5, -1, 0, 10**12, 1e300, 2**64),
    "text": ("", "a\x1b[31m\n\x00b", "x" * 100_000, "../../../etc/passwd", "bad\udcff"),
    "list": ([], [[]], [None], [0] * 1000),
    "object": ({}, {"a": None}),
}


# ------------------------------------------------------------------------------------------------
# A tree, wrong in one place
# ------------------------------------------------------------------------------------------------
def places(tree, path: tuple = ()) -> Iterator[tuple]:
    """The paths of a JSON tree, the root first. Of a long list the first two and the last."""
    yield path
    if isinstance(tree, dict):
        for key in tree:
            yield from places(tree[key], (*path, key))
    elif isinstance(tree, list):
        for i in dict.fromkeys((*range(min(2, len(tree))), len(tree) - 1) if tree else ()):
            yield from places(tree[i], (*path, i))


def pattern_of(path: tuple) -> str:
    """("items", 3, "image") → items.*.image"""
    return ".".join("*" if isinstance(step, int) else step for step in path)


def changed(tree, path: tuple, change: Callable):
    """A copy of a tree; `change` is called with the place's container and its key."""
    whole = {"root": copy.deepcopy(tree)}
    inside, steps = whole, ("root", *path)
    for step in steps[:-1]:
        inside = inside[step]
    change(inside, steps[-1])
    return whole.get("root")


def trees(tree, kinds: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Wrong copies as text: what was done, the text, and what must come of it.

    Args: kinds: pattern of a place → the types it may hold, with a space between. A place that is
        not named may hold anything; one that ends in "!" must be there, and bear its name.
    """
    for path in places(tree):
        pattern, shown = pattern_of(path), "/".join(map(str, path)) or "root"
        allowed = kinds.get(pattern, "")
        must = allowed.endswith("!")
        types = allowed.rstrip("!").split()
        for name, values in WRONG.items():
            for number, value in enumerate(values):

                def put(inside, key, value=value):
                    inside[key] = value

                wanted = REFUSED if types and name not in types else EITHER
                text = json.dumps(changed(tree, path, put))
                yield f"{shown} = {name} {number}", text, wanted
        if not path:
            continue
        wanted = REFUSED if must else EITHER
        gone = changed(tree, path, lambda inside, key: inside.pop(key))
        yield f"{shown} removed", json.dumps(gone), wanted
        if isinstance(path[-1], str):

            def misspell(inside, key):
                inside[key + "s"] = inside.pop(key)

            yield f"{shown} misspelt", json.dumps(changed(tree, path, misspell)), wanted


def texts(text: str) -> Iterator[tuple[str, bytes, str]]:
    """A JSON file that is wrong as a text."""
    whole = text.encode()
    yield "empty", b"", REFUSED
    yield "half", whole[: len(whole) // 2], REFUSED
    yield "one byte short", whole[:-1], REFUSED
    yield "twice", whole * 2, REFUSED
    yield "utf-16", text.encode("utf-16"), EITHER
    yield "byte order mark", b"\xef\xbb\xbf" + whole, EITHER
    yield "latin-1", whole.replace(b'"', b'"\xe9', 1), REFUSED
    yield "zeros", bytes(4096), REFUSED
    yield "a number", b"5", REFUSED
    yield "NaN", b"NaN", REFUSED
    yield "5000 digits", b"9" * 5000, REFUSED
    yield "nested lists", b"[" * 100_000 + b"]" * 100_000, REFUSED
    yield "nested objects", b'{"items":' * 100_000 + b"1" + b"}" * 100_000, REFUSED
    yield "5000 digits inside", whole.replace(b": ", b": " + b"9" * 5000 + b', "z": ', 1), EITHER
    yield "a key twice", whole.replace(b"{", b'{"name": 1, "name": [], ', 1), EITHER


# ------------------------------------------------------------------------------------------------
# Which files, who reads them, and what they may hold
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """A kind of JSON file."""

    name: str
    content: object
    command: tuple[str, ...]
    types: dict[str, str] = field(default_factory=dict)
    put: Callable[[Path, Path, bytes], None] | None = None
    """writes the wrong file into the case's folder; by default as wrong.json"""
    lenient: bool = False
    """damage is survived, not refused: what only speeds up or reports"""


def put_beside(link: str, name: str) -> Callable[[Path, Path, bytes], None]:
    """The wrong file beside a link to what the reader wants there, too."""

    def put(here: Path, world: Path, content: bytes) -> None:
        target = CLIP if link == "clip" else world / link
        suffix = ".safetensors" if link == "clip" else ""
        (here / (Path(name).stem + suffix if suffix else link)).symlink_to(target)
        (here / name).write_bytes(content)

    return put


def put_in_copy(folder: str, name: str) -> Callable[[Path, Path, bytes], None]:
    """The wrong file in a copy of a folder of the world."""

    def put(here: Path, world: Path, content: bytes) -> None:
        target = here / folder
        shutil.copytree(world / folder, target)
        if folder.startswith("runs") and (world / "cache").is_dir():
            shutil.copytree(world / "cache", here / "cache")
        (target / name).write_bytes(content)

    return put


def put_header(what: str) -> Callable[[Path, Path, bytes], None]:
    """A safetensors file whose header is the wrong text: the file's own ("header"), or what it says
    of the autoencoder ("about")."""

    def put(here: Path, world: Path, content: bytes) -> None:
        whole = VAE.read_bytes()
        size = int.from_bytes(whole[:8], "little")
        header = content
        if what == "about":
            tree = json.loads(whole[8 : 8 + size])
            tree["__metadata__"]["autoencoder"] = content.decode("utf-8", "replace")
            header = json.dumps(tree).encode()
        (here / "wrong.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + whole[8 + size :]
        )

    return put


TEXT, NUMBER, LIST, OBJECT = "text", "number", "list", "object"
MODEL_TYPES = {
    "": OBJECT, "model_cfg": OBJECT + "!", "model_cfg.embed_dim": NUMBER + "!",
    "model_cfg.vision_cfg": OBJECT + "!", "model_cfg.text_cfg": OBJECT + "!",
    "model_cfg.vision_cfg.width": NUMBER, "model_cfg.vision_cfg.layers": "number list",
    "model_cfg.vision_cfg.patch_size": NUMBER, "model_cfg.text_cfg.context_length": NUMBER,
    "model_cfg.text_cfg.vocab_size": NUMBER, "model_cfg.text_cfg.width": NUMBER,
    "model_cfg.text_cfg.heads": NUMBER, "model_cfg.text_cfg.layers": NUMBER,
    "preprocess_cfg": OBJECT + "!", "preprocess_cfg.mean": LIST + "!",
    "preprocess_cfg.std": LIST + "!", "preprocess_cfg.mean.*": NUMBER,
    "preprocess_cfg.std.*": NUMBER, "preprocess_cfg.resize_mode": TEXT, "words": LIST + "!",
    "words.*": TEXT,
}  # fmt: skip


def kinds(world: Path) -> Iterator[Kind]:
    """All JSON files."""
    files = json_files()
    near = put_beside("pictures", "wrong.json")
    pair = {
        "": OBJECT, "name": TEXT, "template": TEXT, "items": LIST + "!", "items.*": OBJECT,
        "items.*.id": "text number bool", "items.*.category": TEXT, "items.*.images": LIST + "!",
        "items.*.images.*": TEXT + "!", "items.*.image": TEXT + "!",
        "items.*.captions": LIST + "!", "items.*.captions.*": TEXT,
    }  # fmt: skip
    set_of = (*PAIRS, "--benchmark", "{here}/wrong.json")
    yield Kind("pair set", files["pairs.json"], set_of, pair, near)
    doubts = {"": OBJECT, "leave_out": LIST, "leave_out.*": "text number", "swap": LIST,
              "swap.*": "text number"}  # fmt: skip
    line = (*PAIRS, "--benchmark", "{world}/pairs.json", "--doubts", "{here}/wrong.json")
    yield Kind("doubts", files["doubts.json"], line, doubts)
    ours = {"": LIST, "*": OBJECT, "*.file": TEXT + "!", "*.captions": LIST + "!",
            "*.captions.*": TEXT}  # fmt: skip
    line = (*CAPTIONS, "{here}/wrong.json")
    yield Kind("captions", files["captions.json"], line, ours)
    coco = {"": OBJECT, "images": LIST + "!", "images.*": OBJECT, "images.*.id": "number text!",
            "images.*.file_name": TEXT + "!", "annotations": LIST + "!", "annotations.*": OBJECT,
            "annotations.*.image_id": "number text!",
            "annotations.*.caption": TEXT + "!"}  # fmt: skip
    yield Kind("COCO's captions", files["coco.json"], line, coco)
    split = {"": OBJECT, "images": LIST + "!", "images.*": OBJECT, "images.*.filename": TEXT + "!",
             "images.*.sentences": LIST + "!", "images.*.sentences.*": OBJECT,
             "images.*.sentences.*.raw": TEXT + "!"}  # fmt: skip
    yield Kind("Karpathy's captions", files["karpathy.json"], line, split)

    clip = json.loads((ROOT / "toy" / "clip.json").read_text())
    line = (PAIRS[0], "--model", "{here}/wrong.safetensors", *PAIRS[3:], "--benchmark",
            "{world}/pairs.json")  # fmt: skip
    beside = put_beside("clip", "wrong.json")
    yield Kind("model config, judged", clip, line, MODEL_TYPES, beside)
    line = (*PHOTOS, "--clip", "{here}/wrong.safetensors")
    yield Kind("model config, trained", clip, line, MODEL_TYPES, beside)
    line = ("export_hf.py", "--model", "{here}/wrong.safetensors", "--out", "{here}/out")
    yield Kind("model config, exported", clip, line, {}, beside)
    theirs = json.loads((world / "hf" / "config.json").read_text())
    line = ("export_hf.py", "--model", "{here}/hf", "--out", "{here}/out")
    yield Kind("transformers config", theirs, line, {"": OBJECT}, put_in_copy("hf", "config.json"))

    whole = VAE.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    about = json.loads(header["__metadata__"]["autoencoder"])
    few = {key: header[key] for key in ("__metadata__", *list(header)[1:4])}
    line = (*PHOTOS, "--vae", "{here}/wrong.safetensors")
    yield Kind("autoencoder's config", about, line, {"": OBJECT}, put_header("about"))
    yield Kind("header of weights", few, line, {"": OBJECT}, put_header("header"))
    yield from kinds_of_runs(world)


def kinds_of_runs(world: Path) -> Iterator[Kind]:
    """What a run and a cache say of themselves."""
    half = world / "runs" / "half"
    for stage, step in ((1, 2), (2, 1)):
        file = f"stage{stage}/step_{step:08d}/state.json"
        state = json.loads((half / file).read_text())
        state["architecture"] = {"clip": {}, "flow": state["architecture"]["flow"]}
        put = put_in_copy("runs/half", file)
        yield Kind(f"state of stage {stage}", state, RESUME, put=put, lenient=True)
    config = json.loads((half / "config.json").read_text())
    put = put_in_copy("runs/half", "config.json")
    yield Kind("config of a run, resumed", config["stages"]["2"], RESUME, put=put, lenient=True)
    short = {
        "stages": {"2": {"settings": dict(list(config["stages"]["2"]["settings"].items())[:9])}}
    }
    put = put_in_copy("runs/done", "config.json")
    line = ("training.blend", "{here}/runs/done", "--out", "{here}/blend")
    yield Kind("config of a run, blended", short, line, {"": OBJECT, "stages": OBJECT + "!"}, put)
    line = (
        *PAIRS[:1],
        "--model",
        "{here}/runs/done",
        *PAIRS[3:],
        "--benchmark",
        "{world}/pairs.json",
    )
    yield Kind("config of a run, judged", short, line, put=put, lenient=True)
    first = (half / "metrics.jsonl").read_text().splitlines()[0]
    put = put_in_copy("runs/half", "metrics.jsonl")
    yield Kind("metrics, resumed", json.loads(first), RESUME, put=put, lenient=True)
    line = ("training.curves", "{here}/runs/half", "--out", "{here}/a.png")
    yield Kind("metrics, drawn", json.loads(first), line, put=put, lenient=True)
    about = json.loads((world / "cache" / "about.json").read_text())
    about["clip"].pop("words", None)

    def put_cache(here: Path, world: Path, content: bytes) -> None:
        put_in_copy("runs/half", "note")(here, world, b"")
        (here / "cache" / "about.json").write_bytes(content)

    yield Kind("about.json of a cache", about, RESUME, {"": OBJECT}, put_cache)


def json_cases(world: Path) -> Iterator[Input]:
    """All of the above."""
    for kind in kinds(world):
        put = kind.put or (lambda here, world, content: (here / "wrong.json").write_bytes(content))
        wrong = [(what, text.encode("utf-8", "surrogatepass"), wanted)
                 for what, text, wanted in trees(kind.content, kind.types)]  # fmt: skip
        for what, content, wanted in (*spread(wrong, MOST), *texts(json.dumps(kind.content))):

            def prepare(here: Path, world: Path, put=put, content=content) -> None:
                put(here, world, content)

            wanted = EITHER if kind.lenient else wanted
            yield Input(f"{kind.name}: {what}", kind.command, prepare, wanted)
