"""cli.py: flags from dataclasses, presets, and one line for every mistake."""

import dataclasses
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

from settings import Settings
from util.cli import check_bounds, parse_settings, run_command, setting


@dataclass(frozen=True)
class Example:
    """Of what a command can be told."""

    # -- the first group
    # with a reason
    size: int = setting(1, at_least=1, at_most=99)
    """how big,
    in %"""
    rate: float = setting(0.5, above=0)
    """how fast"""
    # -- the second group
    loud: bool = setting(False)
    """say so"""
    kind: str = setting("a", choices=("a", "b"))
    """which kind"""
    also: tuple[str, ...] = setting(())
    """more of them"""


def parse(*arguments):
    hints = {"speed": "it is called --rate"}
    return parse_settings(Example, "x", "y", list(arguments), hints=hints)


def test_defaults_and_flags():
    assert parse() == Example()
    assert parse("--size", "7", "--loud") == Example(7, loud=True)
    assert parse("--kind", "b", "--no-loud") == Example(kind="b")


def test_a_tuple_is_a_flag_that_may_be_repeated():
    assert parse().also == () and parse("--also", "x", "--also", "y").also == ("x", "y")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--szie", "3"], "did you mean --size"),
        (["--qqqqqq"], "see --help"),
        (["b.tar"], "unrecognized arguments: b.tar (see --help)"),
        (["--size", "three"], "invalid int value: 'three'"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--size", "0"], "--size 0: must be at least 1"),
        (["--size", "100"], "--size 100: must be at most 99"),
        (["--rate", "0"], "--rate 0.0: must be above 0"),
        (["--rate", "nan"], "--rate nan: must be a finite number"),
        (["--speed", "3"], "unrecognized arguments: --speed 3 (it is called --rate)"),
        (["--kind", "aa"], "did you mean a?"),
        (["--siz", "3"], "did you mean --size"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and len(text.strip().splitlines()) == 1


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_and_defaults(capsys):
    text = help_of(capsys, "--help")
    assert "how big, in % (default: 1)" in text and "(default: off)" in text
    places = [text.index(part) for part in ("the first group:", "--size", "the second group:")]
    assert places == sorted(places) and "with a reason" not in text
    assert text == help_of(capsys, "--help", "all"), "nothing is marked as used most"


# -- train.py's own ------------------------------------------------------------------------------
def train_help(capsys, *arguments):
    with pytest.raises(SystemExit):
        decides = ("preset", "denoiser")
        parse_settings(Settings, "x", "y", [*arguments, "--help", "all"], decides=decides)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "preset, denoiser", [("toy", "flow"), ("toy", "perceiver"), ("openai-l14-224", "flow")]
)
def test_help_shows_what_a_bare_run_uses(capsys, preset, denoiser):
    """Of every flag, the default that is shown is the value of a run that gives nothing else."""
    flags = ["--preset", preset, "--denoiser", denoiser]
    text, bare = train_help(capsys, *flags), parse_settings(Settings, "", "", flags)
    assert bare == Settings.of(preset, denoiser=denoiser)
    blocks = re.split(r"\n  --(?=[a-z])", text)[1:]
    shown = {}
    for block in blocks:
        name, words = re.split(r"[,\s]", block, maxsplit=1)
        shown[name] = re.search(r"\(default: (.*?)\)(?=\n|$)", " ".join(words.split("\n      ")))[1]
    assert shown.keys() == vars(bare).keys()
    for name, value in vars(bare).items():
        words = "on" if value is True else "off" if value is False else value or "empty"
        words = value if isinstance(value, int | float) and not isinstance(value, bool) else words
        assert "".join(shown[name].split()) == str(words), name


def test_the_first_screen_is_short():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 60 and max(map(len, lines)) <= 100
    assert "--stage1_steps" in done.stdout and "--lora_rank" not in done.stdout
    assert "python train.py --help all" in done.stdout


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


def test_an_evaluation_without_memory_names_no_flag_of_training(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_zeroshot.py"])

    def main():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4e10")

    with pytest.raises(SystemExit):
        run_command(main)
    assert "not enough memory: give it fewer pictures" in capsys.readouterr().err


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


# -- interruptions ---------------------------------------------------------------------------------
IMPORTS = """
import signal, sys, time
from util.cli import run_command
run_command(lambda: None, imports_follow=True)
print("ready", flush=True)
time.sleep(60)
"""
WORK = """
import sys, time
from util.cli import run_command
def main():
    print("ready", flush=True)
    time.sleep(60)
run_command(main, lambda: "all is saved")
"""


@pytest.mark.parametrize(
    "code, number, status, line",
    [
        (IMPORTS, signal.SIGINT, 130, "-c: interrupted before anything began"),
        (IMPORTS, signal.SIGTERM, 143, "-c: ended by SIGTERM before anything began"),
        (WORK, signal.SIGINT, 130, "-c: interrupted; all is saved"),
        (WORK, signal.SIGTERM, 143, "-c: ended by SIGTERM; all is saved"),
    ],
)
def test_interruptions_are_one_line_at_any_time(code, number, status, line):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", code], **how)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status and said.strip() == line


def test_signals_are_answered_as_before_when_a_command_has_ended():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_command(lambda: None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_a_terminal_would_obey_is_escaped(capsys, monkeypatch):
    """And a name that is no UTF-8 can be said, on stdout too."""

    def fail():
        raise ValueError("no file a\x1b[31mb\x07\udcff and ö, \n 2 lines")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit):
        run_command(fail)
    assert capsys.readouterr().err == r"x.py: no file a\x1b[31mb\x07\udcff and ö, 2 lines" + "\n"
    code = "from util.cli import run_command; run_command(lambda: print('\\udcff'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == b"\\udcff\n"


def test_every_number_has_a_range():
    """From both sides, so that no slip of a finger trains on nonsense or fills the memory."""
    for field in dataclasses.fields(Settings):
        if type(field.default) in (int, float):
            notes = field.metadata
            assert "at_most" in notes and {"at_least", "above"} & notes.keys(), field.name
            for value in (notes["at_most"] * 1.01 + 1, -1):
                kind = type(field.default)
                with pytest.raises(ValueError, match=f"--{field.name} .* must be"):
                    check_bounds(Settings.of("toy", **{field.name: kind(value)}))
