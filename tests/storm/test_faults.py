"""Disks that are full or broken, folders that vanish, a run that is told to stop: one line, an exit
code, nothing left lying about, and the next start goes on as if nothing had been.
"""

import re
from functools import partial
from pathlib import Path

import pytest

from . import runs
from .disk import NEEDS_SPACE
from .forks import Ended, Forks
from .runs import PLANS, Undisturbed, undisturbed
from .table import Case, spread, try_case
from .test_kills import said

EVERY_FULL = "disk full at every write of a run, half of it written: one line, then bit-equal"
EVERY_BROKEN = "I/O error at every write of a run: one line, then bit-equal"
FULL = "{}: disk full from a call on: one line, nothing left behind, then bit-equal"
BROKEN = "{}: a call fails with an I/O error: the same"
LIMIT = "{}: file-size limit (ulimit -f) reached: the same"
REMOVED = "{}: the folder of runs is removed in mid-run: the same"
STOP = "{}: SIGTERM: the same, exit code 143"
INTERRUPT = "{}: Ctrl-C: the same, exit code 130"
HARMS = {
    FULL: "full", BROKEN: "broken", LIMIT: "limit", REMOVED: "removed", STOP: "stop",
    INTERRUPT: "interrupt",
}  # fmt: skip
# A folder that was there already, or one thing more to tidy up: where the run has done its work all
# the same, and nothing is left lying about, there is nothing to say.
HARMLESS = {"mkdir", "unlink", "rmdir"}
CODES = {"stop": 143, "interrupt": 130}
# How many of each, by plan.
COUNTS = {
    "flow": {FULL: 8, BROKEN: 16, LIMIT: 3, REMOVED: 4, STOP: 4, INTERRUPT: 4},
    "perceiver": {FULL: 8, BROKEN: 16, LIMIT: 3, REMOVED: 4, STOP: 4, INTERRUPT: 4},
}


def cases(forks: Forks, folder: Path) -> list[Case]:
    """All faults of the storm."""
    short = undisturbed(forks, PLANS["short"], folder)
    found = []
    for title, harm in ((EVERY_FULL, "full"), (EVERY_BROKEN, "broken")):
        writes = [call for call in short.calls if call[0] == "write"]
        found += [case(title, harm, short, call) for call in writes]
    for name, counts in COUNTS.items():
        measure = undisturbed(forks, PLANS[name], folder)
        for title, count in counts.items():
            found += spread_out(title.format(name), HARMS[title], measure, count)
    return found


def spread_out(title: str, harm: str, measure: Undisturbed, count: int) -> list[Case]:
    """At so many different calls; writes of one tensor after the other are tried elsewhere."""
    calls = [call for call in measure.calls if call[0] != "write" or not TENSORS.search(call[1])]
    if harm == "full":
        calls = [call for call in calls if call[0] in NEEDS_SPACE]
    if harm == "limit":  # before the last large file, or it would not be noticed
        calls = calls[: [call[1].startswith("runs/run/enhanced/") for call in calls].index(True)]
    if harm == "removed":
        calls = [call for call in calls if call[1].startswith("runs/run/")]
    return [case(title, harm, measure, call) for call in spread(calls, count)]


TENSORS = re.compile("(trained|moments).safetensors")


def case(title: str, harm: str, measure: Undisturbed, call: tuple) -> Case:
    """One harm at one call."""
    return Case(title, f"{title}: {said(call, False)}", partial(check, harm, measure, call))


def check(harm: str, measure: Undisturbed, call: tuple, forks: Forks, folder: Path) -> None:
    """One line that says what happened and where, no litter, and a second start that is as if there
    had been no first."""
    ended = runs.disturbed(forks, measure.plan, folder, harm, call, half=True)
    but = "never"
    if ended.code == 0 and call[0] in HARMLESS and not runs.complaints(ended):
        pass
    elif ended.code == 0:
        line = runs.complaint(ended)
        # A sample grid is no reason to end a run.
        assert "samples" in line, f"goes on to its end, and says {line}"
        but = "samples/"
    else:
        check_line(harm, ended, runs.complaint(ended), folder)
    assert not (found := runs.litter(folder)), f"the failed start left {', '.join(found)}"
    runs.goes_on(forks, measure.plan, folder, measure.folder, but)


def check_line(harm: str, ended: Ended, line: str, folder: Path) -> None:
    """The exit code is the right one, and the line names a place."""
    assert ended.code == CODES.get(harm, 2), f"exit code {ended.code}: {line}"
    assert line.startswith("train.py: "), line
    assert str(folder) in line, f"the line does not say where: {line}"
    if harm == "full":
        assert "No space left on device" in line, f"the line does not say what: {line}"


# ------------------------------------------------------------------------------------------------
# A few of them, in every test run
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("title", [FULL, BROKEN, LIMIT, REMOVED])
def test_a_fault_ends_in_one_line_and_the_next_start_is_bit_equal(forks, measures, tmp_path, title):
    harm = HARMS[title]
    measure = measures["flow" if harm in ("full", "removed") else "perceiver"]
    tried = spread_out(title, harm, measure, 5)[2]
    wrong, _ = try_case(tried, forks, tmp_path / "case")
    assert not wrong, wrong
