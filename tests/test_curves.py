"""training/curves.py: what is drawn is what was logged."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from training import curves
from util.cli import run_command

matplotlib = pytest.importorskip("matplotlib")


def line(stage, step, level="t", **more):
    """A line as train.py writes it."""
    bins = [None, *[1.0 + stage + 0.01 * step] * 9]
    gradient = {"loss": 2.0 / step, f"loss_per_{level}_bin": bins, "gradient_norm": 0.5 / step}
    return {"stage": stage, "step": step, "images": 8 * step, **gradient, "lr": 1e-3, **more}


def write_run(folder, lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return folder


@pytest.fixture
def run(tmp_path):
    lines = [line(1, step) for step in (10, 20, 30)]
    lines += [line(2, step, drift=0.001 * step) for step in (5, 10)]
    return write_run(tmp_path / "runs" / "a", lines)


@pytest.fixture
def discrete(tmp_path):
    return write_run(tmp_path / "runs" / "b", [line(1, s, "mask_ratio") for s in (10, 20, 40)])


def command(monkeypatch, capsys, *arguments):
    """The command in this process: exit code and what it said."""
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, arguments)])
    code = 0
    try:
        run_command(curves.main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def panels(figure):
    """Label of the vertical axis and place (column) → the panel; scales of colours are left out."""
    found = {}
    for axes in figure.axes:
        spec = axes.get_subplotspec()
        if spec.colspan.start % 2 == 0:
            found.setdefault((axes.get_ylabel(), spec.colspan.start // 2 + 1), []).append(axes)
    return found


# -- what is drawn -------------------------------------------------------------------------------
def test_lines_go_through_what_was_logged(run):
    found = panels(curves.draw(curves.read_runs([str(run)])))
    for what, stage, steps, values in (
        ("loss", 1, [10, 20, 30], [0.2, 0.1, 2 / 30]),
        ("loss", 2, [5, 10], [0.4, 0.2]),
        ("drift", 2, [5, 10], [0.005, 0.01]),
        ("gradient norm", 2, [5, 10], [0.1, 0.05]),
    ):
        [axes] = found[what, stage]
        [drawn] = axes.lines
        assert list(drawn.get_xdata()) == steps and np.allclose(drawn.get_ydata(), values)
        assert axes.get_xlim() == (0, steps[-1])
    [frozen] = found["drift", 1]
    assert [text.get_text() for text in frozen.texts] == [curves.FROZEN]


def test_the_heat_map_has_a_cell_for_each_window_and_bin(run):
    found = panels(curves.draw(curves.read_runs([str(run)])))
    [axes] = found["t  (1 is data)", 1]
    [mesh] = axes.collections
    cells = mesh.get_array()
    assert cells.shape == (10, 3)
    assert cells.mask[0].all() and not cells.mask[1:].any(), "nothing fell into the first bin"
    assert np.allclose(cells[1:], [2.1, 2.2, 2.3])
    corners = mesh.get_coordinates()
    assert list(corners[0, :, 0]) == [0, 10, 20, 30], "a line is about the steps before it"
    assert np.allclose(corners[:, 0, 1], np.linspace(0, 1, 11))


def test_several_runs_in_one_picture(run, discrete):
    figure = curves.draw(curves.read_runs([str(run), str(discrete)]))
    found = panels(figure)
    [axes] = found["loss", 1]
    assert [drawn.get_label() for drawn in axes.lines] == ["a", "b"]
    assert len({drawn.get_color() for drawn in axes.lines}) == 2
    assert axes.get_xlim() == (0, 40), "the longest"
    [one], [other] = found["t  (1 is data)", 1], found["mask ratio", 1]
    assert one.get_title("left") == "a" and other.get_title("left") == "b"
    # stage 2 of b: its row says that there is nothing
    words = [text.get_text() for axes in found["", 2] for text in axes.texts]
    assert words == ["nothing logged"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_runs_of_one_level_share_their_colours(run, tmp_path):
    other = write_run(tmp_path / "runs" / "c", [line(1, 500)])
    figure = curves.draw(curves.read_runs([str(run), str(other)]))
    meshes = [axes.collections[0] for axes in panels(figure)["t  (1 is data)", 1]]
    assert len(meshes) == 2 and len({(mesh.norm.vmin, mesh.norm.vmax) for mesh in meshes}) == 1
    assert meshes[0].norm.vmin == pytest.approx(2.1) and meshes[0].norm.vmax == pytest.approx(7.0)


@pytest.mark.parametrize(
    "lines",
    [
        [line(1, 7)],
        [line(2, 7, drift=0.0)],
        [line(1, 7, loss=None), line(1, 9)],
        [{"stage": 1, "step": 3, "loss": 1.0}, line(1, 6)],
        [{"stage": 1, "step": 3, "loss": 1.0}],
        [line(1, 5, loss_per_t_bin=[None] * 10)],
    ],
    ids=["one line", "stage 2 alone", "no loss", "older line", "no levels", "empty bins"],
)
def test_runs_that_have_little(tmp_path, lines, recwarn):
    file = tmp_path / "x.png"
    curves.save(curves.draw(curves.read_runs([str(write_run(tmp_path / "r", lines))])), file)
    assert Image.open(file).width == 1000
    assert not [str(w.message) for w in recwarn if "matplotlib" in w.filename]


# -- the command ---------------------------------------------------------------------------------
def test_where_the_picture_goes(run, discrete, tmp_path, monkeypatch, capsys):
    for arguments, file in (
        ([run], run / "curves.png"),
        ([run, discrete], run.parent / "curves.png"),
        ([run, "--out", tmp_path / "new" / "x.png"], tmp_path / "new" / "x.png"),
    ):
        code, said = command(monkeypatch, capsys, *arguments)
        assert code == 0 and said.out == f"written: {file}\n", said.err
        picture = Image.open(file)
        assert picture.width == 1000 and picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50, "something is drawn"
    assert sorted(p.name for p in run.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_two_runs_of_one_name(run, tmp_path):
    other = write_run(tmp_path / "more" / "a", [line(1, 10)])
    assert list(curves.read_runs([str(run), str(other)])) == [str(run), str(other)]


def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "quiet", [])
    write_run(tmp_path / "other", [{"accuracy": 1}])
    (write_run(tmp_path / "broken", []) / "metrics.jsonl").write_text("what}\n")
    for arguments, words in (
        ([tmp_path / "nowhere"], "no metrics.jsonl"),
        ([tmp_path / "empty"], "no metrics.jsonl"),
        ([run, tmp_path / "empty"], "no metrics.jsonl"),
        ([tmp_path / "quiet"], "nothing is logged yet"),
        ([tmp_path / "other"], "not every line"),
        ([tmp_path / "broken"], "not every line"),
        ([run, run], "named twice"),
        ([run, "--out", tmp_path / "x.jpg"], "is a PNG"),
        ([], "RUN"),
        ([run, "--ou"], "--out"),
    ):
        code, said = command(monkeypatch, capsys, *arguments)
        assert code == 2 and words in said.err, (arguments, said.err)
        assert len(said.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.jpg")) and not (run / "curves.png").exists()


def test_without_matplotlib(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, said = command(monkeypatch, capsys, run)
    assert code == 2 and "pip install -r requirements-benchmarks.txt" in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_it_starts_as_a_module_and_shows_an_example(run):
    """With a display that is not there: no window is ever opened."""
    environment = {**os.environ, "MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    for arguments, words in (
        (["--help"], "python -m training.curves runs/demo runs/demo-perceiver"),
        ([str(run)], f"written: {run / 'curves.png'}"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "training.curves", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and words in done.stdout, done.stderr
