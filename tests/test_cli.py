"""cli.py: flags from dataclasses, presets, and one line for every mistake."""

import sys
from dataclasses import dataclass

import pytest

from util.cli import parse_settings, run_command, setting


@dataclass(frozen=True)
class Example:
    """Of what a command can be told."""

    preset: str = setting("small", choices=("small", "large"))
    """which"""
    size: int = setting(1, at_least=1)
    """how big,
    in %"""
    rate: float = setting(0.5)
    """how fast"""
    loud: bool = setting(False)
    """say so"""
    kind: str = setting("a", choices=("a", "b"))
    """which kind"""
    also: tuple[str, ...] = setting(())
    """more of them"""


PRESETS = {"small": {}, "large": {"size": 100, "loud": True}}


def parse(*arguments):
    return parse_settings(
        Example, "x", "y", list(arguments), lambda given: PRESETS[given.get("preset", "small")]
    )


def test_defaults_presets_and_flags_in_that_order():
    assert parse() == Example()
    assert parse("--preset", "large") == Example("large", 100, 0.5, True)
    assert parse("--preset", "large", "--size", "7", "--no-loud").size == 7
    assert not parse("--preset", "large", "--no-loud").loud


def test_a_preset_may_depend_on_other_flags():
    def preset_of(given):
        return {"size": 10 if given.get("kind") == "b" else 1}

    def parse(*arguments):
        return parse_settings(Example, "x", "y", list(arguments), preset_of)

    assert parse().size == 1 and parse("--kind", "b").size == 10
    assert parse("--kind", "b", "--size", "3").size == 3


def test_a_tuple_is_a_flag_that_may_be_repeated():
    assert parse().also == () and parse("--also", "x", "--also", "y").also == ("x", "y")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--szie", "3"], "did you mean --size"),
        (["--qqqqqq"], "see --help"),
        (["--size", "three"], "invalid int value: 'three'"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--size", "0"], "--size 0: must be at least 1"),
        (["--preset", "medium"], "invalid choice: 'medium'"),
        (["--siz", "3"], "did you mean --size"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and len(text.strip().splitlines()) == 1


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "how big, in % (default: 1)" in text


@pytest.mark.parametrize(
    "error, code, message",
    [
        (ValueError("two\nlines"), 2, "two lines"),
        (FileNotFoundError("gone"), 2, "gone"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "lower --micro_batch"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            "not enough memory",
        ),
        (KeyboardInterrupt(), 130, "kept in X"),
    ],
)
def test_errors_become_one_line(capsys, monkeypatch, error, code, message):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main, lambda: "kept in X")
    text = capsys.readouterr().err
    assert stop.value.code == code and message in text and len(text.strip().splitlines()) == 1


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def bug():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_command(bug)
    monkeypatch.setenv("GENHANCER_TRACEBACK", "1")

    def mistake():
        raise ValueError("wanted in full")

    with pytest.raises(ValueError, match="wanted in full"):
        run_command(mistake)
