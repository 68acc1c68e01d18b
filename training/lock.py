"""One run, one writer.

Two starts of one run would take turns at overwriting each other's checkpoints, and both would end
well. So the main process holds a lock on RUNS/NAME/.lock for as long as it lives. The system gives
it back when the process dies, however it dies: no lock is ever left behind, only its file, and that
is swept by the next start.
"""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from training.process import Process, agreed
from util.files import unwritten


@contextlib.contextmanager
def sole_writer(run: Path, process: Process) -> Iterator[None]:
    """Around all that writes into a run's folder. What of the folder was made for the lock goes
    again, unless something was written into it.

    Raises: ValueError on all ranks where another process holds the lock, saying which.
    """
    made = [p for p in (run, *run.parents) if not p.exists()] if process.is_main else []
    problem, file = "", None
    if process.is_main:
        try:
            run.mkdir(parents=True, exist_ok=True)
            file = _locked(run / ".lock")
        except BlockingIOError:
            problem = (
                f"{run} is being written by {_holder(run / '.lock')}: wait for it, end it, or "
                "choose another --name"
            )
        except OSError as error:
            problem = str(unwritten(run / ".lock", error))
    if problem := agreed(problem, process):
        raise ValueError(problem)
    try:
        yield
    finally:
        if file:
            with contextlib.suppress(OSError):
                (run / ".lock").unlink()
                for folder in made:
                    folder.rmdir()  # fails, and ends this, at the first that is not empty
            file.close()


def _locked(path: Path):
    """The open lock file. Raises: BlockingIOError where another process has it."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as the lock)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            return file  # a disk without locks: as good as it gets
        # Whoever ended a moment ago has removed the file that was opened here: the next one counts.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"process {os.getpid()} on {platform.node()} since {since}")
                file.flush()
                return file
        file.close()


def _holder(path: Path) -> str:
    """Who has written there, as far as that can be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if said := path.read_text(encoding="utf-8")[:200]:
            return "".join(c for c in said if c.isprintable())
    return "another process"
