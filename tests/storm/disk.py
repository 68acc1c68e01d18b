"""A disk that fails at the n-th call, or a process that dies there.

`install` puts a thin layer between a process and one folder. Every call by which Python changes a
disk passes through it: files opened for writing, what is written to them, fsync, rename, unlink,
mkdir, rmdir, chmod. (A file that is written is a `FileIO` of ours below Python's usual buffers: a
write is counted where the system would be called, with as many bytes.) Libraries that write without
Python would pass it by; a test looks that no file of a run does. The layer writes a journal, and at
one chosen call it does harm:

    kill      the process dies there, as by kill -9, before the call or half-way through it
    power     the same, and what was not flushed by fsync is lost: files are cut to what was, and
              renames and links since the last fsync of a folder have not happened
    full      no space left on the device from here on; the call itself writes half
    limit     from here on no file may grow beyond 64 kB (ulimit -f; the system's own refusal)
    broken    this call fails with EIO, later ones succeed
    removed   somebody deletes the folder of all runs
    stop      SIGTERM arrives; interrupt: Ctrl-C

Calls are chosen by what they do, not by their number: a checkpoint is written by a thread beside
the training, and the two take turns as they please. A call's name is (what, path in the folder, how
manieth of that kind), as ("write", "run/metrics.jsonl", 2).

    python -m tests.storm.disk '{"folder": …, "journal": …, …}' train.py …

is a command with such a disk, for torchrun: the main rank has it, and each rank leaves its process
number in a file RANK beside the journal.
"""

import builtins
import errno
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

NEEDS_SPACE = "open", "write", "mkdir", "fsync"
LIMIT = 2**16
# What Python itself has from 3.14 on (8 kB before): the same bytes in fewer calls.
BUFFER = 2**17
SIGNALS = {"stop": signal.SIGTERM, "interrupt": signal.SIGINT}
STRUCK = "struck"
# Parts of temporary names that differ from run to run.
RANDOM = re.compile(r"[0-9a-f]{32}|(?<=\.)[0-9a-f]{8}(?=\.tmp$)")


class Disk:
    """The layer: watches, counts, strikes once.

    Args:
        folder: only what happens in here counts.
        journal: a file outside of it, one line of JSON per call.
        harm: one of those above; "" only watches.
        at: the call's name; half: strike when half of it is done, where it has halves.
        victims: whom "kill" kills: "self", "parent", or a file with a process number.
    """

    def __init__(
        self,
        folder: str,
        journal: str,
        harm: str = "",
        at: tuple = (),
        half: bool = False,
        victims: tuple = ("self",),
    ):
        self.folder = os.path.realpath(folder)
        self.journal = real.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.harm, self.at, self.half, self.victims = harm, tuple(at), half, victims
        self.full = False
        self.seen: Counter = Counter()
        self.lock = threading.Lock()
        self.attic = Path(journal).with_suffix(".attic")
        """files that a rename has replaced, should it have to be undone"""
        self.safe: dict[int, int] = {}
        """inode → bytes that are on the disk for sure, of files that this process has written"""
        self.renamed: list[tuple[str, str, Path | None]] = []
        """renames, and links (from ""), since a folder was last flushed"""

    def path(self, path, dir_fd: int | None = None) -> str:
        """The whole path of what a call names: a path, an open file, or a name in an open folder;
        "" where that is not in the watched folder."""
        if isinstance(path, int):
            whole = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        else:
            base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            whole = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        return whole if whole.startswith(self.folder + os.sep) else ""

    def call(self, what: str, path: str, act: Callable, half: Callable | None = None):
        """Do it, unless this is the call at which harm is done.

        Args: act: does it; half: does half of it. Raises: OSError, of a harm or of the call itself.
        """
        name = self.named(what, path)
        with self.lock:
            self.seen[name] += 1
            call = *name, self.seen[name]
            struck = bool(self.harm) and call == self.at
            self.write_down([STRUCK, *call] if struck else call)
        if struck:
            if half and self.half and self.harm != "limit":  # which lets small writes pass whole
                half()
            self.strike(what, path)
        if self.full and what in NEEDS_SPACE:
            raise failure(what, errno.ENOSPC, path)
        return act()

    def named(self, what: str, path: str) -> tuple[str, str]:
        """A call without its number: random parts of temporary names left out."""
        inside = os.path.relpath(path, self.folder)
        inside = re.sub(rf"(?<!\d){os.getpid()}(?!\d)", "PID", inside)
        return what, RANDOM.sub("RANDOM", inside)

    def write_down(self, line) -> None:
        real.write(self.journal, (json.dumps(line) + "\n").encode())

    def strike(self, what: str, path: str) -> None:
        if self.harm in ("kill", "power"):
            if self.harm == "power":
                self.lose_what_is_not_flushed()
            for victim in self.victims:
                known = {"self": os.getpid(), "parent": os.getppid()}
                os.kill(known.get(victim) or int(Path(victim).read_text()), signal.SIGKILL)
        elif self.harm in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.harm])
        elif self.harm == "full":
            self.full = True
        elif self.harm == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        elif self.harm == "removed":
            with restored():
                shutil.rmtree(os.path.join(self.folder, "runs"))
        elif self.harm == "broken":
            raise failure(what, errno.EIO, path)

    # -- what a power cut takes away -------------------------------------------------------------
    def remember_rename(self, old: str, new: str) -> None:
        """Before it happens: keep what it will replace."""
        kept = None
        if self.harm == "power":
            if os.path.isfile(new):
                self.attic.mkdir(exist_ok=True)
                kept = self.attic / str(len(self.renamed))
                kept.unlink(missing_ok=True)
                real.link(new, kept)
            self.renamed.append((old, new, kept))

    def remember_link(self, new: str) -> None:
        """After it has happened: there was nothing of that name before."""
        if self.harm == "power":
            self.renamed.append(("", new, None))

    def opened(self, fd: int) -> None:
        """What another process has written is safe, what this one will write is not."""
        about = os.fstat(fd)
        known = self.safe.get(about.st_ino, about.st_size)
        self.safe[about.st_ino] = min(known, about.st_size)

    def flushed(self, fd: int) -> None:
        """A file's bytes are safe; of a folder: all renames so far. (File systems with a journal
        keep their order.)"""
        about = os.fstat(fd)
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            self.renamed.clear()
        else:
            self.safe[about.st_ino] = about.st_size

    def lose_what_is_not_flushed(self) -> None:
        """As the next start would find the disk after a power cut at its unluckiest."""
        with restored():
            for old, new, kept in reversed(self.renamed):
                os.rename(new, old) if old else os.unlink(new)
                if kept:
                    os.rename(kept, new)
            for file in Path(self.folder).rglob("*"):
                about = file.stat()
                safe = self.safe.get(about.st_ino, about.st_size)
                if file.is_file() and about.st_size > safe:
                    os.truncate(file, safe)


def failure(what: str, number: int, path: str) -> OSError:
    """The error as the caller would see it. (A write knows an open file, not its name.)"""
    return OSError(number, os.strerror(number), *([] if what in ("write", "fsync") else [path]))


# ------------------------------------------------------------------------------------------------
# Python's calls, and what stands in for them
# ------------------------------------------------------------------------------------------------
class _Real:
    """The functions as they were."""

    names = (
        "open", "write", "fsync", "fdatasync", "rename", "replace", "unlink", "remove", "mkdir",
        "rmdir", "chmod", "truncate", "ftruncate", "link", "symlink",
    )  # fmt: skip

    def __init__(self):
        for name in self.names:
            setattr(self, name, getattr(os, name))
        self.open_file = io.open


real = _Real()


class restored:
    """Around the layer's own changes of the disk: they are not watched."""

    def __enter__(self):
        self.patched = {name: getattr(os, name) for name in real.names}
        for name in real.names:
            setattr(os, name, getattr(real, name))

    def __exit__(self, *reason):
        for name, function in self.patched.items():
            setattr(os, name, function)


def install(**how) -> Disk:
    """Put the layer between this process and its disk, for good. Args: those of `Disk`."""
    disk = Disk(**how)

    class WatchedFile(io.FileIO):
        """A file that is being written, below Python's buffers."""

        def __init__(self, path, mode, closefd=True, opener=None):
            self.whole = disk.path(path)
            start = super().__init__
            disk.call("open", self.whole, lambda: start(path, mode, closefd, opener))
            disk.opened(self.fileno())

        def write(self, data):
            data, write = memoryview(data).cast("B"), super().write
            half = data[: len(data) // 2]
            return disk.call("write", self.whole, lambda: write(data), lambda: write(half))

        def truncate(self, size=None):
            cut = super().truncate
            return disk.call("truncate", self.whole, lambda: cut(size))

    def open_file(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True,
        opener=None,
    ):  # fmt: skip
        if not set(mode) & set("wax+") or not disk.path(file):
            return real.open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = WatchedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else BUFFER
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
        text.mode = mode
        return text

    builtins.open = io.open = open_file
    install_os(disk)
    return disk


def install_os(disk: Disk) -> None:
    """The functions of `os`."""

    def of_a_path(name, what=None):
        function, what = getattr(real, name), what or name

        def watched(path, *args, **more):
            whole = disk.path(path, more.get("dir_fd"))
            act = lambda: function(path, *args, **more)  # noqa: E731
            return disk.call(what, whole, act) if whole else act()

        return watched

    def of_two_paths(name, what):
        function = getattr(real, name)

        def watched(old, new, **more):
            whole = disk.path(new, more.get("dst_dir_fd"))
            if not whole:
                return function(old, new, **more)
            if what == "rename":
                source = disk.path(old, more.get("src_dir_fd"))
                return disk.call(what, whole, lambda: renamed(source, whole))
            return disk.call(what, whole, lambda: linked(old, new, more, whole))

        def linked(old, new, more, whole):
            function(old, new, **more)
            disk.remember_link(whole)

        def renamed(source, whole):
            disk.remember_rename(source, whole)
            return function(source, whole)

        return watched

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        whole = disk.path(path, dir_fd)
        act = lambda: real.open(path, flags, mode, dir_fd=dir_fd)  # noqa: E731
        if not whole or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return act()
        fd = disk.call("open", whole, act)
        disk.opened(fd)
        return fd

    def written(fd, data):
        whole, half = disk.path(fd), memoryview(data)[: len(data) // 2]
        act = lambda: real.write(fd, data)  # noqa: E731
        return disk.call("write", whole, act, lambda: real.write(fd, half)) if whole else act()

    def flushed(name):
        function = getattr(real, name)

        def watched(fd):
            fd = fd if isinstance(fd, int) else fd.fileno()
            whole = disk.path(fd)
            if not whole:
                return function(fd)
            disk.call("fsync", whole, lambda: function(fd))
            disk.flushed(fd)

        return watched

    changed = {"open": opened, "write": written}
    changed |= {name: flushed(name) for name in ("fsync", "fdatasync")}
    changed |= {name: of_two_paths(name, "rename") for name in ("rename", "replace")}
    changed |= {name: of_two_paths(name, name) for name in ("link", "symlink")}
    changed |= {name: of_a_path(name, "unlink") for name in ("unlink", "remove")}
    for name in ("mkdir", "rmdir", "chmod", "truncate", "ftruncate"):
        changed[name] = of_a_path(name, name.removeprefix("f"))
    for name, function in changed.items():
        setattr(os, name, function)


def calls(journal: Path) -> list[tuple]:
    """The calls of a journal, in order; the one that was struck, if any, is not among them."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return [tuple(line) for line in lines if line[0] != STRUCK]


def struck(journal: Path) -> bool:
    """Whether harm was done."""
    return any(json.loads(line)[0] == STRUCK for line in journal.read_text().splitlines())


def main() -> None:
    """A rank under torchrun. Harm is done once: not to what torchrun starts in its place."""
    how, rank = json.loads(sys.argv[1]), os.environ.get("RANK", "0")
    Path(how["journal"]).with_name(rank).write_text(str(os.getpid()))
    if rank == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        install(**how)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
