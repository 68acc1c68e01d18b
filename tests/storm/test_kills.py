"""Killed anywhere, a run goes on as if nothing had been: kill -9 at disk calls and at random times.

What is compared is everything that a run leaves: both stages' checkpoints, metrics.jsonl, sample
grids, the enhanced model with its card, config.json and the feature cache.
"""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from . import runs
from .forks import Forks
from .runs import PLANS, Undisturbed, undisturbed
from .table import Case, spread, try_case

KILLED = "{}: kill -9 before or half-way through a disk call, started again: bit-equal, no litter"
POWER = "{}: power cut at a disk call, what was not flushed is lost, started again: the same"
TWICE = "{}: kill -9 at a disk call, and again in the second start"
ANY_TIME = "{}: kill -9 at a random time"
# How many of each, by plan.
COUNTS = {
    "flow": {KILLED: 36, POWER: 16, TWICE: 4, ANY_TIME: 4},
    "perceiver": {KILLED: 36, POWER: 16, TWICE: 4, ANY_TIME: 4},
    "both": {KILLED: 12, POWER: 4},
}


def cases(forks: Forks, folder: Path) -> list[Case]:
    """All kills of the storm."""
    found = []
    for name, counts in COUNTS.items():
        measure = undisturbed(forks, PLANS[name], folder)
        for title, count in counts.items():
            found += MAKERS[title](measure, title.format(name), count)
    return found


def places(measure: Undisturbed, count: int) -> list[tuple[tuple, bool]]:
    """Calls, and whether to strike half-way. Most calls are writes of one tensor after the other,
    and one is like the next: they are a third of what is chosen, each struck half-way."""
    alike = [call for call in measure.calls if call[0] == "write"]
    others = [call for call in measure.calls if call[0] != "write"]
    written = [(call, True) for call in spread(alike, count // 3)]
    return written + [(call, False) for call in spread(others, count - len(written))]


def at_calls(harm: str, measure: Undisturbed, title: str, count: int) -> list[Case]:
    """Killed once."""

    def check(call: tuple, half: bool, forks: Forks, folder: Path) -> None:
        ended = runs.disturbed(forks, measure.plan, folder, harm, call, half)
        assert ended.code == -signal.SIGKILL, f"it ended with {ended.code}: {runs.tail(ended)}"
        runs.goes_on(forks, measure.plan, folder, measure.folder)

    return [
        Case(title, f"{title}: {harm} at {said(call, half)}", partial(check, call, half))
        for call, half in places(measure, count)
    ]


def said(call: tuple, half: bool) -> str:
    """A call in words."""
    what, path, number = call
    return f"{'half of ' * half}{what} {number} of {path}"


def twice(measure: Undisturbed, title: str, count: int) -> list[Case]:
    """A kill somewhere in stage 1, and one in stage 2 of the start that goes on from there."""

    def check(first: tuple, second: tuple, forks: Forks, folder: Path) -> None:
        for call in (first, second):
            runs.disturbed(forks, measure.plan, folder, "kill", call)
        runs.goes_on(forks, measure.plan, folder, measure.folder)

    early = [call for call in measure.calls if "/stage1" in call[1] and call[0] != "write"]
    late = [call for call in measure.calls if "/stage2" in call[1] and call[0] != "write"]
    pairs = zip(spread(early, count), spread(late, count), strict=True)
    return [
        Case(title, f"{title}: {said(one, False)}, {said(two, False)}", partial(check, one, two))
        for one, two in pairs
    ]


def at_any_time(measure: Undisturbed, title: str, count: int) -> list[Case]:
    """While it computes, loads, reads: at fixed random parts of the time that a run takes."""
    dice = random.Random(0)

    def check(part: float, forks: Forks, folder: Path) -> None:
        pid = forks.start(measure.plan.command(folder), folder.with_suffix(".said"))
        time.sleep(part * measure.seconds)
        os.kill(pid, signal.SIGKILL)
        forks.wait(pid, runs.PATIENCE)
        runs.goes_on(forks, measure.plan, folder, measure.folder)

    parts = [dice.random() for _ in range(count)]
    return [Case(title, f"{title}: {p:.0%} of the way", partial(check, p)) for p in parts]


MAKERS = {
    KILLED: partial(at_calls, "kill"),
    POWER: partial(at_calls, "power"),
    TWICE: twice,
    ANY_TIME: at_any_time,
}


# ------------------------------------------------------------------------------------------------
# A few of them, in every test run
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("harm", ["kill", "power"])
@pytest.mark.parametrize("number", range(2))
def test_a_killed_run_goes_on_bit_equal(forks, measures, tmp_path, harm, number):
    measure = measures["flow" if number % 2 else "perceiver"]
    case = at_calls(harm, measure, "", 5)[1 + number]
    wrong, _ = try_case(case, forks, tmp_path / "case")
    assert not wrong, wrong


def test_every_file_of_a_run_is_written_through_the_layer_that_fails(measures):
    """Were there a way around it, the storm would be calm there."""
    for measure in measures.values():
        touched = {call[1] for call in measure.calls if call[0] in ("rename", "link", "write")}
        for name in runs.contents(measure.folder):
            assert touched & {name, *map(str, Path(name).parents)}, name
