"""A small selection of wrong inputs, and whether the judge sees what is wrong."""

import dataclasses

import pytest

from . import inputs, inputs_flags
from .forks import Ended
from .inputs_world import make_world
from .table import spread, try_case


@pytest.fixture(scope="module")
def cases(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return inputs.cases(forks, folder, make_world(forks, folder))


def failures(cases, forks, folder):
    tried = (try_case(case, forks, folder / str(number)) for number, case in enumerate(cases))
    return [wrong for wrong, _ in tried if wrong]


@pytest.mark.parametrize("row", [inputs.FLAGS, inputs.FILES], ids=["flags", "files"])
def test_no_wrong_input_is_obeyed_or_ends_in_a_traceback(row, cases, forks, tmp_path):
    chosen = spread([case for case in cases if case.row == row], 24)
    assert not failures(chosen, forks, tmp_path)


def test_every_setting_of_every_command_is_asked(cases):
    asked = inputs_flags.inputs()
    words = {word.split("=")[0] for one in asked for word in one.command}
    for _, settings in inputs_flags.commands():
        assert words >= {f"--{field.name}" for field in dataclasses.fields(settings)}
    assert len(cases) >= 600 and len({case.name for case in cases}) > 0.99 * len(cases)


SAID = "train.py: --batch 0: must be at least 1\n"


@pytest.mark.parametrize(
    "wanted, code, said, problem",
    [
        ("refused", 2, SAID, ""),
        ("either", 2, "a note\n" + SAID, ""),
        ("refused", 0, "", "accepts nonsense"),
        ("refused", inputs.REACHED, "", "accepts nonsense"),
        ("accepted", inputs.REACHED, "", ""),
        ("accepted", 2, SAID, "refuses sense"),
        ("either", 1, "", "exit code 1"),
        ("either", 1, "Traceback (most recent call last):\n", "traceback"),
        ("either", -11, "", "died of signal 11"),
        ("either", 2, "", "0 lines"),
        ("either", 2, SAID + "more\n", "1 lines"),
        ("either", 2, SAID * 2, "2 lines"),
        ("either", 2, "train.py: \n", "0 lines"),
        ("either", 2, "train.py: None\n", "says nothing"),
        ("either", 2, "train.py: no file \x1b[31m\n", "raw"),
        ("either", 2, "train.py: MemoryError\n", "GB"),
    ],
)
def test_the_judge_knows_right_from_wrong(wanted, code, said, problem):
    found = inputs.problem_of(wanted, Ended(code, said, 0.1, 0.5))
    assert problem in found and bool(problem) == bool(found), found


def test_what_hangs_or_swells_is_wrong():
    assert "hangs" in inputs.problem_of("either", Ended(-9, "", 60, 0.5, hung=True))
    assert "GB" in inputs.problem_of("either", Ended(0, "", 1, 2.5))


def test_bounds_tell_sense_from_nonsense():
    known = {field.name: field for field in dataclasses.fields(inputs_flags.commands()[0][1])}

    def sense(name, text):
        return inputs_flags.sense_of(known[name], text)

    for name, text in (("batch", "0"), ("crop_min", "1.5"), ("stage1_lr", "nan"), ("seed", "1.5")):
        assert sense(name, text) == "refused", name
    assert sense("batch", "8") == sense("stage1_lr", "0.1") == "either"
