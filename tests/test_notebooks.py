"""The notebooks: each runs as a script, and what is shown was made from it."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
ONE_BY_ONE = pytest.mark.parametrize("source", SOURCES, ids=[s.stem for s in SOURCES])


def cells_of(source):
    """(kind, text) of each cell of a percent-format file, its header aside."""
    parts = re.split(r"^# %%(.*)$", source.read_text(encoding="utf-8"), flags=re.M)[1:]
    cells = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        text = text.strip("\n")
        if "[markdown]" in mark:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines())
            cells.append(("markdown", text))
        else:
            cells.append(("code", text))
    return cells


@ONE_BY_ONE
def test_it_runs_as_a_script(source, tmp_path):
    """All its asserts hold; it leaves no file, and nothing is warned of."""

    def there():
        folders = (ROOT / "notebooks", ROOT / "docs")
        return {f for folder in folders for f in folder.iterdir() if f.name != "__pycache__"}

    before = there()
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", source],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert there() == before


@ONE_BY_ONE
def test_what_is_shown_was_made_from_the_source(source):
    shown = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in shown["cells"]]
    assert found == cells_of(source), f"run python notebooks/build.py {source.name[:2]}"


@ONE_BY_ONE
def test_it_was_executed_in_order_without_noise(source):
    file = source.with_suffix(".ipynb")
    text = file.read_text(encoding="utf-8")
    shown = json.loads(text)
    assert file.stat().st_size < 1.5e6 and "widgets" not in shown["metadata"]
    code = [cell for cell in shown["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    said = "".join("".join(o.get("text", "")) for o in outputs)
    assert str(ROOT) not in text and not re.search(r"/(home|root|tmp|work)/", said)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@ONE_BY_ONE
def test_verdicts_that_are_shown_are_those_of_the_records(source, monkeypatch):
    """Runs come, and what is corrected for twelve claims moves: an old notebook shows."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from verdicts import CLAIMS, judge, said

    shown = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    outputs = [o for c in shown["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    lines = "".join("".join(o.get("text", "")) for o in outputs).splitlines()
    told = [(n, c) for n, c in enumerate(CLAIMS) if f"{c.title} ({c.source})" in lines]
    assert bool(told) == ("tell(" in source.read_text(encoding="utf-8"))
    todo = f"run python notebooks/build.py {source.name[:2]}"
    for number, claim in told:
        start = lines.index(f"{claim.title} ({claim.source})")
        verdicts = [said(judge(equal)[number]).replace("**", "") for equal in (False, True)]
        now = [f"  as trained: {verdicts[0]}", f"  at equal retention: {verdicts[1]}"]
        assert lines[start + 2 : start + 4] == now, todo


@ONE_BY_ONE
def test_cells_are_short_and_claims_are_asserted(source):
    cells = cells_of(source)
    for kind, text in cells:
        if kind == "code":
            assert len([line for line in text.splitlines() if line.strip()]) <= 15, text
    tree = ast.parse("\n".join(text for kind, text in cells if kind == "code"))
    assert len([node for node in ast.walk(tree) if isinstance(node, ast.Assert)]) >= 5
    assert max(map(len, source.read_text(encoding="utf-8").splitlines())) <= 100


def test_there_are_seven_with_a_picture_each():
    assert [s.name[:2] for s in SOURCES] == [f"{n:02d}" for n in range(1, 8)]
    assert all((ROOT / "docs" / f"{s.stem}.png").is_file() for s in SOURCES)


def test_the_builder_executes_and_strips(tmp_path, monkeypatch):
    """In order, with outputs, the gallery's picture apart; a failing cell is one error."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import build

    source = tmp_path / "09_small.py"
    plot = "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])"
    source.write_text(
        f'# %% [markdown]\n# Text.\n\n# %%\nx = 3\nprint(x)\n\n# %% tags=["gallery"]\n{plot}\n'
    )
    notebook = build.build(source)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code"]
    assert notebook.cells[1].outputs[0].text == "3\n"
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert build.gallery(notebook).startswith(b"\x89PNG")
    source.write_text("# %%\nassert 1 == 2\n")
    with pytest.raises(ValueError, match="a cell failed"):
        build.build(source)
