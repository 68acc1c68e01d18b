"""Wrong inputs, thousands of them: every command says one line, and none hangs, swells or obeys.

An input is a command line and, where it needs one, a file that was made wrong on purpose. What can
be found out about one is little, and enough:

    traceback, died     never, whatever the input
    hang, memory        never: it has a minute and two gigabytes
    refused             exit code 2 and one line that begins with the command's name
    accepted            exit code 0, or the first batch of a training (nobody waits for the rest)

Nonsense must be refused and sense accepted: else whoever refuses everything would pass. Where only
the file's author could say which it is, either will do. This file judges; what is asked is in
inputs_flags.py (the command line) and inputs_files.py (all that is read from the disk).
"""

import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .forks import ROOT, Ended, Forks
from .table import Case

SECONDS, MEMORY_GB = 60, 2
SEED = 1  # draws half of the inputs, which takes five minutes; another one draws others
REACHED = 77  # exit code of a training that came to its first batch
REFUSED, ACCEPTED, EITHER = "refused", "accepted", "either"
START = "tests/storm/inputs_start.py"
SAYS = re.compile(r"^(python -m [\w.]+|\w+\.py): ")
# The lines of the table.
FLAGS = "flags, values and paths that are wrong, of all commands: one line; what is right is taken"
FILES = "files that are wrong in one place, of every kind that is read: one line, or no matter"
# What must not reach a terminal as it is: a name in a file could rewrite the screen.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
NO_MEMORY = "MemoryError", "not enough memory", "allocate memory", "bad_alloc"


@dataclass(frozen=True)
class Input:
    """One command line, and what must come of it."""

    name: str
    command: tuple[str, ...]
    """script, or module of ``python -m``, and arguments; {here} is a folder of its own, {world} of
    files that are sound, {toy} of the toy's weights"""
    prepare: Callable[[Path, Path], None] | None = None
    """puts a wrong file into {here}, given that and {world}"""
    wanted: str = EITHER


def case_of(row: str, asked: Input, world: Path) -> Case:
    """An input as a case of the storm."""

    def check(forks: Forks, here: Path) -> None:
        try:
            ended = ask(asked, forks, here, world)
        finally:
            for sealed in here.glob("sealed*"):  # else nobody could remove it
                sealed.chmod(0o700)
        if problem := problem_of(asked.wanted, ended):
            said = ended.lines[-1][:300] if ended.lines else "nothing"
            raise AssertionError(f"{problem}; it said: {said}")

    return Case(row, asked.name, check)


def ask(asked: Input, forks: Forks, here: Path, world: Path) -> Ended:
    """Try an input."""
    if asked.prepare:
        asked.prepare(here, world)
    known = {"{here}": str(here), "{world}": str(world), "{toy}": str(ROOT / "toy")}
    words = [filled(word, known) for word in asked.command]
    words = [START, str(here), *words]
    return forks.run(words, here / "said.txt", SECONDS, memory_gb=MEMORY_GB)


def filled(word: str, known: dict[str, str]) -> str:
    """Not str.format: templates hold braces of their own."""
    for name, value in known.items():
        word = word.replace(name, value)
    return word


def problem_of(wanted: str, ended: Ended) -> str:
    """What is wrong with how a command ended; "" if nothing is."""
    said, code = ended.said, ended.code
    if ended.hung:
        return f"hangs for more than {SECONDS} s"
    if code < 0:
        return f"died of signal {-code}"
    if ended.memory_gb > MEMORY_GB or any(words in said for words in NO_MEMORY):
        return f"takes {ended.memory_gb:.1f} GB"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if found := CONTROL.search(said.replace("\x1b[A", "")):  # tqdm moves the cursor up
        return f"prints {found[0]!r} raw"
    if code in (0, REACHED):
        return "accepts nonsense" if wanted == REFUSED else ""
    if code != 2:
        return f"exit code {code}"
    ours = [line for line in ended.lines if SAYS.match(line)]
    if len(ours) != 1 or ended.lines[-1] != ours[0]:
        return f"{len(ours)} lines say why, where one must, as the last"
    if SAYS.sub("", ours[0]).strip() in ("", "None"):
        return "says nothing"
    return "refuses sense" if wanted == ACCEPTED else ""


def cases(forks: Forks, folder: Path, world: Path | None = None) -> list[Case]:
    """As __init__.py has it; `world` is one that is there already."""
    from . import inputs_files, inputs_flags
    from .inputs_world import make_world

    world = world or make_world(forks, folder)
    flags = [case_of(FLAGS, asked, world) for asked in inputs_flags.inputs()]
    files = [case_of(FILES, asked, world) for asked in inputs_files.inputs(world)]
    rng = random.Random(SEED)
    return [case for part in (flags, files) for case in rng.sample(part, len(part) // 2)]


def reached(*_, **__) -> None:
    """In the place of what would now begin to work."""
    import sys

    sys.stdout.flush(), sys.stderr.flush()
    os._exit(REACHED)
