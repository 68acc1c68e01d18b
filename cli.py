"""Commands: a dataclass becomes flags, and a user's mistake becomes one line.

Every command of this project declares its settings once, as a dataclass whose fields carry their
own help; the parser is derived from it, so no flag can exist without a meaning or a default.

Whatever a user can get wrong ends with one line on stderr (what, where, what to do) and exit code
2. The modules raise ValueError or OSError with such a line; `run_command` prints it. Anything else
is a bug of ours and keeps its traceback. Set GENHANCER_TRACEBACK=1 to see the traceback in every
case.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Sequence

from tqdm import tqdm


def setting(default, help: str, choices: Sequence | None = None):
    """A dataclass field with the help text (and choices) of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def speaker(command: str) -> str:
    """Who says a line: the command, and under torchrun the rank."""
    return f"{command}, rank {os.environ['RANK']}" if "RANK" in os.environ else command


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage dump: the error in one line, with the nearest spelling."""

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = next((w for w in message.split() if w.startswith("-")), "").split("=")[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1, cutoff=0.5)
            message += f" (did you mean {near[0]}?)" if near else " (see --help)"
        self.exit(2, f"{speaker(self.prog)}: {message}\n")


def parse_settings(
    cls: type,
    presets: dict[str, dict],
    description: str,
    example: str,
    arguments: Sequence[str] | None = None,
    preset_of: Callable[[dict], dict] | None = None,
):
    """Parse flags into `cls`. A preset replaces defaults; flags given by hand replace the
    preset's.

    Args: preset_of: given flags → the preset's values, where they depend on more than its name.
    """
    parser = OneLineParser(
        description=description,
        epilog=example,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(cls):
        kind = (
            field.type if isinstance(field.type, type) else typing.get_type_hints(cls)[field.name]
        )
        choices = list(presets) if field.name == "preset" else field.metadata["choices"]
        text = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
        options = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": choices}
        if not choices and kind is not bool:
            options["metavar"] = kind.__name__.upper()
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(arguments))
    name = given.get(
        "preset", next(f.default for f in dataclasses.fields(cls) if f.name == "preset")
    )
    chosen = preset_of(given) if preset_of else presets[name]
    return cls(**{**chosen, "preset": name, **given})


def run_command(main: Callable[[], None], saved: Callable[[], str] | None = None) -> None:
    """Run a command; turn a user's mistakes and interruptions into one line and an exit code.

    Args: saved: says what survives, for the line printed after Ctrl-C or a full memory.
    """
    name = speaker(os.path.basename(sys.argv[0]))
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted{'; ' + saved() if saved else ''}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        _explain(name, error)
    except RuntimeError as error:
        text, after = str(error), f"; {saved()}" if saved else ""
        if "DataLoader worker" in text and "killed" in text:
            line = "a process that decodes images was killed, most likely for memory: lower "
            _explain(name, MemoryError(line + "--workers" + after))
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        line = "not enough memory: lower --micro_batch (the global batch stays the same)"
        _explain(name, MemoryError(line + after))


def _explain(name: str, error: BaseException) -> typing.NoReturn:
    if os.environ.get("GENHANCER_TRACEBACK"):
        raise error
    for bar in list(getattr(tqdm, "_instances", [])):  # half a progress bar is no place for a line
        bar.close()
    print(f"{name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    sys.exit(2)
