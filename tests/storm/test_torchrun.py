"""Two processes under torchrun: one killed, both killed, or torchrun's own agent.

After a rank torchrun starts all again by itself (--max-restarts). After its agent nobody is left
who would end the ranks: they must notice, or they would train on beside the next start.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from . import disk, runs
from .forks import ROOT, Forks
from .runs import PLANS, Plan, Undisturbed, undisturbed
from .table import Case, spread, try_case
from .test_kills import said

RANK = "torchrun, 2 processes: kill -9 of one of them, torchrun starts both again: bit-equal"
BOTH = "torchrun, 2 processes: kill -9 of both, started again: bit-equal"
AGENT = "torchrun, 2 processes: kill -9 of torchrun: both end with it, started again: bit-equal"
VICTIMS = {RANK: (["self"], ["1"]), BOTH: (["1", "self"],), AGENT: (["parent"],)}
RANKS = 2
SOON = 10.0  # seconds until a process that should end has done so


def cases(forks: Forks, folder: Path) -> list[Case]:
    """Each victim with each denoiser, the one early and the other late; and torchrun's agent with a
    model that is shared out. (Of a start with torchrun three processes import PyTorch.)
    """
    kills = [(title, victims) for title, all_ in VICTIMS.items() for victims in all_]
    flow = PLANS["flow"]
    shared = Plan("shared out", (*flow.flags, "--shard"))
    found = []
    for plan, tried in ((flow, kills), (PLANS["perceiver"], kills[::-1]), (shared, kills[-1:])):
        measure = undisturbed(forks, plan, folder, RANKS)
        calls = [c for c in measure.calls if "/stage" in c[1] and c[0] != "write"]
        calls = spread(calls, len(tried) + 2)[1:-1]
        found += [case(*kill, measure, call) for kill, call in zip(tried, calls, strict=True)]
    return found


def case(title: str, victims: list, measure: Undisturbed, call: tuple) -> Case:
    name = f"{title}: {measure.plan.name}, {' and '.join(victims)} at {said(call, False)}"
    return Case(title, name, partial(check, title, victims, measure, call))


def check(
    title: str, victims: list, measure: Undisturbed, call: tuple, forks: Forks, folder: Path
) -> None:
    about = folder.with_suffix(".about")
    about.mkdir()
    who = [str(about / v) if v.isdigit() else v for v in victims]
    fault = {"folder": str(folder), "journal": str(about / "journal"), "at": call}
    fault = json.dumps({**fault, "harm": "kill", "victims": who})
    again = ["--max-restarts", "2"] if title == RANK else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *again]
    torchrun += ["--nproc_per_node", str(RANKS), "-m", "tests.storm.disk", fault]
    code, words = run(torchrun + measure.plan.command(folder), about / "said")
    assert disk.struck(about / "journal"), f"the run never came to {call}: {words[-500:]}"
    if title == RANK:
        assert code == 0, f"torchrun ends with {code}: {words[-1500:]}"
        found = runs.unequal(folder, measure.folder) + runs.litter(folder)
        assert not found, f"not as undisturbed: {', '.join(found[:6])}"
    else:
        assert code, "torchrun does not know that it failed"
    end = time.monotonic() + SOON
    while alive := [rank for rank in range(RANKS) if lives(about / str(rank))]:
        assert time.monotonic() < end, f"rank {alive} lives on"
        time.sleep(0.05)
    ended = title == RANK or not (folder / "runs/run/enhanced/README.md").exists()
    assert ended, "the ranks have trained on to the end, though nobody was left to end them"
    runs.goes_on(forks, measure.plan, folder, measure.folder, ranks=RANKS)


def run(command: list, output: Path) -> tuple[int, str]:
    """Exit code and words of a command that is no fork. It is killed when its time is up."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output, "w") as file:
        how = {"stdout": file, "stderr": file, "cwd": ROOT, "env": env, "start_new_session": True}
        running = subprocess.Popen(command, **how)
        try:
            code = running.wait(2 * runs.PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise AssertionError(f"hangs: {output.read_text()[-500:]}") from None
    return code, output.read_text()


def lives(number: Path) -> bool:
    """Whether the process with the number in that file runs. (One that is dead and that nobody has
    asked for is still listed, as a zombie.)"""
    try:
        state = Path(f"/proc/{number.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_no_rank_outlives_torchrun(forks, tmp_path):
    measure = undisturbed(forks, PLANS["short"], tmp_path, RANKS)
    [call] = [c for c in measure.calls if "/stage1/" in c[1] and c[0] == "rename"]
    wrong, _ = try_case(case(AGENT, ["parent"], measure, call), forks, tmp_path / "case")
    assert not wrong, wrong
