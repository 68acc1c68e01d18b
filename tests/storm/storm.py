"""All of the storm, and what came of it.

    python -m tests.storm.storm                           everything; writes docs/RELIABILITY.md
    python -m tests.storm.storm --only kills              one part again, the others as they were
    python -m tests.storm.storm --only kills --every 10   every tenth case of it; writes nothing
    python -m tests.storm.storm --like metrics.jsonl      cases with that in their name; the same

Two cases run at a time, each worker with a nursery of its own. What came of each part is kept in
last.json beside this file. Exit code 1 where any case failed.
"""

import argparse
import importlib
import json
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

from training.runlog import commit

from .forks import ROOT, Forks
from .table import Case, Row, try_case

# The modules of this package that have cases, in the order of the report.
PARTS = (
    "test_kills", "test_faults", "test_torchrun", "test_starts",
    "inputs", "flips", "canaries", "pictures",
)  # fmt: skip
REPORT, LAST = ROOT / "docs" / "RELIABILITY.md", Path(__file__).with_name("last.json")


def main() -> int:
    """Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="a part, like kills; may be repeated")
    parser.add_argument("--every", type=int, default=1, help="only every so manieth case of a part")
    parser.add_argument("--like", default="", help="only cases with these words in their name")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    asked = parser.parse_args()
    short = [part.removeprefix("test_") for part in PARTS]
    if unknown := set(asked.only or []) - set(short):
        parser.error(f"--only {min(unknown)}: there are {', '.join(short)}")
    wanted = [
        part for part, name in zip(PARTS, short, strict=True) if name in (asked.only or short)
    ]
    folder, failures = Path(tempfile.mkdtemp(prefix="storm")), []
    try:
        for part in wanted:
            started = time.monotonic()
            rows = storm(part, folder, asked)
            minutes = (time.monotonic() - started) / 60
            print(as_table(rows), f"{minutes:.1f} minutes", sep="\n", flush=True)
            failures += [line for row in rows for line in row.failures]
            if asked.every == 1 and not asked.like:
                remember(part, rows, minutes, asked.workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(*failures, f"{len(failures)} cases failed", sep="\n")
    return 1 if failures else 0


def storm(part: str, folder: Path, asked: argparse.Namespace) -> list[Row]:
    """Try the cases of a part that are asked for, and say so as they end."""
    own, made = local(), []

    def begin() -> None:
        own.forks = Forks()
        made.append(own.forks)

    def listed() -> list[Case]:
        shared = folder / part
        shared.mkdir()
        cases = importlib.import_module(f".{part}", __package__).cases(own.forks, shared)
        return [case for case in cases if asked.like in case.name][:: asked.every]

    def run(case: Case, here: Path) -> tuple[str, float]:
        if own.forks.nursery.poll() is not None:  # the case before was its end, and has said so
            begin()
        result = try_case(case, own.forks, here)
        shutil.rmtree(here.parent)  # with what was noted beside it, or written into ".."
        return result

    rows: dict[str, Row] = {}
    with ThreadPoolExecutor(asked.workers, initializer=begin) as pool:
        cases = pool.submit(listed).result()
        jobs = [
            pool.submit(run, case, folder / f"{part}_{i}" / "own") for i, case in enumerate(cases)
        ]
        for number, (case, job) in enumerate(zip(cases, jobs, strict=True), 1):
            wrong, seconds = job.result()
            rows.setdefault(case.row, Row(case.row)).add(case, wrong, seconds)
            print(f"{part} {number}/{len(cases)} {wrong and 'FAILED ' + wrong}", flush=True)
    for forks in made:
        forks.__exit__()
    return list(rows.values())


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------
def remember(part: str, rows: list[Row], minutes: float, workers: int) -> None:
    """What came of a part, in the place of what came of it before, and the report anew."""
    found = json.loads(LAST.read_text()) if LAST.is_file() else {}
    found[part] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit()[:7],
        "hardware": f"{hardware()}, {workers} cases at a time",
        "versions": f"Python {platform.python_version()}, PyTorch {version('torch')}",
        "minutes": round(minutes, 1),
        "rows": [{"title": r.title, "tried": r.tried, "failures": r.failures} for r in rows],
    }
    found = {name: found[name] for name in PARTS if name in found}
    LAST.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    REPORT.write_text(report(found), encoding="utf-8")
    print(REPORT, flush=True)


def as_table(rows: list[Row]) -> str:
    """Rows of one part as Markdown."""
    lines = ["| what is done, and what must hold | tried | failed |", "|---|---|---|"]
    lines += [f"| {row.title} | {row.tried:,} | {len(row.failures)} |" for row in rows]
    return "\n".join(lines)


def report(found: dict[str, dict]) -> str:
    """docs/RELIABILITY.md: what each part is (the docstring of its module), its table, and when
    it was tried. Args: found: as last.json has it."""
    rows = {part: [Row(**row) for row in about["rows"]] for part, about in found.items()}
    tried = {part: sum(row.tried for row in rows[part]) for part in found}
    failed = sum(len(row.failures) for part in found for row in rows[part])
    runs = sum(tried.get(part, 0) for part in PARTS[:4])
    minutes = sum(about["minutes"] for about in found.values())
    sections, times = [], []
    for part, about in found.items():
        module = importlib.import_module(f".{part}", __package__)
        title, _, text = module.__doc__.partition("\n\n")
        sections.append(
            f"## {' '.join(title.split())}\n\n{text.strip()}\n\n{as_table(rows[part])}\n"
        )
        times.append(
            f"| {part.removeprefix('test_')} | {tried[part]:,} | {about['minutes']:.1f} | "
            f"{about['date']} | {about['commit']} | {about['hardware']}; {about['versions']} |"
        )
    return f"""# Reliability

What a training run survives, and how that is known. `make storm` kills runs, fills disks, breaks
calls and feeds rubbish, {sum(tried.values()):,} times, of which {runs:,} are kills, faults and
simultaneous starts; **{failed} of these went wrong**. `make test` tries a small selection. Not
edited by hand: the last storm wrote this page. It took {minutes:.0f} minutes:

| part | cases | minutes | date | commit | where |
|---|---|---|---|---|---|
{chr(10).join(times)}

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
