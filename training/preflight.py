"""What a start can be refused for in a moment, before PyTorch and any weights are loaded.

A run at full size needs minutes to load its models and, on the toy, half a minute to cache its
features. Nearly every mistake can be found without either: it is in the flags, in a path, or in
what the run folder says of itself. This file looks there, with nothing but Python's own library (a
test holds it to that), and writes nothing. What only the weights can tell is compared when they are
there: see `begin_or_resume` in training/stages.py.
"""

import importlib.util
import json
import re
from pathlib import Path

from settings import Settings, parts, relevant, run_directory, stage1_runs
from util.sealed import hash_of, unseal

PICTURES = ("images", "names", "samples")  # what `feature_cache.which` tells of a data set
UNREAD = "(unreadable)"  # instead of the hash of a picture


# ------------------------------------------------------------------------------------------------
# What checkpoints say of themselves
# ------------------------------------------------------------------------------------------------
def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    named = (p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name))
    whole = (p for p in named if (p / "state.json").is_file())
    return sorted(whole, key=lambda p: int(p.name[len("step_") :]))


def read_state(checkpoint: Path) -> dict:
    """The JSON of a checkpoint. Raises: ValueError where it is not what was written there."""
    try:
        state = unseal((checkpoint / "state.json").read_text(encoding="utf-8"))
        if missing := {"step", "settings", "files"} - state.keys():
            raise ValueError(f"it has no {min(missing)}")
        old = state["settings"]
        if "samples" not in old and re.fullmatch("[0-9a-f]{16}", old.get("names", "")):
            old |= {"names": UNREAD, "samples": UNREAD}  # once one hash of both: not to compare
        if checkpoint.name != f"step_{state['step']:08d}":
            raise ValueError(f"it is of step {state['step']}")
        return state
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint}: state.json cannot be read ({error})") from None


def verify(checkpoint: Path) -> None:
    """Read all of a checkpoint. Raises: ValueError naming the file that is not what was written."""
    for name, written in read_state(checkpoint)["files"].items():
        try:
            found = hash_of(checkpoint / name)
        except OSError as error:
            raise ValueError(f"checkpoint {checkpoint}: {name}: {error.strerror}") from None
        if found != written:
            raise ValueError(f"checkpoint {checkpoint}: {name} is not what was written there")


def newest_sound(folder: Path, check=read_state) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes `check`, and what is wrong with those after it. A damaged
    one costs the steps since the one before, not the run.

    Raises: ValueError where there are checkpoints, and not one of them is sound.
    """
    problems: list[str] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        try:
            check(checkpoint)
            return checkpoint, problems
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{problems[0]}; {folder} has no other: delete it to start afresh")
    return None, problems


def newest_in(folder: Path) -> Path | None:
    """The newest checkpoint whose state.json is sound."""
    return newest_sound(folder)[0]


def require_same(old: dict, new: dict, message: str) -> None:
    """Raises: ValueError where an entry of `new` differs from that of `old`; `message` may hold
    {what}, the entry, and {difference}."""
    for what, mine in new.items():
        if found := differences(old.get(what, {}), mine):
            said = ", ".join(found[:4]) + f" and {len(found) - 4} more" * (len(found) > 4)
            # Not str.format: the name of a folder in the message may hold braces of its own.
            raise ValueError(message.replace("{what}", what).replace("{difference}", said))


def differences(old: dict, new: dict, path: str = "") -> list[str]:
    """The keys at which two nested dicts differ, as "path: old → new". What could not be read is
    like anything."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = (json.loads(json.dumps(side.get(key))) for side in (old, new))  # tuples are lists
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{key}.")
        elif a != b and UNREAD not in (a, b):
            found.append(f"{path}{key}: {a} → {b}")
    return found


def other_run(folder: Path) -> str:
    """The message for a checkpoint that these settings could not have written."""
    return (
        f"{folder} differs from this run in its {{what}} ({{difference}}); choose another --name, "
        "or delete that folder to start afresh"
    )


def stages_of(settings: Settings) -> list[int]:
    """The stages that this start will go through."""
    first = not settings.end_to_end and not settings.stage1_from
    return [n for n in (1, 2) if settings.stage in (str(n), "both") and (n == 2 or first)]


def jobs_of(settings: Settings) -> list[tuple[Settings, int]]:
    """What this start does, in order: a stage, and the settings it runs with. Of several denoisers
    each learns to draw by itself."""
    found = [(alone, 1) for alone in parts(settings) if 1 in stages_of(settings)]
    return found + [(settings, 2)] * (2 in stages_of(settings))


SHAPE = (
    "denoiser", "blocks", "layers", "learnt_latents", "width", "heads", "rope_axes", "vector_dim",
    "context_dim", "guidance", "local_ratio",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Refusals
# ------------------------------------------------------------------------------------------------
def preflight(settings: Settings, ranks: int) -> None:
    """Raises: ValueError or FileNotFoundError, naming what is wrong, where, and what to do."""
    for job, _ in jobs_of(settings):
        check_batch(job, ranks)
    check_files(settings)
    check_run(settings)
    if settings.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard: not installed; pip install tensorboard, or drop the flag")


def check_batch(settings: Settings, ranks: int) -> None:
    """A global batch is made of whole pieces. Raises: ValueError where it is not."""
    if settings.batch % (settings.micro(ranks) * ranks):
        raise ValueError(
            f"--batch {settings.batch} is no multiple of micro_batch {settings.micro(ranks)} × "
            f"{ranks} ranks: the global batch is cut into pieces of that size"
        )


def check_files(settings: Settings) -> None:
    """Data and weights that must be on the disk. What is in them is read later."""
    if not settings.data and settings.preset != "toy":
        raise ValueError(
            f"--data is missing: preset {settings.preset} needs a folder of images, a list of "
            "them, or tar shards"
        )
    data = Path(settings.data)
    if settings.data and not any(c in settings.data for c in "*?[{"):
        if not data.exists():
            raise FileNotFoundError(f"--data: no folder and no file {data}")
        if data.is_dir() and not any(data.iterdir()):
            raise ValueError(f"--data: folder {data} is empty: no images, no tar shards")
    if "flow" in settings.denoisers and not settings.vae:
        raise ValueError(
            "--vae is missing: give FLUX.1's ae.safetensors (its Apache-2.0 'schnell' repository "
            "has it)"
        )
    if "perceiver" in settings.denoisers and not settings.vqgan:
        raise ValueError(
            "--vqgan is missing: give a taming-transformers f16 VQ-GAN (K = 1024 or 16384), as "
            "safetensors or as the published ckpt"
        )
    for name in ("vae", "flux", "vqgan"):
        file = getattr(settings, name)
        if file and not Path(file).is_file():
            raise FileNotFoundError(f"--{name}: no file {file}")
    clip = Path(settings.clip)
    if clip.suffix == ".safetensors" and ":" not in settings.clip and not clip.is_file():
        raise FileNotFoundError(f"--clip: weights file {clip} is missing")


def check_run(settings: Settings, pictures: dict | None = None) -> None:
    """What the run folder holds already must be what these settings would have written.

    Args: pictures: how many there are and which (`feature_cache.which`), once they are listed.
    """
    run = run_directory(settings)
    if not Path(settings.runs).is_dir() and Path(settings.runs).exists():
        raise ValueError(f"--runs {settings.runs} is a file: give a folder")
    for job, number in jobs_of(settings):
        check_checkpoint(job, number, pictures)
    first = list(zip(parts(settings), stage1_runs(settings), strict=True))
    if 1 in stages_of(settings) and checkpoints_in(run / "stage2"):
        for part, own in first:
            found = newest_in(own / "stage1")
            step = read_state(found)["step"] if found else 0
            if step < part.stage1_steps:
                raise ValueError(
                    f"{run / 'stage2'} began from a stage 1 of {step} steps: {part.stage1_steps} "
                    "would take its beginning away; choose another --name, or delete that folder"
                )
    if 1 not in stages_of(settings) and not settings.end_to_end:
        for part, own in first:
            check_stage1(part, own)


def check_checkpoint(settings: Settings, number: int, pictures: dict | None) -> None:
    """Of one stage: `check_run` asks this of each."""
    folder = run_directory(settings) / f"stage{number}"
    if found := newest_in(folder):
        old, mine = dict(read_state(found)["settings"]), relevant(settings, number)
        if pictures is None:
            old = {name: value for name, value in old.items() if name not in PICTURES}
        else:
            mine |= pictures
        # The denoiser first: another one differs in a dozen settings that follow from it.
        for names in ({"denoiser"}, old.keys() | mine.keys()):
            pair = ({"settings": {n: s.get(n) for n in names}} for s in (old, mine))
            require_same(*pair, other_run(folder))


def check_stage1(settings: Settings, run: Path) -> None:
    """What stage 2 is to start from: a stage 1 that exists, came to its end, and has the same
    shape."""
    newest = newest_in(run / "stage1")
    if not newest:
        raise ValueError(
            f"stage 2 needs stage 1, and {run / 'stage1'} holds no checkpoint: run --stage 1 "
            "first, or name a run that has one with --stage1_from"
        )
    # What shapes projectors and denoiser: stage 2 takes over stage 1's.
    shape = {n: v for n, v in relevant(settings, 1).items() if n in SHAPE}
    state = read_state(newest)
    old = {n: state["settings"].get(n) for n in shape}
    message = f"stage 1 in {newest} had other {{what}} ({{difference}}): give the same flags"
    require_same({"settings": old}, {"settings": shape}, message)
    # A denoiser that was stopped half-way teaches something, and nobody would notice. Whoever wants
    # it says how long its stage 1 was to last.
    step, whole = state["step"], min(state["steps"], settings.stage1_steps)
    if step < whole:
        raise ValueError(
            f"stage 1 in {run} has come to step {step} of {state['steps']}: let it end (--stage 1, "
            f"with the flags it was started with), or take it as it is with --stage1_steps {step}"
        )


def finished(settings: Settings) -> str:
    """A line that says so, where nothing is left to do; else ""."""
    run, said = run_directory(settings), []
    for job, number in jobs_of(settings):
        found = newest_in(run_directory(job) / f"stage{number}")
        step = read_state(found)["step"] if found else -1
        if step < job.steps(number):
            return ""
        whose = f" of {job.denoiser}" * (job is not settings)
        said.append(f"stage {number}{whose} at step {step}")
    enhanced = run / "enhanced"
    if 2 in stages_of(settings):
        if not (enhanced / "README.md").is_file():  # it is written last
            return ""
        said.append(f"enhanced model in {enhanced}")
    return f"{run} is finished: {', '.join(said)}. Choose another --name to train again."
