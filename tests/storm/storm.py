"""All of the storm, and what came of it.

    python -m tests.storm.storm                       everything; writes docs/RELIABILITY.md
    python -m tests.storm.storm --only kills --every 10   every tenth case of one part

Two cases run at a time, each worker with a nursery of its own. Exit code 1 where any case failed.
"""

import argparse
import importlib
import importlib.util
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

from .forks import Forks
from .table import Case, Row, try_case

# The modules of this package that have cases, in the order of the table.
PARTS = "test_kills", "test_faults", "test_torchrun", "test_starts", "inputs", "flips", "pictures"


def main() -> int:
    """Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="a part; may be repeated")
    parser.add_argument("--every", type=int, default=1, help="every so manieth case of each part")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    asked = parser.parse_args()
    parts = [part for part in PARTS if not asked.only or part.removeprefix("test_") in asked.only]
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="storm"))
    try:
        rows = storm(parts, folder, asked.every, asked.workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(as_text(rows), f"{(time.monotonic() - started) / 60:.1f} minutes", sep="\n")
    return 1 if any(row.failures for row in rows) else 0


def storm(parts: list[str], folder: Path, every: int, workers: int) -> list[Row]:
    """Try every so manieth case of each part. Prints failures as they come."""
    rows: dict[str, Row] = {}
    own, made = local(), []

    def begin() -> None:
        own.forks = Forks()
        made.append(own.forks)

    def run(case: Case, here: Path) -> tuple[str, float]:
        found = try_case(case, own.forks, here)
        shutil.rmtree(here, ignore_errors=True)
        return found

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        for part in parts:
            if importlib.util.find_spec(f"{__package__}.{part}") is None:
                continue  # written by and by
            module, shared = importlib.import_module(f".{part}", __package__), folder / part
            shared.mkdir()
            cases = pool.submit(lambda m=module, s=shared: m.cases(own.forks, s)).result()[::every]
            jobs = [pool.submit(run, c, folder / f"{part}{i}") for i, c in enumerate(cases)]
            for number, (case, job) in enumerate(zip(cases, jobs, strict=True), 1):
                wrong, seconds = job.result()
                row = rows.setdefault(case.row, Row(case.row))
                row.tried += case.count
                row.seconds += seconds
                row.failures += [wrong] * bool(wrong)
                print(f"{part} {number}/{len(cases)} {wrong and 'FAILED ' + wrong}", flush=True)
    for forks in made:
        forks.__exit__()
    return list(rows.values())


def as_text(rows: list[Row]) -> str:
    """The table, and below it what failed."""
    lines = ["| what | tried | failed | seconds |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.title} | {row.tried} | {len(row.failures)} | {row.seconds:.0f} |")
    return "\n".join(lines + [""] + [failure for row in rows for failure in row.failures])


if __name__ == "__main__":
    sys.exit(main())
