"""Tiny runs of train.py, and whether two of them left the same behind.

A plan is a command line. Undisturbed, it is the measure: what any disturbed run of the same command
line has left, once it was started again, must be equal to that bit by bit. Only what says when and
where a run took place may differ (`TIMES`, `LOCAL`).
"""

import json
import re
import shlex
import socket
from dataclasses import dataclass, field
from pathlib import Path

from . import disk
from .forks import Ended, Forks

# Both stages, three checkpoints each of which two are kept, lines of metrics that span checkpoints,
# a sample grid at the end of each stage, and a cache on the disk.
COMMON = shlex.split(
    "--toy_images 12 --width 32 --heads 2 --batch 4 --micro_batch 4 --warmup 1 --stage1_steps 3 "
    "--stage2_steps 3 --log_every 2 --save_every 1 --sample_every 100 --keep 2 --lora_rank 2"
)
FLOW = shlex.split("--blocks 1 --rope_axes 4,6,6 --vector_dim 12 --context_dim 20")
PERCEIVER = shlex.split("--layers 1")
SHORT = shlex.split("--stage1_steps 1 --stage2_steps 1 --keep 1")


@dataclass(frozen=True)
class Plan:
    """A tiny run."""

    name: str
    flags: tuple[str, ...]
    cache: bool = True
    """keep features in a folder beside the runs"""

    def command(self, folder: Path, *more: str) -> list[str]:
        """The command line, with everything that it writes in `folder`."""
        where = ["--runs", str(folder / "runs"), "--name", "run"]
        where += ["--cache", str(folder / "cache")] if self.cache else []
        return ["train.py", *where, *self.flags, *more]


PLANS = {
    plan.name: plan
    for plan in (
        Plan("flow", (*COMMON, *FLOW)),
        Plan("perceiver", (*COMMON, "--denoiser", "perceiver", *PERCEIVER)),
        # Few writes, so that each of them can fail: one step, one checkpoint per stage.
        Plan("short", (*COMMON, "--denoiser", "perceiver", *PERCEIVER, *SHORT), cache=False),
        Plan("both", (*COMMON, "--denoiser", "flow+perceiver", *FLOW, *PERCEIVER), cache=False),
    )
}


@dataclass(frozen=True)
class Undisturbed:
    """A plan that was carried out, in a folder of its own."""

    plan: Plan
    folder: Path
    calls: list[tuple] = field(repr=False)
    """everything that it did to its disk, in order"""
    seconds: float
    """how long it took"""


def undisturbed(forks: Forks, plan: Plan, folder: Path, ranks: int = 1) -> Undisturbed:
    """The measure for all others."""
    folder, journal = folder / plan.name, folder / f"{plan.name}.journal"
    folder.mkdir()
    watch = {"folder": str(folder), "journal": str(journal)}
    ended = run_ranks(forks, plan, folder, ranks, fault=watch)
    assert ended.code == 0, f"{plan.name}, undisturbed: {ended.said[-2000:]}"
    assert not litter(folder), f"{plan.name}, undisturbed, leaves {litter(folder)}"
    return Undisturbed(plan, folder, disk.calls(journal), ended.seconds)


# ------------------------------------------------------------------------------------------------
# What they leave behind
# ------------------------------------------------------------------------------------------------
TIMES = {"images_per_s", "memory_gb"}  # of a line of metrics.jsonl
LOCAL = {"date", "commit"}  # of a stage in config.json
DRAWN = {"token", "sha256"}  # of a cache's about.json: a number that tells it from others


def contents(folder: Path) -> dict[str, object]:
    """Every file below a folder by its name there: bytes, or JSON without what may differ."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name.endswith(".lock"):
            continue
        if file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        elif file.name == "config.json":
            stages = json.loads(file.read_text())["stages"].items()
            found[name] = {s: {k: v for k, v in a.items() if k not in LOCAL} for s, a in stages}
        elif file.name == "about.json":
            about = json.loads(file.read_text())
            found[name] = {k: v for k, v in about.items() if k not in DRAWN}
        else:
            found[name] = file.read_bytes()
    return json.loads(json.dumps(found, default=bytes.hex).replace(str(folder), "FOLDER"))


def unequal(folder: Path, measure: Path) -> list[str]:
    """Files that are in one of two folders only, or differ."""
    mine, other = contents(folder), contents(measure)
    found = [f"{name} is missing" for name in sorted(other.keys() - mine.keys())]
    found += [f"{name} is one too many" for name in sorted(mine.keys() - other.keys())]
    both = sorted(mine.keys() & other.keys())
    return found + [f"{name} differs" for name in both if mine[name] != other[name]]


def litter(folder: Path) -> list[str]:
    """Temporary files and folders that are still there."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "tmp" in p.name.lower())


def newest(folder: Path) -> dict[str, int]:
    """Of each stage that has checkpoints, by its folder in `folder`: the step of the newest."""
    found: dict[str, int] = {}
    for state in sorted(folder.rglob("step_*/state.json")):
        stage = str(state.parent.parent.relative_to(folder))
        found[stage] = int(state.parent.name.removeprefix("step_"))
    return found


# ------------------------------------------------------------------------------------------------
# Disturbed, and started again
# ------------------------------------------------------------------------------------------------
def disturbed(
    forks: Forks, plan: Plan, folder: Path, harm: str, call: tuple, half: bool = False
) -> Ended:
    """Start a plan, and do harm at one of its calls. When this returns, it has been done."""
    journal = folder.with_suffix(".journal")
    journal.unlink(missing_ok=True)
    fault = {"folder": str(folder), "journal": str(journal), "harm": harm, "at": list(call)}
    said, fault = folder.with_suffix(".said"), {**fault, "half": half}
    ended = forks.run(plan.command(folder), said, fault=fault, limit_s=PATIENCE)
    assert not ended.hung, f"the disturbed run hangs: {tail(ended)}"
    assert disk.struck(journal), f"the run never came to {call}: {tail(ended)}"
    return ended


def goes_on(
    forks: Forks, plan: Plan, folder: Path, measure: Path, but: str = "never", ranks: int = 1
) -> None:
    """The same command once more: it goes on from the newest checkpoint that is there, leaves what
    an undisturbed run leaves, bit by bit, and nothing else.

    Args: measure: the folder of the undisturbed run; but: files that need not be equal.
    """
    had = newest(folder)
    ended = run_ranks(forks, plan, folder, ranks)
    assert not ended.hung, f"the second start hangs: {tail(ended)}"
    assert ended.code == 0, f"the second start ends with {ended.code}: {tail(ended)}"
    for stage, denoiser, step in STARTS.findall(ended.said):
        own, run = f"runs/run/{denoiser}/stage{stage}", f"runs/run/stage{stage}"
        there = had.get(own, had.get(run, 0))
        assert int(step) == there, f"stage {stage} goes on from step {step}, {there} was there"
    found = [line for line in unequal(folder, measure) if but not in line]
    assert not found, f"not as undisturbed: {', '.join(found[:6])}"
    assert not (found := litter(folder)), f"left behind: {', '.join(found)}"


def run_ranks(forks: Forks, plan: Plan, folder: Path, ranks: int = 1, **how) -> Ended:
    """A plan on so many processes, without torchrun: they are told who they are, and meet.

    Returns: how the main one ended.
    """
    command, said = plan.command(folder), folder.with_suffix(".said")
    if ranks == 1:
        return forks.run(command, said, limit_s=PATIENCE, **how)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    pids = []
    for rank in range(ranks):
        own = {**env, "RANK": str(rank), "WORLD_SIZE": str(ranks)}
        output = said if rank == 0 else said.with_suffix(f".said{rank}")
        pids.append(forks.start(command, output, env=own, **(how if rank == 0 else {})))
    return [forks.wait(pid, PATIENCE) for pid in pids][0]


PATIENCE = 120  # seconds for a tiny run, on a machine with other things to do
STARTS = re.compile(r"stage (\d), (\S+): .* trainable parameters, step (\d+) of")


def complaint(ended: Ended) -> str:
    """The one line of a command that could not do its work; anything else that it says beside what
    a run always says is one too much. (Without a sample grid a run goes on: if that is all that
    happened, it is the one line.)"""
    assert "Traceback" not in ended.said, f"a traceback: {ended.said[-1500:]}"
    other = complaints(ended)
    other = [line for line in other if not line.startswith("no sample grid ")] or other
    assert len(other) == 1, f"{len(other)} lines instead of one: {' / '.join(other[:8])}"
    return other[0]


USUAL = re.compile(r"stage \d, |enhanced model: ")


def tail(ended: Ended) -> str:
    """The end of what a command said."""
    return " / ".join(ended.lines[-12:])


def complaints(ended: Ended) -> list[str]:
    """What a command says beside what a run always says."""
    return [line for line in ended.lines if not USUAL.match(line)]
