"""What the storm tries and what it counts: cases, and the rows of its table."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .forks import Forks


@dataclass(frozen=True)
class Case:
    """One thing that is tried."""

    row: str
    """the line of the table that it counts in: a sentence on what is done and what must hold"""
    name: str
    """what is done here, for whoever must find out why it failed"""
    check: Callable[[Forks, Path], None]
    """tries it in an empty folder; raises AssertionError, in one line, where something is wrong"""
    count: int = 1
    """how many things it tries: a thousand pictures may be one case"""

    def __str__(self) -> str:
        return self.name


@dataclass
class Row:
    """A line of the table: the cases of one kind."""

    title: str
    tried: int = 0
    seconds: float = 0.0
    """of one core, all cases together"""
    failures: list[str] = field(default_factory=list)

    def add(self, case: Case, wrong: str, seconds: float) -> None:
        """Count a case. Args: wrong: what went wrong, "" for nothing."""
        self.tried += case.count
        self.seconds += seconds
        self.failures += [wrong] * bool(wrong)


def try_case(case: Case, forks: Forks, folder: Path) -> tuple[str, float]:
    """What went wrong, in a line, or ""; and how many seconds it took.

    Whatever a check raises is a failure of that case: one bad case never ends a storm.
    """
    folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        case.check(forks, folder)
        wrong = ""
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        wrong = f"{case.name}: {kind}{' '.join(str(error).split())[:1500] or 'failed'}"
    return wrong, time.monotonic() - start


def spread(cases: Iterable, count: int) -> list:
    """So many of them, evenly spread from the first to the last: the same at every call."""
    cases = list(cases)
    if count >= len(cases):
        return cases
    return [cases[round(i * (len(cases) - 1) / max(1, count - 1))] for i in range(count)]
