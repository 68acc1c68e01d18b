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
import dataclasses
import difflib
import inspect
import itertools
import os
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence

from tqdm import tqdm


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------
def setting(default, choices: Sequence[str] | None = None, **notes):
    """A dataclass field that is a flag; the docstring below it is the flag's help.

    Args:
        default: its type is the flag's; a tuple makes a flag that may be repeated.
        choices: the only values allowed.
        notes: whatever the owner of the dataclass wants to remember at the field; "at_least" is
            known to `check_bounds`.
    """
    return dataclasses.field(default=default, metadata={"choices": choices, **notes})


def help_texts(cls: type) -> dict[str, str]:
    """Field → the docstring below it. Python keeps none for fields, so the source is read."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def parse_settings(
    cls: type,
    description: str,
    example: str,
    arguments: Sequence[str] | None = None,
    preset: Callable[[dict], dict] = lambda given: {},
):
    """Flags → an instance of `cls`.

    Args:
        cls: a dataclass whose fields were made by `setting`, each with a docstring.
        arguments: the command line, by default the process's own.
        preset: given flags → values that replace the fields' defaults; flags given by hand win.
    A flag that is unknown, or a value out of bounds, ends the process with one line.
    """
    parser = OneLineParser(
        description=description,
        epilog=example,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    texts = help_texts(cls)
    for field in dataclasses.fields(cls):
        kind, choices = type(field.default), field.metadata["choices"]
        shown = field.default if field.default != () else "none"
        text = f"{texts[field.name]} (default: {shown})".replace("%", "%%")
        options = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"action": "append", "metavar": "TEXT"}
        else:
            options |= {"type": kind, "choices": choices}
            options |= {} if choices else {"metavar": kind.__name__.upper()}
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(arguments))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    settings = cls(**{**preset(given), **given})
    try:
        check_bounds(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings


def check_bounds(settings) -> None:
    """Raises: ValueError naming the first number below the "at_least" of its field."""
    for field in dataclasses.fields(settings):
        value, least = getattr(settings, field.name), field.metadata.get("at_least")
        if least is not None and value < least:
            raise ValueError(f"--{field.name} {value}: must be at least {least}")


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage dump: the error in one line, with the nearest spelling."""

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = next((w for w in message.split() if w.startswith("-")), "").split("=")[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1, cutoff=0.5)
            message += f" (did you mean {near[0]}?)" if near else " (see --help)"
        self.exit(2, f"{with_rank(self.prog)}: {message}\n")


# ------------------------------------------------------------------------------------------------
# Mistakes and interruptions
# ------------------------------------------------------------------------------------------------
def with_rank(command: str) -> str:
    """How a line begins: the command, and under torchrun the rank that says it."""
    return f"{command}, rank {os.environ['RANK']}" if "RANK" in os.environ else command


def run_command(main: Callable[[], None], saved: Callable[[], str] | None = None) -> None:
    """Run a command; turn a user's mistakes and interruptions into one line and an exit code.

    Args: saved: says what survives, for the line printed after Ctrl-C or a full memory.
    """
    name = with_rank(os.path.basename(sys.argv[0]))
    try:
        main()
    except KeyboardInterrupt:
        _close_bars()
        print(f"\n{name}: interrupted{'; ' + saved() if saved else ''}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        _end(name, error)
    except RuntimeError as error:
        text, after = str(error), f"; {saved()}" if saved else ""
        if "DataLoader worker" in text and "killed" in text:
            line = "a process that decodes images was killed, most likely for memory: lower "
            _end(name, MemoryError(line + "--workers" + after))
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        line = "not enough memory: lower --micro_batch (the global batch stays the same)"
        _end(name, MemoryError(line + after))


def _end(name: str, error: BaseException) -> typing.NoReturn:
    """The error in one line, and exit code 2."""
    if os.environ.get("GENHANCER_TRACEBACK"):
        raise error
    _close_bars()
    print(f"{name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    sys.exit(2)


def _close_bars() -> None:
    """Half a progress bar is no place for a line."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()
