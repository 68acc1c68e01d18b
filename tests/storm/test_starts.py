"""Two at once: of two starts of one run one trains, and the other says who does; two runs that make
one cache both come out right.
"""

import random
import time
from functools import partial
from pathlib import Path

from . import runs
from .forks import Forks
from .runs import PLANS, Undisturbed, undisturbed
from .table import Case, try_case

PAIRS = "two starts of one run at once: one trains, the other says who does; bit-equal"
CACHES = "two runs that make one feature cache at once: both bit-equal"
COUNTS = {PAIRS: 20, CACHES: 6}


def cases(forks: Forks, folder: Path) -> list[Case]:
    """All pairs of the storm: the second start comes up to a second after the first."""
    dice, measures = random.Random(0), {}
    for name in ("flow", "perceiver"):
        measures[name] = undisturbed(forks, PLANS[name], folder)
    found = []
    for title, count in COUNTS.items():
        for number in range(count):
            late = 0.0 if number < count // 2 else dice.random()
            found.append(case(title, measures["perceiver" if number % 2 else "flow"], late))
    return found


def case(title: str, measure: Undisturbed, late: float) -> Case:
    """One pair."""
    check = partial({PAIRS: one_run, CACHES: one_cache}[title], measure, late)
    return Case(title, f"{title}: {measure.plan.name}, {late:.2f} s apart", check)


def together(forks: Forks, commands: list, folder: Path, late: float) -> list:
    """Start two commands, the second `late` seconds after the first; wait for both."""
    first = forks.start(commands[0], folder.with_suffix(".first"))
    time.sleep(late)
    second = forks.start(commands[1], folder.with_suffix(".second"))
    return [forks.wait(pid, runs.PATIENCE) for pid in (first, second)]


def one_run(measure: Undisturbed, late: float, forks: Forks, folder: Path) -> None:
    command = measure.plan.command(folder)
    both = together(forks, [command, command], folder, late)
    codes = sorted(ended.code for ended in both)
    assert codes == [0, 2], f"exit codes {codes}: {' | '.join(map(runs.tail, both))}"
    refused = next(ended for ended in both if ended.code == 2)
    line = runs.complaint(refused)
    assert str(folder / "runs" / "run") in line and "process" in line, line
    runs.goes_on(forks, measure.plan, folder, measure.folder)


def one_cache(measure: Undisturbed, late: float, forks: Forks, folder: Path) -> None:
    """Two runs with folders of their own, but for the cache: the other's is a link to it."""
    own = [folder / "one", folder / "other"]
    (own[0] / "cache").mkdir(parents=True)
    own[1].mkdir()
    (own[1] / "cache").symlink_to(own[0] / "cache")
    for ended in together(forks, [measure.plan.command(each) for each in own], folder, late):
        assert ended.code == 0, runs.tail(ended)
    runs.goes_on(forks, measure.plan, own[0], measure.folder)
    runs.goes_on(forks, measure.plan, own[1], measure.folder, but="cache/")


def test_of_two_starts_at_once_one_trains(forks, measures, tmp_path):
    wrong, _ = try_case(case(PAIRS, measures["flow"], 0.3), forks, tmp_path / "case")
    assert not wrong, wrong
