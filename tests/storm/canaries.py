"""Canaries: files that carry code. Each is given to every command that reads its kind; none runs.

A model, a checkpoint or a set of pictures comes from somebody else. Whoever opens one must not have
to trust its author. Each canary would leave a file behind if its code were run, or the program
started that it asks for.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .forks import ROOT, Forks
from .inputs import EITHER, problem_of
from .inputs_world import TINY, json_files, make_world, shard
from .table import Case

MARK = "canary-sang"
TOY = ROOT / "toy"
JUDGE = (
    "eval_mmvp.py",
    "--benchmark",
    "{here}/pairs.json",
    "--out",
    "{here}/out",
    "--cache",
    "none",
)
TRAIN = (*TINY, "--runs", "{here}/runs", "--name", "x", "--stage", "1", "--cache=")
EXPORT = ("export_hf.py", "--out", "{here}/hf", "--model")


@dataclass(frozen=True)
class Canary:
    """A file with code in it, and who reads files of its kind."""

    name: str
    lay: Callable[[Path], None]
    """puts it into a folder"""
    commands: tuple[tuple[str, ...], ...]
    """each tried in a folder of its own"""


class Song:
    """What a pickle can do to whoever opens it."""

    def __init__(self, here: Path):
        self.file = str(here / MARK)

    def __reduce__(self):
        return (open, (self.file, "w"))


# ------------------------------------------------------------------------------------------------
# Laying
# ------------------------------------------------------------------------------------------------
def pickled(name: str) -> Callable[[Path], None]:
    """A pickle as torch's old format and as its zip; the name says which."""

    def lay(here: Path) -> None:
        import torch

        content = {"state_dict": {"quantize.embedding.weight": Song(here)}, "optimizer": Song(here)}
        if name.startswith("zip"):
            torch.save(content, here / name)
        else:
            (here / name).write_bytes(pickle.dumps(content))

    return lay


def tokenizer(key: str) -> Callable[[Path], None]:
    """A model whose config names a tokenizer with code of its own, which transformers would run
    where a `key` of the config lets it."""

    def lay(here: Path) -> None:
        code = f"open({str(here / MARK)!r}, 'w').close()\n"
        folder = here / "tokenizer"
        folder.mkdir()
        (folder / "song.py").write_text(
            code
            + "from transformers import PreTrainedTokenizerFast\n"
            + "class Song(PreTrainedTokenizerFast):\n    pass\n"
        )
        auto = {"AutoTokenizer": [None, "song.Song"], "AutoConfig": "song.Song"}
        about = {"tokenizer_class": "Song", "auto_map": auto}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        (folder / "config.json").write_text(json.dumps({"model_type": "song", "auto_map": auto}))
        config = json.loads((TOY / "clip.json").read_text())
        del config["words"]
        text = config["model_cfg"]["text_cfg"]
        text["hf_tokenizer_name"] = str(folder)
        text[key] = {"trust_remote_code": True}
        model = here / "model"
        model.mkdir()
        shutil.copy(TOY / "clip.safetensors", model / "open_clip_model.safetensors")
        (model / "open_clip_config.json").write_text(json.dumps(config))

    return lay


def tower(here: Path) -> None:
    """A model whose text tower is transformers' own, with a configuration that brings code."""
    tokenizer("tokenizer_kwargs")(here)
    file = here / "model" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= {
        "hf_model_name": str(here / "tokenizer"), "hf_model_config": {"trust_remote_code": True},
        "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp",
    }  # fmt: skip
    file.write_text(json.dumps(config))


def postscript(here: Path) -> None:
    """EPS under the names of other formats, and a Ghostscript that sings (see `check`)."""
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("1.png", "1.jpg"):
        (here / "pictures" / name).write_text(text)
    (here / "classes" / "red_ball" / "9.jpg").write_text(text)
    content = json_files()["pairs.json"]
    content["items"][0]["images"][0] = "pictures/1.jpg"
    (here / "pairs.json").write_text(json.dumps(content))
    shutil.rmtree(here / "shards")
    shard(here / "shards" / "0.tar", here / "pictures")


def index(here: Path) -> None:
    """Arrays of objects, which NumPy pickles, as the index of shards."""
    from training.shards import digest

    songs = np.array([Song(here)] * 4, dtype=object)
    stamps = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in [here / "shards/0.tar"]]
    arrays = {"shard": songs, "offset": songs, "size": songs, "problems": songs}
    np.savez(here / "shards" / f".pictures-{digest(stamps)}.npz", **arrays)
    [stamp] = stamps
    np.savez(here / "shards" / f".pictures-{digest(stamp)}.part.npz", **arrays)


def cache(here: Path) -> None:
    """The same as a file of features."""
    songs = np.array([Song(here)] * 8, dtype=object)
    np.save(here / "cache" / "features-00000.npy", songs)


def optimizer(here: Path) -> None:
    """Checkpoints with a pickle where the moments are, and one beside them."""
    for step in (here / "runs").glob("*/stage*/step_*"):
        for name in ("moments.safetensors", "optimizer.pt", "trained.pt"):
            (step / name).write_bytes(pickle.dumps(Song(here)))


def torchvision(here: Path) -> None:
    """What torchvision unpickles by itself: ImageNet's list of classes and CIFAR-100."""
    import torch

    root = here / "data"
    for split in ("val", "train"):
        (root / split / "n01440764").mkdir(parents=True)
        shutil.copy(here / "pictures" / "0.png", root / split / "n01440764" / "a.png")
    torch.save(({"n01440764": Song(here)}, [Song(here)]), root / "meta.bin")
    (root / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (root / "cifar-100-python" / name).write_bytes(pickle.dumps(Song(here)))


# ------------------------------------------------------------------------------------------------
# Who reads them
# ------------------------------------------------------------------------------------------------
PERCEIVER = tuple(
    word for word in TRAIN if word not in
    ("--rope_axes", "4,6,6", "--vector_dim", "12", "--context_dim", "20")
) + ("--denoiser", "perceiver")  # fmt: skip
MODEL = (
    (*JUDGE, "--model", "{here}/model"),
    ("eval_zeroshot.py", *JUDGE[3:], "--model", "{here}/model", "--classify", "{here}/classes"),
    (*TRAIN, "--clip", "{here}/model"),
    (*EXPORT, "{here}/model"),
)
SMALL = "ViT-S-32-alt"  # the smallest that open_clip knows by name
CANARIES = (
    Canary("pickle as .pt", pickled("song.pt"), (
        (*JUDGE, "--model", f"{SMALL}:{{here}}/song.pt"), (*EXPORT, f"{SMALL}:{{here}}/song.pt"),
        (*PERCEIVER, "--vqgan", "{here}/song.pt"), (*TRAIN, "--vae", "{here}/song.pt"))),
    Canary("pickle as torch's zip", pickled("zip.pt"), (
        (*JUDGE, "--model", f"{SMALL}:{{here}}/zip.pt"), (*PERCEIVER, "--vqgan", "{here}/zip.pt"))),
    Canary("pickle as .ckpt", pickled("song.ckpt"), (
        (*PERCEIVER, "--vqgan", "{here}/song.ckpt"), (*TRAIN, "--vae", "{here}/song.ckpt"))),
    Canary("pickle as .safetensors", pickled("song.safetensors"), (
        (*TRAIN, "--vae", "{here}/song.safetensors"),
        (*JUDGE, "--model", f"{SMALL}:{{here}}/song.safetensors"))),
    Canary("optimizer state", optimizer, (
        (*TINY, "--runs", "{here}/runs", "--name", "half", "--cache", "{here}/cache"),)),
    Canary("tokenizer_kwargs", tokenizer("tokenizer_kwargs"), MODEL),
    Canary("hf_tokenizer_kwargs", tokenizer("hf_tokenizer_kwargs"), MODEL[:1]),
    Canary("text tower of transformers", tower, MODEL),
    Canary("EPS as .jpg", postscript, (
        (*TRAIN, "--data", "{here}/pictures"), (*TRAIN, "--data", "{here}/shards"),
        (*JUDGE, "--model", str(TOY / "clip.safetensors")),
        ("eval_zeroshot.py", *JUDGE[3:], "--model", str(TOY / "clip.safetensors"), "--classify",
         "{here}/classes"))),
    Canary("array of objects as an index", index, ((*TRAIN, "--data", "{here}/shards"),)),
    Canary("array of objects as features", cache, (
        (*TINY, "--runs", "{here}/runs", "--name", "half", "--cache", "{here}/cache"),)),
    Canary("what torchvision unpickles", torchvision, (
        ("eval_zeroshot.py", *JUDGE[3:], "--model", str(TOY / "clip.safetensors"), "--root",
         "{here}/data", "--classify", "imagenet"),
        ("eval_zeroshot.py", *JUDGE[3:], "--model", str(TOY / "clip.safetensors"), "--root",
         "{here}/data", "--classify", "cifar100"))),
)  # fmt: skip


def cases(forks: Forks, folder: Path, world: Path | None = None) -> list[Case]:
    """As __init__.py has it: one for each canary and command; `world` as in inputs.py."""
    world = world or make_world(forks, folder)
    found = []
    for canary in CANARIES:
        for command in canary.commands:
            name = f"{canary.name}, {' '.join(command[:1])} {' '.join(command[-2:])}"
            check = check_of(canary, command, world)
            found.append(Case("files that carry code: none of it runs", name, check))
    return found


def check_of(canary: Canary, command: tuple[str, ...], world: Path) -> Callable:
    """Lays the canary, gives the command, and listens."""

    def check(forks: Forks, here: Path) -> None:
        for name in ("pictures", "classes", "shards", "runs", "cache"):
            shutil.copytree(world / name, here / name)
        (here / "pairs.json").write_text((world / "pairs.json").read_text())
        canary.lay(here)
        (here / "bin").mkdir()
        for program in ("gs", "gswin32c", "gswin64c", "djpeg", "fig2dev"):
            script = here / "bin" / program
            script.write_text(f"#!/bin/sh\n: > {here / MARK}\nexit 1\n")
            script.chmod(0o755)
        # Nothing is to be fetched, and the code of a model is looked for in a folder of the case.
        env = {"PATH": f"{here / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
               "HF_MODULES_CACHE": str(here / "modules")}  # fmt: skip
        words = [word.replace("{here}", str(here)) for word in command]
        ended = forks.run(words, here / "said.txt", 60, env=env, memory_gb=4)
        assert not (here / MARK).exists(), "its code ran"
        if problem := problem_of(EITHER, ended):
            raise AssertionError(f"{problem}; {ended.lines[-1][:300] if ended.lines else ''}")

    return check
