"""Commands as forks of one process that has imported PyTorch already.

A start of train.py takes seconds, nearly all of it imports; a storm of hundreds of starts would be
imports. So one process (the nursery) imports everything, builds nothing, and forks for each
command. A fork is sound only where no other thread runs (a thread's locks would be copied, the
thread would not), so the nursery counts its threads and refuses to work with more than one.

    with Forks() as forks:
        ended = forks.run(["train.py", "--name", "x"], output=folder / "said.txt")
        assert ended.code == 0, ended.said

The command runs as the user would run it: its file is executed as `__main__`, with its own command
line, in a session of its own, and ends as any Python process ends. What a fault does to the disk
that it sees is in disk.py.
"""

import atexit
import gc
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Everything that a command would import, in the end or in the middle.
IMPORTS = "train", "training.blend", "training.plan", "eval_mmvp", "eval_zeroshot", "export_hf"
GB = 2**30


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """exit code; negative: the signal that killed it"""
    said: str
    """what it printed, on both streams"""
    seconds: float
    memory_gb: float
    """the most that it held at once"""
    hung: bool = False
    """it was killed because its time was up"""

    @property
    def lines(self) -> list[str]:
        """What it said, without progress bars."""
        without = BAR.sub("\n", self.said.replace("\r", "\n"))
        return [line.strip() for line in without.splitlines() if line.strip()]


BAR = re.compile(r"^[^\n]*\d+%\|[^|\n]*\|[^\[\n]*\[[^\]\n]*\]", re.MULTILINE)


class Forks:
    """The nursery, seen from outside. One caller at a time; several commands at once are fine."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "tests.storm.forks"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.nursery = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
        self._started: dict[int, tuple[Path, float]] = {}
        assert self._answer() == "ready"

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *reason) -> None:
        self.nursery.stdin.close()
        self.nursery.wait()

    def run(self, argv: list, output: Path, limit_s: float = 60, **more) -> Ended:
        """Start a command and wait for its end."""
        return self.wait(self.start(argv, output, **more), limit_s)

    def start(
        self,
        argv: list,
        output: Path,
        fault: dict | None = None,
        env: dict | None = None,
        memory_gb: float = 0,
    ) -> int:
        """A command that runs from now on.

        Args:
            argv: a Python file, relative to the repository, and its arguments.
            output: a file for what it prints.
            fault: what happens to its disk, as `disk.install` takes it; None: nothing.
            env: more of its environment.
            memory_gb: a limit on its address space, beyond what the nursery has; 0: none.
        Returns: its process number.
        """
        order = {"argv": [str(a) for a in argv], "output": str(output), "fault": fault}
        pid = self._ask({**order, "env": env or {}, "memory_gb": memory_gb})
        self._started[pid] = output, time.monotonic()
        return pid

    def wait(self, pid: int, limit_s: float = 60) -> Ended:
        """For the end of a command. After `limit_s` it is killed, with all that it has started."""
        output, started = self._started.pop(pid)
        code, memory, hung = self._ask({"wait": pid, "limit_s": limit_s})
        said = output.read_text(errors="replace")
        return Ended(code, said, time.monotonic() - started, memory / GB, hung)

    def _ask(self, order: dict):
        self.nursery.stdin.write(json.dumps(order) + "\n")
        self.nursery.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.nursery.stdout.readline()
        if not line:
            raise RuntimeError(f"the nursery has ended with code {self.nursery.wait()}")
        return json.loads(line)


# ------------------------------------------------------------------------------------------------
# Inside the nursery
# ------------------------------------------------------------------------------------------------
def serve() -> None:
    """Answer orders, a line of JSON each, until there are no more."""
    sys.path.insert(0, str(ROOT))
    for name in IMPORTS:
        __import__(name)
    from PIL import Image

    Image.preinit()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would copy their locks, but not them"
    gc.freeze()  # a collection in a child would touch, and so copy, every page that they share
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = ended(order["wait"], order["limit_s"])
        elif answer := os.fork():
            pass
        else:
            command(order)
        print(json.dumps(answer), flush=True)
    os._exit(0)


def ended(pid: int, limit_s: float) -> tuple[int, int, bool]:
    """Exit code (negative: a signal), most memory in bytes, and whether it had to be killed."""
    deadline, hung = time.monotonic() + limit_s, False
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, hung
        if time.monotonic() > deadline and not hung:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)


def command(order: dict) -> None:
    """The child: becomes the command, and ends as it ends."""
    os.setsid()  # so that it can be killed together with its workers
    said = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for there, here in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(there, here)
    os.environ |= order["env"]
    if order["memory_gb"]:
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = has + int(order["memory_gb"] * GB)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if order["fault"]:
        from . import disk

        disk.install(**order["fault"])
    sys.argv = order["argv"]
    code = 0
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What Python does at its end: wait for threads, call what was registered, flush. What it also
    # does is take a gigabyte of modules apart, which costs more than some runs.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(bool(code)))


if __name__ == "__main__":
    serve()
