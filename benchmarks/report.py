"""What every script here needs around its own measuring: flags, trained runs, and the report.

A script measures one thing and then says it as all the others do: NAME.json holds every figure,
NAME.md the tables that people read, both beside the scripts and each whole or absent. How command,
day and machine are named, and how a spread over seeds is written, is decided here alone.

Scripts run from the project's root, as ``python benchmarks/NAME.py``. Importing this file makes the
project's own modules importable, so every script imports it before them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.cli import OneLineParser
from util.files import write_atomically

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CPU = torch.device("cpu")  # where committed figures are measured: everybody has one


# ------------------------------------------------------------------------------------------------
# Before: flags and runs
# ------------------------------------------------------------------------------------------------
def parser(about: str) -> argparse.ArgumentParser:
    """A parser whose --help is the script's own docstring, line by line."""
    raw = argparse.RawDescriptionHelpFormatter
    return OneLineParser(description=about, formatter_class=raw)


def is_finished(run: Path) -> bool:
    """Has train.py reached its end there? The model card is the last file that it writes."""
    return (run / "enhanced" / "README.md").is_file()


def train(run: Path, flags: Iterable[str]) -> None:
    """Train `run` by train.py's own command line, so that what is measured is what a user gets.

    Raises: ValueError where train.py fails; it has then said why.
    """
    command = [sys.executable, "train.py", "--runs", str(run.parent), "--name", run.name, *flags]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"run {run} could not be trained; train.py's own line above says why")


# ------------------------------------------------------------------------------------------------
# After: figures, tables, files
# ------------------------------------------------------------------------------------------------
def facts() -> dict[str, str]:
    """When and on what something was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
    }


def headline(command: str, about: dict, *details: str) -> str:
    """The first line of a report, without its full stop: "`command`, details, date, machine, torch
    version". A machine that `about` does not name played no part."""
    where = [about[what] for what in ("date", "machine") if what in about]
    return ", ".join([f"`{command}`", *details, *where, f"torch {about['torch']}"])


def table(head: list[str], rows: Iterable[Iterable]) -> list[str]:
    """Lines of a Markdown table."""

    def line(cells: Iterable) -> str:
        return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def spread(values: np.ndarray, sign: str = "") -> str:
    """mean ± standard deviation over seeds; one seed has no deviation. `sign`: "+" shows it."""
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


def each(values: np.ndarray) -> str:
    """Every seed's change."""
    return " ".join(f"{value:+.1f}" for value in values)


def publish(name: str, lines: list[str], about: dict | None = None) -> None:
    """Print the lines and write them as NAME.md; what is known about them as NAME.json."""
    text = "\n".join(lines).rstrip() + "\n"
    if about is not None:
        write_atomically(HERE / f"{name}.json", json.dumps(about, indent=1))
    write_atomically(HERE / f"{name}.md", text)
    print(text)
