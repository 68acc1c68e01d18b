"""Shared by the storm's tests: one process that forks for them all, and the undisturbed runs."""

import pytest

from .forks import Forks
from .runs import PLANS, undisturbed


@pytest.fixture(scope="session")
def forks():
    with Forks() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def measures(forks, tmp_path_factory):
    """Undisturbed runs, by plan."""
    folder = tmp_path_factory.mktemp("measures")
    return {name: undisturbed(forks, PLANS[name], folder) for name in ("flow", "perceiver")}
