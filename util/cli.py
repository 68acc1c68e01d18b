"""Commands: a dataclass becomes flags, and a user's mistake becomes one line.

Every command of this project declares its settings once, as a dataclass whose fields have a
docstring each; the parser is derived from it, so no flag can exist without a meaning or a default.

Whatever a user can get wrong ends with one line on stderr (what, where, what to do) and exit code
2. The modules raise ValueError or OSError with such a line; `run_command` prints it. Anything else
is a bug of ours and keeps its traceback. Set GENHANCER_TRACEBACK=1 to see the traceback in every
case.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import multiprocessing
import operator
import os
import re
import signal
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------
def setting(default, choices: Sequence[str] | None = None, **notes):
    """A dataclass field that is a flag; the docstring below it is the flag's help.

    Args:
        default: its type is the flag's; a tuple makes a flag that may be repeated.
        choices: the only values allowed.
        notes: whatever the owner of the dataclass wants to remember at the field. Known here are
            the bounds "at_least", "at_most" and "above" (see `check_bounds`), and "first": where
            any field has it, the short help shows only those that do.
    """
    return dataclasses.field(default=default, metadata={"choices": choices, **notes})


@dataclasses.dataclass
class Group:
    """Fields under one title, as the help shows them."""

    title: str
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """field → the docstring below it"""


def help_groups(cls: type) -> list[Group]:
    """The fields of a dataclass with their docstrings, grouped by its lines ``# -- title``.

    Python keeps neither docstrings of fields nor comments, so the source is read.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    groups, titles = [Group("")], {}
    for number, line in enumerate(source.splitlines(), start=1):
        if line.strip().startswith("# -- "):
            titles[number] = line.strip().removeprefix("# -- ")
    for field, below in itertools.pairwise(ast.parse(source).body[0].body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            begun = [titles.pop(n) for n in list(titles) if n < field.lineno]
            groups += [Group(title) for title in begun]
            groups[-1].texts[field.target.id] = " ".join(below.value.value.split())
    return [group for group in groups if group.texts]


def parse_settings(
    cls: type,
    summary: str,
    examples: str,
    arguments: Sequence[str] | None = None,
    decides: Sequence[str] = (),
    hints: dict[str, str] | None = None,
):
    """Flags → an instance of `cls`.

    Args:
        cls: a dataclass whose fields were made by `setting`, each with a docstring.
        summary, examples: what the command does, and how it is called; for ``--help``.
        arguments: the command line, by default the process's own.
        decides: fields on which the defaults of others depend; ``--help`` takes them into account.
        hints: what to say of flags that do not exist.
    A flag that is unknown, or a value out of bounds, ends the process with one line.
    """
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.hints = hints or {}
    parser.add_argument("-h", "--help", nargs="?", const="short", choices=("short", "all"))
    for field in dataclasses.fields(cls):
        kind, options = type(field.default), {"default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options["action"] = "append"
        else:
            options |= {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(arguments))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    wanted = given.pop("help")
    try:
        if wanted:
            shown = cls(**{name: given[name] for name in decides if name in given})
            print(help_text(f"{summary}\n\n{examples}", shown, wanted == "all"))
            sys.exit(0)
        settings = cls(**given)
        check_bounds(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings


def help_text(about: str, shown, everything: bool) -> str:
    """What ``--help`` prints: what it is about, and flags with the values of `shown`, which is what
    a run has that is given nothing else."""
    spec = sys.modules["__main__"].__spec__  # of python -m; None: of a script
    command = f"-m {spec.name}" if spec else os.path.basename(sys.argv[0])
    fields = {field.name: field for field in dataclasses.fields(shown)}
    first = [name for name, field in fields.items() if field.metadata.get("first")]
    short = bool(first) and not everything
    groups = help_groups(type(shown))
    if short:
        texts = {name: text for group in groups for name, text in group.texts.items()}
        groups = [Group("used most", {name: texts[name] for name in first})]
    usage = f"usage: python {command} [--FLAG VALUE …] [--help{' [all]' * bool(first)}]"
    lines = [usage, "", *about.splitlines()]
    for group in groups:
        lines += ["", f"{group.title or 'flags'}:"]
        for name, text in group.texts.items():
            lines += _flag_lines(fields[name], text, getattr(shown, name))
    if short:
        more = f"All {len(fields)} flags with their reasons: python {command} --help all"
        lines += ["", more + " [--preset …]" * ("preset" in fields)]
    return "\n".join(lines)


def _flag_lines(field: dataclasses.Field, text: str, value) -> list[str]:
    """One flag: its name and values, then what it means and its default."""
    kind, choices = type(field.default), field.metadata["choices"]
    name = f"--{field.name}, --no-{field.name}" if kind is bool else f"--{field.name}"
    values = {bool: "", tuple: "TEXT (may be repeated)", str: "TEXT", int: "INT", float: "FLOAT"}
    head = f"  {name} {', '.join(choices) if choices else values[kind]}".rstrip()
    default = {"": "empty", (): "none", True: "on", False: "off"}.get(value, value)
    default = value if type(value) in (int, float) else default  # 1 == True
    about = textwrap.wrap(f"{text} (default: {default})", 94, break_long_words=False)
    column = 26
    if len(head) < column - 1 and len(about) == 1 and column + len(about[0]) <= 100:
        return [head.ljust(column) + about[0]]
    indent = " " * 6
    heads = textwrap.wrap(head, 100, subsequent_indent=indent, break_on_hyphens=False)
    return [*heads, *(indent + line for line in about)]


def check_bounds(settings) -> None:
    """Raises: ValueError naming the first value that is of another type than its field's, no choice
    of it, not finite, or out of bounds."""
    for field in dataclasses.fields(settings):
        name, value, notes = field.name, getattr(settings, field.name), field.metadata
        kind = type(field.default)
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"--{name} {value!r}: must be {KINDS[kind]}")
        if notes["choices"] and value not in notes["choices"]:
            choices = ", ".join(notes["choices"])
            hint = nearest(value, notes["choices"])
            raise ValueError(f"--{name} {value!r}: one of {choices}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: must be a finite number")
        for bound, words, holds in BOUNDS:
            if bound in notes and not holds(value, notes[bound]):
                raise ValueError(f"--{name} {value}: must be {words} {notes[bound]}")


KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple of texts",
}
BOUNDS = (
    ("at_least", "at least", operator.ge),
    ("at_most", "at most", operator.le),
    ("above", "above", operator.gt),
)


def nearest(wrong: str, names: Iterable[str]) -> str:
    """A question with the nearest spelling, or nothing."""
    near = [name for name in names if name.startswith(wrong)]  # typed in part
    near = near or difflib.get_close_matches(wrong, list(names), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage dump: the error in one line, with the nearest spelling."""

    hints: dict[str, str] = {}

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = next((w for w in message.split() if w.startswith("-")), "").split("=")[0]
            hint = self.hints.get(wrong.lstrip("-").replace("-", "_"))
            near = wrong and nearest(wrong, self._option_string_actions)
            message += f" ({hint})" if hint else near or " (see --help)"
        elif found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[\w-]+", found[2]))
        self.exit(2, f"{with_rank(self.prog)}: {printable(message)}\n")


# ------------------------------------------------------------------------------------------------
# Mistakes and interruptions
# ------------------------------------------------------------------------------------------------
def with_rank(command: str) -> str:
    """How a line begins: the command, and under torchrun the rank that says it."""
    return f"{command}, rank {os.environ['RANK']}" if "RANK" in os.environ else command


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster ends a job: what is under way ends as after Ctrl-C."""


def run_command(
    main: Callable[[], None], saved: Callable[[], str] | None = None, imports_follow: bool = False
) -> None:
    """Run a command; turn a user's mistakes and interruptions into one line and an exit code.

    Args:
        saved: says what survives, for the line printed after Ctrl-C or a full memory.
        imports_follow: this was the quick part, and seconds of imports come next, during which an
            interruption is one line, too. (Within them an exception would do: some libraries take
            it for a fault of their own.)
    """
    name = with_rank(os.path.basename(sys.argv[0]))
    before = _on_signals(signal.default_int_handler, _terminate)
    # The name of a file need not be text that a terminal can show: that is no reason to end.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test's, or a notebook's
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt as stop:
        _close_bars()
        ended = isinstance(stop, Terminated)
        what = "ended by SIGTERM" if ended else "interrupted"
        print(f"\n{name}: {what}{'; ' + saved() if saved else ''}", file=sys.stderr)
        sys.exit(143 if ended else 130)
    except (ValueError, OSError, MemoryError) as error:
        _end(name, error)
    except RuntimeError as error:
        text, after = str(error), f"; {saved()}" if saved else ""
        if "DataLoader worker" in text and "killed" in text:
            line = "a process that decodes images was killed, most likely for memory: lower "
            _end(name, MemoryError(line + "--workers" + after))
        if text.startswith("Symlink loop"):  # of pathlib
            _end(name, error)
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        advice = "lower --micro_batch (the global batch stays the same)"
        if name.startswith("eval_"):  # which have no batch to lower
            advice = "give it fewer pictures, captions or models at once"
        _end(name, MemoryError(f"not enough memory: {advice}{after}"))
    finally:
        _on_signals(*before)
    if imports_follow:
        stop = functools.partial(_stop_at_once, name)
        _on_signals(stop, stop)


def _on_signals(interrupt, terminate) -> tuple:
    """Who answers Ctrl-C and SIGTERM from now on. Returns: who did before."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
    return before


def _terminate(number, frame) -> typing.NoReturn:
    if multiprocessing.parent_process():  # a worker: the command itself says the line
        os._exit(143)
    raise Terminated


def _stop_at_once(name: str, number, frame) -> typing.NoReturn:
    what = "ended by SIGTERM" if number == signal.SIGTERM else "interrupted"
    print(f"\n{name}: {what} before anything began", file=sys.stderr, flush=True)
    os._exit(128 + number)


def printable(text: str) -> str:
    """One line without what would move a terminal's cursor or colour it: names of files and
    contents of JSON can hold anything."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _end(name: str, error: BaseException) -> typing.NoReturn:
    """The error in one line, and exit code 2."""
    if os.environ.get("GENHANCER_TRACEBACK"):
        raise error
    _close_bars()
    print(f"{name}: {printable(str(error)) or type(error).__name__}", file=sys.stderr)
    sys.exit(2)


def _close_bars() -> None:
    """Half a progress bar is no place for a line."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()
