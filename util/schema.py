"""What a JSON file must hold, said once and checked before any of it is used.

A file that a stranger wrote, or one's own script with a slip, ends in a line that says where the
fault is: `items[3].image: expected text, found number`. The alternative is Python's own error from
some way behind the reader, or, worse, none: a text where a list of texts should be comes apart
into its letters. What must be there is written as the file itself would look:

    {"name?": str, "items": [{"id?": (int, str), "captions": [str], ...: object}]}

    str, bool, int, float    a text that is Unicode, true or false, a whole number, a finite number
    [x], {…}                 a list of x; an object with these keys, "?" behind those it may lack
    (x, y)                   either; object: anything
    ...: object              among keys: any other key, too. Else an unknown one is refused: it is
                             most likely misspelt, and would be left out without a word.
"""

import json
import sys
from pathlib import Path

from util.cli import nearest, printable

NAMES = {str: "text", bool: "true or false", int: "whole number", float: "number", list: "list"}
NAMES |= {dict: "object", type(None): "null"}


def read_json(file: str | Path, expected, what: str):
    """The content of a JSON file that holds what is expected (see above).

    Args: what: the flag or thing it is about, the beginning of every complaint.
    Raises: OSError; ValueError in one line: the file, the place in it, and what was found there.
    """
    try:
        content = json.loads(Path(file).read_bytes().decode("utf-8-sig"))
    # ValueError: no JSON, no UTF-8, a number of 5000 digits. RecursionError: [[[[[[[[[[[[[[[[[[…
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {printable(str(file))} is not JSON ({error})") from None
    try:
        check(content, expected)
    except ValueError as error:
        raise ValueError(f"{what} {printable(str(file))}: {error}") from None
    return content


def check(value, expected, place: str = "") -> None:
    """Raises: ValueError naming the first place below `place` that holds something else."""
    if isinstance(expected, tuple):
        kinds = expected
        expected = next((kind for kind in kinds if _is(value, kind)), None)
        if expected is None:
            raise ValueError(_complaint(value, kinds, place))
    if not _is(value, expected):
        raise ValueError(_complaint(value, (expected,), place))
    if isinstance(expected, list):
        for number, item in enumerate(value):
            check(item, expected[0], f"{place}[{number}]")
    elif isinstance(expected, dict):
        _check_keys(value, expected, place)


def _check_keys(value: dict, expected: dict, place: str) -> None:
    known = {key.rstrip("?"): kind for key, kind in expected.items() if key is not ...}
    for key in expected:
        if key is not ... and not key.endswith("?") and key not in value:
            raise ValueError(f"{place or 'the file'}: {key} is missing")
    for key, item in value.items():
        here = f"{place}.{printable(key[:40])}".lstrip(".")
        if key in known:
            check(item, known[key], here)
        elif ... not in expected:
            raise ValueError(f"{here} is unknown{nearest(key, known)}")


def _is(value, expected) -> bool:
    """Of the type alone; what is inside is `check`'s business."""
    if expected is object:
        return True
    if expected is str:
        return isinstance(value, str) and _is_unicode(value)
    if expected is float:
        return type(value) in (int, float) and _is_finite(value)
    return type(value) is (expected if isinstance(expected, type) else type(expected))


def _is_finite(number: float) -> bool:
    """Neither NaN nor infinite, nor a whole number that no float can hold."""
    return abs(number) <= sys.float_info.max


def _is_unicode(text: str) -> bool:
    """JSON can spell half a character, "\\ud800", which no file and no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _complaint(value, kinds: tuple, place: str) -> str:
    wanted = " or ".join(NAMES[k if isinstance(k, type) else type(k)] for k in kinds)
    found = NAMES[type(value)]
    if isinstance(value, str) and str in kinds:
        found = "text that is no Unicode"
    elif type(value) is int:
        found = "number" if _is_finite(value) else f"number of {len(str(abs(value)))} digits"
    elif type(value) is float and not _is_finite(value):
        found = repr(value)
    return f"{place or 'the file'}: expected {wanted}, found {found}"
