"""A few flipped bits, where they hurt most: in a checkpoint, and in what evaluations remember."""

import pytest

from . import flips
from .table import spread, try_case


@pytest.mark.parametrize("title", ["checkpoints", "features of evaluations"])
def test_a_flipped_bit_is_noticed_mended_or_harmless(title, forks, tmp_path):
    cases = flips.cases(forks, tmp_path / "part", (title,))
    tried = (try_case(case, forks, tmp_path / case.name[-9:]) for case in spread(cases, 8))
    assert not [wrong for wrong, _ in tried if wrong]


def test_there_are_enough_of_them():
    assert sum(kind.flips for kind in flips.kinds()) >= 200
