"""Single bits that a disk turns: each is noticed, or makes no difference.

A flipped bit in a checkpoint is the worst kind of damage, for nothing breaks: the run goes on, and
its figures are those of another model. So whatever is read again is written once, one bit of it is
turned, and the same command is given again. Right is one of three ends:

    noticed     exit code 2 and one line
    mended      the damaged part is made again, or an earlier checkpoint taken, with equal results
    harmless    equal results, bit by bit

What is compared are the tensors that a run leaves, and its metrics without the times.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .forks import ROOT, Ended, Forks
from .inputs import EITHER, problem_of
from .inputs_world import TINY, json_files, pictures, shard
from .table import Case

LONG = 4  # steps of stage 2; a run that stopped after three has two checkpoints of it
TIMES = {"images_per_s", "memory_gb"}
EVALUATE = ("eval_mmvp.py", "--model", str(ROOT / "toy" / "clip.safetensors"))


@dataclass(frozen=True)
class Kind:
    """Something that is written once and read again."""

    title: str
    flips: int
    files: tuple[str, ...]
    """patterns of the files that are damaged, below the folder `start` of the part"""
    command: tuple[str, ...]
    """what is given again; {here} is a copy of `start`"""
    result: Callable[[Path], dict]
    """what is compared, of the copy"""


def kinds() -> tuple[Kind, ...]:
    """All of them."""
    tiny = [w if w != "2" or TINY[i - 1] != "--stage2_steps" else str(LONG)
            for i, w in enumerate(TINY)]  # fmt: skip
    once = [*tiny, "--stage", "1", "--runs", "{here}/new", "--name"]
    return (
        Kind(
            "checkpoints",
            80,
            ("runs/a/config.json", "runs/a/stage1/*2/*", "runs/a/stage2/*3/*"),
            (*tiny, "--cache=", "--runs", "{here}/runs", "--name", "a"),
            lambda here: result_of(here / "runs" / "a"),
        ),
        Kind(
            "training cache",
            48,
            ("cache/*",),
            (*once, "cached", "--data", "{here}/photos", "--cache", "{here}/cache"),
            lambda here: result_of(here / "new" / "cached"),
        ),
        Kind(
            "index of shards",
            48,
            ("shards/.pictures-*.npz",),
            (*once, "indexed", "--data", "{here}/shards", "--cache="),
            lambda here: result_of(here / "new" / "indexed"),
        ),
        Kind(
            "features of evaluations",
            48,
            ("features/*",),
            (*EVALUATE, "--benchmark", "{here}/pairs.json", "--out", "{here}/out", "--cache",
             "{here}/features"),
            lambda here: figures_of(here / "out"),
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# What is compared
# ------------------------------------------------------------------------------------------------
def result_of(run: Path) -> dict:
    """File → content, of all that a run computes."""
    found = {}
    for stage in (1, 2):
        for file in sorted(run.glob(f"stage{stage}/*/*.safetensors"))[-2:]:
            found[str(file.relative_to(run))] = file.read_bytes()
    for file in sorted(run.glob("enhanced/**/*.safetensors")):
        found[str(file.relative_to(run))] = file.read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: (line["stage"], line["step"]))  # a stage 1 made again comes last
    found["metrics"] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return found


def figures_of(out: Path) -> dict:
    """The figures of an evaluation."""
    [file] = out.rglob("*.json")
    content = json.loads(file.read_text())
    return {
        k: v for k, v in content.items() if k not in ("evaluation", "date", "seconds", "benchmark")
    }


# ------------------------------------------------------------------------------------------------
# The part
# ------------------------------------------------------------------------------------------------
def cases(forks: Forks, folder: Path, titles: tuple[str, ...] = ()) -> list[Case]:
    """As __init__.py has it: of each kind, or of those named, flips of a fixed seed."""
    chosen = [kind for kind in kinds() if not titles or kind.title in titles]
    start, found = folder / "start", []
    make_start(forks, start, chosen)
    for kind in chosen:
        straight = folder / kind.title.replace(" ", "_")
        ended = again(kind, forks, start, straight)
        assert ended.code == 0, f"code {ended.code}: {ended.said}"
        expected = kind.result(straight)
        files = sorted(file for pattern in kind.files for file in start.glob(pattern))
        read = sorted(file for pattern in kind.files for file in straight.glob(pattern))
        # Had the copy not been taken for the same, others would lie beside them.
        assert len(read) == len(files) > 0, f"{kind.title}: not read again"
        rng = random.Random(kind.title)
        for number in range(kind.flips):
            file = files[number % len(files)]
            bit = place_in(file, number // len(files), rng)
            found.append(case_of(kind, start, file.relative_to(start), bit, expected))
    return found


def place_in(file: Path, turn: int, rng: random.Random) -> int:
    """A bit of a file. Every third time among the first 2000 bytes, where headers are: of a file
    of a megabyte they would else hardly ever be met."""
    bits = 8 * file.stat().st_size
    return rng.randrange(min(bits, 16_000) if turn % 3 == 0 else bits)


def case_of(kind: Kind, start: Path, file: Path, bit: int, expected: dict) -> Case:
    """One bit of one file."""

    def check(forks: Forks, here: Path) -> None:
        def flip(copy: Path) -> None:
            data = bytearray((copy / file).read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            status = (copy / file).stat()
            (copy / file).write_bytes(data)
            # As the disk does it: no date tells.
            os.utime(copy / file, ns=(status.st_atime_ns, status.st_mtime_ns))

        ended = again(kind, forks, start, here / "copy", flip)
        if problem := problem_of(EITHER, ended):
            raise AssertionError(f"{problem}; {ended.lines[-1][:300] if ended.lines else ''}")
        if ended.code == 0:
            result = kind.result(here / "copy")
            other = sorted(k for k in expected | result if expected.get(k) != result.get(k))
            assert not other, f"exit code 0, and other results: {', '.join(other[:4])}"

    name = f"{file}, byte {bit // 8}, bit {bit % 8}"
    return Case("single bits flipped on the disk: noticed, mended or harmless", name, check)


def again(
    kind: Kind, forks: Forks, start: Path, copy: Path, change: Callable[[Path], None] | None = None
) -> Ended:
    """The command on a copy of `start` that has been changed."""
    shutil.copytree(start, copy)
    if change:
        change(copy)
    command = [word.replace("{here}", str(copy)) for word in kind.command]
    return forks.run(command, copy / "said.txt", limit_s=300, memory_gb=2)


def make_start(forks: Forks, start: Path, chosen: list[Kind]) -> None:
    """What the kinds read: a run that stopped after three steps of stage 2, a cache, an index,
    features."""
    pictures(start / "photos")
    (start / "photos" / "1.png").write_bytes(b"no picture")  # so that the cache has a note of it
    (start / "photos" / "more").mkdir()
    for name in ("4.png", "5.png"):
        shutil.copy(start / "photos" / "0.png", start / "photos" / "more" / name)
    pictures(start / "pictures")
    shard(start / "shards" / "0.tar", start / "pictures")
    (start / "pairs.json").write_text(json.dumps(json_files()["pairs.json"]))
    for kind in chosen:
        command = [word.replace("{here}", str(start)) for word in kind.command]
        ended = forks.run(command, start / "said.txt", limit_s=300)
        assert ended.code == 0, f"code {ended.code}: {ended.said}"
    run = start / "runs" / "a"
    if run.exists():
        shutil.rmtree(run / "enhanced")
        shutil.rmtree(run / "stage2" / f"step_{LONG:08d}")
    for name in ("new", "out"):
        shutil.rmtree(start / name, ignore_errors=True)
