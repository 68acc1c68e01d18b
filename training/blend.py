"""The dial after training: enhanced CLIPs at any strength, averaged, or added.

    python -m training.blend runs/demo --weights 0.5 --out runs/demo-half
    python -m training.blend runs/demo runs/demo-perceiver --out runs/average
    python -m training.blend runs/demo runs/demo-perceiver --weights 0.7,0.7 --out runs/sum

An enhanced CLIP θ_i is the original θ0 plus a change of its weights, and a change can be turned
down, turned up, and added to another:

    θ = θ0 + Σ_i w_i · (θ_i − θ0)

    one model            w = 0 is the original, 1 the enhanced model, 0.5 halfway, 2 twice the
                         change. Between 0 and 1, what was learnt is traded for what was known
                         before: WiSE-FT (Wortsman et al., CVPR 2022)
    several, sum is 1    a weighted average: model soups (Wortsman et al., ICML 2022)
    several, sum above   the changes are added, as if each had learnt something of its own: task
                         arithmetic (Ilharco et al., ICLR 2023)

A network is not linear in its weights, so nothing promises that this works. What speaks for it is
that all changes begin at one original and are small, as stage 2's are. Measure what you get:
eval_mmvp.py says what was gained, eval_zeroshot.py what it cost, benchmarks/strength.py both on the
toy world.

All is computed on `enhanced/`, in which LoRA's adapters are folded into the weights. So it makes no
difference whether a run trained adapters or the weights themselves. (`lora.scale_lora` turns the
same dial on adapters that are still apart.)
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from settings import settings_of_run
from training.preflight import differences
from util.cli import OneLineParser, printable, run_command

# Of one weight. Less than nothing would unlearn, and beyond twice the change nothing was measured.
LEAST, MOST = 0.0, 2.0
WEIGHTS, CONFIG, CARD = FILES = "open_clip_model.safetensors", "open_clip_config.json", "README.md"
MARK = "tags: [clip, genhancer, blend]"  # in the head of our cards: what --out may replace
HELP = {
    "models": "run (runs/NAME) or folder of an enhanced model, as in eval_mmvp.py --model",
    "--weights": "one number from 0 to 2 a model, with commas between (default: equal, sum 1)",
    "--out": "folder to write; of what lies there, only an older blend is replaced",
    "--original": "the CLIP that they were made of, as in train.py --clip "
    "(default: what each run's config.json says)",
}


# ------------------------------------------------------------------------------------------------
# The command line. A mistake in it is answered before PyTorch and open_clip are imported, which
# takes seconds.
# ------------------------------------------------------------------------------------------------
def command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """`folders` of the models, their `weights`, `originals` (spellings) and `out`.

    Raises: ValueError or OSError for what is not there, does not go together, or would be lost.
    """
    summary, examples, *more = __doc__.split("\n\n")
    parser = OneLineParser(
        prog="python -m training.blend",
        description=f"{summary}\n\n{examples}",
        epilog="\n\n".join(more),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=HELP["models"])
    parser.add_argument("--weights", metavar="W,W,…", help=HELP["--weights"])
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=HELP["--out"])
    parser.add_argument("--original", default="", metavar="CLIP", help=HELP["--original"])
    args = parser.parse_args(arguments)
    args.folders = [folder_of(model) for model in args.models]
    if len({folder.resolve() for folder in args.folders}) < len(args.folders):
        raise ValueError("the same model is named twice: name it once, with the sum of its weights")
    args.weights = numbers_of(args.weights, len(args.folders))
    args.originals = originals_of(args.folders, args.original)
    check_out(args.out, [*args.folders, *(Path(o.rpartition(":")[2]) for o in args.originals)])
    return args


def folder_of(model: str) -> Path:
    """A run stands for its enhanced model: runs/NAME → runs/NAME/enhanced.

    Raises: FileNotFoundError where there is no model, or half of one.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"{model} is no folder: give a run, as runs/NAME, or its enhanced/")
    places = folder, folder / "enhanced"
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{model} holds no enhanced model: neither there nor in its enhanced/ is {CONFIG}, "
            "which train.py writes at the end of stage 2"
        )
    if not (found / WEIGHTS).is_file():
        raise FileNotFoundError(f"{found / WEIGHTS} is missing: a model needs config and weights")
    return found


def numbers_of(text: str | None, count: int) -> list[float]:
    """--weights as numbers, by default those of a plain average. Raises: ValueError."""
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        line = f"--weights {text!r}: give one number a model, with commas between, as 0.5,0.5"
        raise ValueError(line) from None
    check_weights(weights, count)
    return weights


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raises: ValueError where there is not one number from 0 to 2 for each of `count` models."""
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models: give one a model")
    for weight in weights:
        if not (math.isfinite(weight) and LEAST <= weight <= MOST):
            raise ValueError(f"weight {weight}: must be a number from {LEAST:g} to {MOST:g}")


def originals_of(folders: Sequence[Path], given: str = "") -> list[str]:
    """The spellings of θ0, each once: `given`, or what the runs were started with.

    Raises: ValueError for a folder that is not of a run, where none is given.
    """
    if given:
        return [given]
    found = []
    for folder in folders:
        try:
            found.append(settings_of_run(folder.resolve().parent).clip)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}: nothing says which CLIP it was made of ({error}); name that CLIP with "
                "--original"
            ) from None
    return list(dict.fromkeys(found))


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Raises: OSError where no folder can be, ValueError where something would be lost."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out {out}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--out {out}: nothing can be written in {there}; give another")
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out} is {path}, or holds it: give a folder of its own")
    card = out / CARD
    ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    if not ours and any((out / name).exists() for name in FILES):
        raise ValueError(f"--out {out} holds something else than a blend: give another folder")


if __name__ == "__main__":
    run_command(command_line, imports_follow=True)

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrained.backbones import ClipInfo, describe_clip, load_clip
from training.enhanced import how_to_load, without_path
from util.files import fingerprint, save_tensors, write_atomically


# ------------------------------------------------------------------------------------------------
# The arithmetic
# ------------------------------------------------------------------------------------------------
@torch.no_grad()
def blend(
    original: dict[str, Tensor],
    enhanced: Sequence[dict[str, Tensor]],
    weights: Sequence[float],
    names: Sequence[str] = (),
) -> dict[str, Tensor]:
    """θ0 + Σ_i w_i · (θ_i − θ0), tensor by tensor.

    Weights 0 give the original bit by bit, one model at weight 1 gives that model.

    Args:
        original, enhanced: whole CLIPs by open_clip's names, on the CPU, all of the same shapes.
        weights: one from 0 to 2 for each of `enhanced`.
        names: what errors call the models; by default "model 1", "model 2", …
    Returns: tensors by the names of `original`, in the types of the first enhanced model. What was
        not added to, as all of the text tower, may share its memory with `original`.
    Raises: ValueError as `check_weights` and `check_fit`, and for a sum that is not finite.
    """
    check_weights(weights, len(enhanced))
    names = names or [f"model {number}" for number in range(1, len(enhanced) + 1)]
    for name, state in zip(names, enhanced, strict=True):
        check_fit(original, state, name)
    # What has no weight is left out: −0.0 + 0 · change is +0.0, which is not the original's bits.
    used = [(weight, state) for weight, state in zip(weights, enhanced, strict=True) if weight]
    result = {}
    for key, start in original.items():
        total = start
        if is_learnt(key):
            # In float64 the difference of two float32 is exact, but for numbers 2²⁹ times apart.
            # So nothing is rounded before the sum is: θ0 + 1 · (θ1 − θ0) is θ1.
            for weight, state in used:
                total = total.double() + weight * (state[key].double() - start.double())
        result[key] = total.to(enhanced[0][key].dtype)
        if not torch.isfinite(result[key]).all():
            raise ValueError(f"{key} is not finite in the sum: is one of the models broken?")
    return result


def is_learnt(key: str) -> bool:
    """GenHancer moves the image tower alone."""
    return key.startswith("visual.")


def check_fit(original: dict[str, Tensor], state: dict[str, Tensor], name: str) -> None:
    """Can `state` have been made of this original? Shapes that differ could still be added, by
    broadcasting, and the sum of two models of different originals is a model, only a bad one.

    Raises: ValueError naming the first tensor that is missing, left over, of another shape, or of
        a text tower that is not the original's.
    """
    for key in sorted(original.keys() | state.keys()):
        here, there = (tuple(s[key].shape) if key in s else "absent" for s in (original, state))
        if here != there:
            raise ValueError(f"{name} does not fit the original: {key} is {there}, there {here}")
        if not is_learnt(key) and not torch.equal(original[key].to(state[key].dtype), state[key]):
            raise ValueError(
                f"{name} was made of another CLIP: its {key} is not the original's, and "
                "GenHancer trains no text tower; name the right CLIP with --original"
            )


# ------------------------------------------------------------------------------------------------
# In: models of one original
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Family:
    """Enhanced models and what they were made of, as tensors on the CPU."""

    info: ClipInfo
    """of all of them: architecture, preprocessing, words"""
    base: str
    """the spelling of the original"""
    original: dict[str, Tensor]
    """θ0, in float32"""
    enhanced: dict[str, dict[str, Tensor]]
    """folder → θ_i, in the type of its file"""


def read_family(folders: Sequence[Path], originals: Sequence[str]) -> Family:
    """Weights of models that can be blended. Configs are compared first, for they are small.

    Args: folders: of `folder_of`; originals: of `originals_of`.
    Raises: ValueError or OSError naming the file or folder at fault.
    """
    infos = {str(folder): describe_clip(str(folder))[0] for folder in folders}
    first, info = next(iter(infos.items()))
    for name, other in infos.items():
        if found := differences(info.open_clip_config(), other.open_clip_config()):
            raise ValueError(f"{name} is of another architecture than {first} ({found[0]})")
    state = read_original(originals, info, first)
    return Family(info, originals[0], state, {name: read_tensors(Path(name)) for name in infos})


def read_original(originals: Sequence[str], info: ClipInfo, name: str) -> dict[str, Tensor]:
    """θ0. The same file may go by several spellings, as from two machines; what counts is what it
    holds.

    Args: info, name: of an enhanced model, which must have the same architecture.
    Raises: ValueError where an original cannot be loaded, is of another architecture than `info`,
        or is not the same as the first.
    """
    clips = []
    for spelling in originals:
        try:
            about = describe_clip(spelling)[0]
            found = differences(about.model_cfg, info.model_cfg)
            clips += [] if found else [load_clip(spelling)[0]]
        except (OSError, ValueError) as error:
            line = f"the original cannot be loaded ({error}); say where it is with --original"
            raise ValueError(line) from None
        if found:
            line = f"{name} is of another architecture than the original {spelling} ({found[0]})"
            raise ValueError(line)
    for spelling, clip in zip(originals[1:], clips[1:], strict=True):
        if fingerprint(clip) != fingerprint(clips[0]):
            raise ValueError(
                f"the models were made of different originals, {originals[0]} and {spelling}: "
                "their changes do not begin at the same weights, and cannot be added"
            )
    return clips[0].state_dict()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of an enhanced model as they lie there. Raises: ValueError naming the file."""
    try:
        return load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises kinds of its own
        why = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS} is no whole safetensors file ({why})") from None


# ------------------------------------------------------------------------------------------------
# Out: an open_clip folder
# ------------------------------------------------------------------------------------------------
def write_blend(out: Path, tensors: dict[str, Tensor], info: ClipInfo, card: str) -> None:
    """Weights, config and card, as `enhanced/` has them.

    All three are written beside the old ones and flushed before the first takes its place. So a
    disk that is full, or an interruption, leaves an older blend whole, and its card true.
    """
    out.mkdir(parents=True, exist_ok=True)
    new = out / f".tmp{os.getpid()}"
    try:
        save_tensors(tensors, new / WEIGHTS, {"format": "pt"})
        write_atomically(new / CONFIG, json.dumps(info.open_clip_config(), indent=1))
        write_atomically(new / CARD, card)
        for name in FILES:
            os.replace(new / name, out / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()  # works on empty folders alone: that of a blend that could not be written


def model_card(info: ClipInfo, base: str, folders: Sequence[Path], weights: Sequence[float]) -> str:
    """What was blended with which weights, and how to use it, as Markdown. Like the card of an
    enhanced model it names no path of the machine."""
    used = zip(folders, weights, strict=True)
    rows = "\n".join(f"| {name_of(folder)} | {weight:g} |" for folder, weight in used)
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
{MARK}
---
# CLIPs enhanced by GenHancer, blended

Base: `{without_path(base)}`. The text tower is unchanged. The image tower is the base's plus what \
these models have learnt, each change of weights times a number:

| model | times |
|---|---|
{rows}

θ = θ0 + Σ w · (θ_i − θ0): all zeros give the base, a single 1 that model (WiSE-FT, model soups, \
task arithmetic). How a model was trained, its own card says. Nothing was trained here and nothing \
measured: a blend is another model than its parts, with figures of its own.

## With open_clip

{how_to_load(info)}

In transformers' layout, for LLaVA and others: `python export_hf.py`, from open_clip's.

Licence: these weights are derived from the base model's and stand under its licence.
"""


def name_of(folder: Path) -> str:
    """What a person calls a model: runs/NAME/enhanced → NAME, and other folders by their own."""
    place = folder.resolve()
    return (place.parent if place.name == "enhanced" else place).name


def main() -> None:
    """The command."""
    args = command_line()
    family = read_family(args.folders, args.originals)
    models = family.enhanced
    tensors = blend(family.original, list(models.values()), args.weights, list(models))
    card = model_card(family.info, family.base, args.folders, args.weights)
    write_blend(args.out, tensors, family.info, card)
    out = printable(str(args.out))
    print(f"written: {out}, an open_clip folder as enhanced/ is one. What it is worth:")
    compared = (family.base, *models, str(args.out))
    flags = " ".join(f"--model {shlex.quote(m)}" for m in compared)
    print(printable(f"python eval_mmvp.py {flags}"))


if __name__ == "__main__":
    run_command(main, lambda: "--out is as it was")
