"""The storm: runs are killed, disks fail, inputs lie, and everything must come out right.

    make storm                                      all of it, on two cores; writes RELIABILITY.md
    python -m tests.storm.storm --only kills        one part of it
    python -m tests.storm.storm --every 20          every twentieth case of each part
    pytest tests/storm                              a small selection, as `make test` has it

**A part** is a module of this package with a function

    def cases(forks: Forks, folder: Path) -> list[Case]

which lists what is to be tried. `folder` is the part's own and outlives its cases: what they all
compare with goes there. A `Case` (table.py) has the line of the table that it counts in, a name,
and `check(forks, folder)`, which gets an empty folder of its own and raises AssertionError, with
one line, where something went wrong. `Forks` (forks.py) starts train.py and the other commands as
forks of one process that has imported PyTorch already: a start takes no time, and what the command
printed, its exit code and its memory come back. The same cases serve both: storm.py runs them all,
test_*.py a few of them.
"""
