"""The disk that fails does fail: a storm that does no harm would prove nothing."""

import errno
import json
import signal

import pytest

from . import disk
from .forks import Forks
from .storm import LAST, REPORT, as_table, report
from .table import Case, Row, spread, try_case

# Two files, the second one flushed; a third that replaces a fourth; perhaps a flush of the folder.
SCRIPT = """
import os, sys
from pathlib import Path
here = Path(sys.argv[1])
try:
    with open(here / "loose", "w") as file:
        file.write("x" * 1000)
    with open(here / "safe", "wb") as file:
        file.write(b"y" * 1000)
        file.flush()
        os.fsync(file.fileno())
    (here / "new").write_text("new")
    with open(here / "new", "rb") as file:
        os.fsync(file.fileno())
    os.replace(here / "new", here / "old")
    if "flush the folder" in sys.argv:
        folder = os.open(here, os.O_RDONLY)
        os.fsync(folder)
    (here / "sub").mkdir()
    (here / "loose").unlink()
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.fixture
def harmed(forks: Forks, tmp_path):
    """Run the script with a harm; gives its exit code and what is in its folder then."""
    script, here, journal = tmp_path / "script.py", tmp_path / "here", tmp_path / "journal"

    def run(harm, *at, half=False, more=()):
        here.mkdir()
        (here / "old").write_text("old")
        script.write_text(SCRIPT)
        fault = {"folder": str(tmp_path), "journal": str(journal), "harm": harm, "at": at}
        # The watched folder is the parent: a folder's own fsync is a call inside it.
        command, said = [str(script), str(here), *more], tmp_path.with_suffix(".said")
        ended = forks.run(command, said, fault={**fault, "half": half})
        assert not at or disk.struck(journal)
        return ended.code, {p.name: p.read_text() for p in here.iterdir() if p.is_file()}

    return run


def test_undisturbed_every_call_is_seen(harmed, tmp_path):
    code, left = harmed("")
    assert code == 0 and left == {"safe": "y" * 1000, "old": "new"}
    seen = [(what, path) for what, path, _ in disk.calls(tmp_path / "journal")]
    assert seen == [
        ("open", "here/loose"), ("write", "here/loose"),
        ("open", "here/safe"), ("write", "here/safe"), ("fsync", "here/safe"),
        ("open", "here/new"), ("write", "here/new"), ("fsync", "here/new"),
        ("rename", "here/old"), ("mkdir", "here/sub"), ("unlink", "here/loose"),
    ]  # fmt: skip


def test_a_kill_comes_before_the_call_or_half_way_through(harmed):
    code, left = harmed("kill", "write", "here/safe", 1, half=True)
    assert code == -signal.SIGKILL and left == {
        "loose": "x" * 1000,
        "safe": "y" * 500,
        "old": "old",
    }


def test_a_power_cut_takes_what_was_not_flushed(harmed):
    """Content by the file's fsync, a rename by the folder's."""
    code, left = harmed("power", "mkdir", "here/sub", 1)
    assert code == -signal.SIGKILL
    assert left == {"loose": "", "safe": "y" * 1000, "new": "new", "old": "old"}


def test_what_was_flushed_survives_a_power_cut(harmed):
    _, left = harmed("power", "mkdir", "here/sub", 1, more=["flush the folder"])
    assert left == {"loose": "", "safe": "y" * 1000, "old": "new"}


def test_a_full_disk_stays_full_and_a_broken_call_is_one(harmed, tmp_path):
    code, left = harmed("full", "write", "here/safe", 1, half=True)
    assert code == errno.ENOSPC and left["safe"] == "y" * 500


def test_a_broken_call_says_so(harmed):
    code, left = harmed("broken", "rename", "here/old", 1)
    assert code == errno.EIO and left["old"] == "old"


# -- what the storm makes of it ------------------------------------------------------------------
def test_a_case_that_fails_in_any_way_is_a_failure_of_that_case(tmp_path):
    def wrong(forks, folder):
        raise AssertionError("two\nlines")

    def broken(forks, folder):
        raise KeyError("x")

    row = Row("row")
    for number, check in enumerate((wrong, broken, lambda forks, folder: None)):
        case = Case("row", "case", check, count=10)
        row.add(case, *try_case(case, None, tmp_path / str(number)))
    assert row.tried == 30 and row.failures == ["case: two lines", "case: KeyError: 'x'"]
    assert "| row | 30 | 2 |" in as_table([row])
    about = {
        "date": "2026-01-02",
        "commit": "abc",
        "hardware": "h",
        "versions": "v",
        "minutes": 9.4,
    }
    rows = [{"title": row.title, "tried": row.tried, "failures": row.failures}]
    page = report({"test_kills": {**about, "rows": rows}})
    assert "Killed anywhere" in page and "| row | 30 | 2 |" in page
    assert "**2 of these went wrong**" in page and "| kills | 30 | 9.4 | 2026-01-02 | abc |" in page


def test_the_report_is_that_of_the_last_storm():
    assert REPORT.read_text(encoding="utf-8") == report(json.loads(LAST.read_text()))


def test_spread_takes_the_first_and_the_last():
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread(range(3), 9) == [0, 1, 2]
