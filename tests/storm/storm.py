"""All of the storm, and what came of it.

    python -m tests.storm.storm                           everything; writes docs/RELIABILITY.md
    python -m tests.storm.storm --only kills --every 10   every tenth case of one part
    python -m tests.storm.storm --like metrics.jsonl      cases with that in their name

Two cases run at a time, each worker with a nursery of its own. Exit code 1 where any case failed.
"""

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import local

from .forks import ROOT, Forks
from .table import Case, Row, try_case

# The modules of this package that have cases, in the order of the report.
PARTS = (
    "test_kills", "test_faults", "test_torchrun", "test_starts",
    "inputs", "flips", "canaries", "pictures",
)  # fmt: skip
REPORT = ROOT / "docs" / "RELIABILITY.md"


def main() -> int:
    """Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="a part, like kills; may be repeated")
    parser.add_argument("--every", type=int, default=1, help="only every so manieth case of a part")
    parser.add_argument("--like", default="", help="only cases with these words in their name")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    asked = parser.parse_args()
    wanted = [part for part in PARTS if not asked.only or part.removeprefix("test_") in asked.only]
    parts = [part for part in wanted if importlib.util.find_spec(f"{__package__}.{part}")]
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="storm"))
    try:
        found = storm(parts, folder, asked)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    minutes = (time.monotonic() - started) / 60
    failures = [line for rows in found.values() for row in rows for line in row.failures]
    print(*map(as_table, found.values()), *failures, f"{minutes:.1f} minutes", sep="\n")
    if not asked.only and not asked.like:
        REPORT.write_text(report(found, minutes, asked), encoding="utf-8")
        print(REPORT)
    return 1 if failures else 0


def storm(parts: list[str], folder: Path, asked: argparse.Namespace) -> dict[str, list[Row]]:
    """Try the cases that are asked for, and say so as they end. Returns: rows by part."""
    own, made, found = local(), [], {}

    def begin() -> None:
        own.forks = Forks()
        made.append(own.forks)

    def listed(part: str) -> list[Case]:
        shared = folder / part
        shared.mkdir()
        cases = importlib.import_module(f".{part}", __package__).cases(own.forks, shared)
        return [case for case in cases if asked.like in case.name][:: asked.every]

    def run(case: Case, here: Path) -> tuple[str, float]:
        if own.forks.nursery.poll() is not None:  # the case before was its end, and has said so
            begin()
        result = try_case(case, own.forks, here)
        for left in here.parent.glob(f"{here.name}*"):  # and what was noted beside it
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return result

    with ThreadPoolExecutor(asked.workers, initializer=begin) as pool:
        for part in parts:
            cases = pool.submit(listed, part).result()
            jobs = [pool.submit(run, c, folder / f"{part}_{i}_") for i, c in enumerate(cases)]
            rows: dict[str, Row] = {}
            for number, (case, job) in enumerate(zip(cases, jobs, strict=True), 1):
                wrong, seconds = job.result()
                rows.setdefault(case.row, Row(case.row)).add(case, wrong, seconds)
                print(f"{part} {number}/{len(cases)} {wrong and 'FAILED ' + wrong}", flush=True)
            found[part] = list(rows.values())
    for forks in made:
        forks.__exit__()
    return found


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------
def as_table(rows: list[Row]) -> str:
    """Rows of one part as Markdown."""
    lines = ["| what is done, and what must hold | tried | failed |", "|---|---|---|"]
    lines += [f"| {row.title} | {row.tried:,} | {len(row.failures)} |" for row in rows]
    return "\n".join(lines)


def report(found: dict[str, list[Row]], minutes: float, asked: argparse.Namespace) -> str:
    """docs/RELIABILITY.md: what each part is (the docstring of its module) and its table."""
    tried = sum(row.tried for rows in found.values() for row in rows)
    failed = sum(len(row.failures) for rows in found.values() for row in rows)
    runs = sum(row.tried for part in PARTS[:4] for row in found.get(part, []))
    sections, command, said = [], "make storm", ""
    if asked.every > 1:
        command = f"python -m tests.storm.storm --every {asked.every}"
        said = f" **Only one case in {asked.every} was tried this time.**"
    for part, rows in found.items():
        module = importlib.import_module(f".{part}", __package__)
        title, _, text = module.__doc__.partition("\n\n")
        sections.append(f"## {' '.join(title.split())}\n\n{text.strip()}\n\n{as_table(rows)}\n")
    return f"""# Reliability

What a training run survives, and how that is known. `make storm` kills runs, fills disks, breaks
calls and feeds rubbish, {tried:,} times; {failed} of these went wrong. `make test` tries a small
selection. Not edited by hand: the last storm wrote this page.{said}

| | |
|---|---|
| command | `{command}` |
| date | {time.strftime("%Y-%m-%d")} |
| hardware | {hardware()}, {asked.workers} cases at a time |
| versions | Python {platform.python_version()}, PyTorch {version("torch")} |
| time | {minutes:.0f} minutes |
| kills, faults and simultaneous starts | {runs:,} |
| all cases | {tried:,}, of which {failed} failed |

**Bit-equal** means: after the disturbance the same command is given once more, and then everything
that the run has left (checkpoints of both stages with AdamW's moments, `metrics.jsonl`, sample
grids, the enhanced model with its card, `config.json`, the feature cache) equals what a run leaves
that nobody disturbed, byte by byte; of the lines of `metrics.jsonl` all but `images_per_s` and
`memory_gb`, of `config.json` all but date and commit. **No litter** means: no temporary file is
left. The runs are tiny (three steps a stage, a checkpoint each, two kept), on one CPU thread.

{chr(10).join(sections)}
## What this does not show

Kills and faults strike where Python calls the disk, through a layer that stands in for the disk
([tests/storm/disk.py](../tests/storm/disk.py)): no real disk was filled, no power cut. The power
cuts assume a file system that keeps the order of its renames, as ext4, XFS and Btrfs do. GPUs, NCCL
and network file systems were not part of it.
"""


def hardware() -> str:
    """The processor and how many cores this process may use."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in about.splitlines() if "model name" in line]
    return f"{(names or [platform.machine()])[0]}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    sys.exit(main())
