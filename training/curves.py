"""How runs learnt, as one picture: ``python -m training.curves``.

    python -m training.curves runs/demo                        → runs/demo/curves.png
    python -m training.curves runs/demo runs/demo-perceiver    both in one picture → runs/curves.png
    python -m training.curves runs/demo --out demo.png

Stage 1 is on the left, stage 2 on the right. From top to bottom: the loss; the loss at each level
of noise or masking, one row a run, since one mean hides that easy and hard levels learn at
different times; the drift 1 − cos between the image tower and the original; and the gradient's norm
before clipping. All comes from RUNS/NAME/metrics.jsonl, so a run can be drawn while it goes on.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.runlog import read_metrics
from util.cli import OneLineParser, printable, run_command
from util.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = (1, 2)
LEVELS = {"t": "t  (1 is data)", "mask_ratio": "mask ratio"}  # what the loss is binned by
COLOURS = ("#246", "#c52", "#283", "#818", "#a80", "#088", "#666")
FROZEN = "CLIP is frozen: no drift"

# By stage, the columns of a run: what `read_metrics` returns.
Columns = dict[int, dict[str, list]]


def read_runs(runs: Sequence[str]) -> dict[str, Columns]:
    """What pictures call each run → its columns.

    Several denoisers have had their stages 1 in folders of their own inside the run: these are
    drawn as runs, too.

    Raises: FileNotFoundError for a folder without metrics.jsonl, ValueError for one in which
        nothing is logged yet, or which is named twice.
    """
    inside = {run: sorted(f.parent for f in Path(run).glob("*/metrics.jsonl")) for run in runs}
    of_parts = {str(part): f"{Path(run).resolve().name}/{part.name}"
                for run, found in inside.items() for part in found}  # fmt: skip
    runs = [*of_parts, *runs]
    names = [of_parts.get(run, Path(run).resolve().name) for run in runs]
    if len(set(names)) < len(names):
        names = [str(Path(run)) for run in runs]  # two runs of one name, in different folders
    if len(set(names)) < len(names):
        raise ValueError("the same run is named twice")
    return {name: read_columns(run) for name, run in zip(names, runs, strict=True)}


def read_columns(run: str) -> Columns:
    """The stages of one run that have a line. Raises: as `read_runs`."""
    found = {stage: read_metrics(run, stage) for stage in STAGES}
    found = {stage: columns for stage, columns in found.items() if columns.get("step")}
    if not found:
        raise ValueError(f"{run}: nothing is logged yet; train.py does so every --log_every steps")
    return found


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------
def draw(runs: dict[str, Columns]) -> "Figure":
    """The picture, 1000 pixels wide. Raises: ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no state, and no window
    except ImportError:
        line = "curves need matplotlib: pip install -r requirements-benchmarks.txt"
        raise ValueError(line) from None
    heights = [2.2, *[1.5 if len(runs) == 1 else 1.1] * len(runs), 1.6, 1.6]
    figure = Figure(figsize=(10, sum(heights) + 0.9), dpi=100, layout="constrained")
    widths = (1, 0.025) * len(STAGES)  # beside each panel a narrow one, for a scale of colours
    grid = figure.add_gridspec(
        len(heights), len(widths), height_ratios=heights, width_ratios=widths
    )
    for column, stage in enumerate(STAGES):
        part = {name: run[stage] for name, run in runs.items() if stage in run}
        panels = [figure.add_subplot(grid[row, 2 * column]) for row in range(len(heights))]
        panels[0].set_title(f"stage {stage}", fontweight="bold")
        colours = dict(zip(runs, COLOURS * len(runs), strict=False))
        draw_lines(panels[0], part, "loss", colours)
        draw_lines(panels[-2], part, "drift", colours)
        draw_lines(panels[-1], part, "gradient_norm", colours)
        scales = [figure.add_subplot(grid[1 + row, 2 * column + 1]) for row in range(len(runs))]
        draw_levels(panels[1:-2], scales, runs, stage)
        finish(panels, part, stage)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    else:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(names)))
    return figure


def draw_lines(
    axes: "Axes", runs: dict[str, dict[str, list]], what: str, colours: dict[str, str]
) -> None:
    """One quantity over the steps, a line a run. A run that does not log it draws none."""
    drawn = []
    for name, columns in runs.items():
        values = np.array(columns.get(what, [None] * len(columns["step"])), float)  # None → nan
        marker = "o" if len(values) == 1 else None  # a line of one point is not seen
        axes.plot(columns["step"], values, color=colours[name], lw=1.2, marker=marker, label=name)
        drawn += [value for value in values if np.isfinite(value)]
    axes.set_ylabel(what.replace("_", " "))
    if what == "drift":
        axes.set_ylim(bottom=0)
    elif drawn and min(drawn) > 0:
        logarithmic(axes, min(drawn), max(drawn))


def logarithmic(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic scale with plain numbers. matplotlib's own ticks are powers of ten, of which a
    loss that sinks from 0.28 to 0.26 crosses none."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    wide = high > 8 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.4g"))
    axes.yaxis.set_minor_locator(NullLocator())


def draw_levels(
    panels: list["Axes"], scales: list["Axes"], runs: dict[str, Columns], stage: int
) -> None:
    """A row a run: steps to the right, noise or mask level upwards, loss as colour.

    Rows that are binned by the same level share their colours, and can be compared.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    palette = colormaps["viridis"].with_extremes(bad="#ddd")  # grey: no picture fell into this bin
    found = {name: levels_of(run[stage]) for name, run in runs.items() if stage in run}
    norms = {}
    for level in {level for level, _, _ in found.values()}:
        losses = np.concatenate([x.ravel() for other, _, x in found.values() if other == level])
        losses = losses[np.isfinite(losses) & (losses > 0)]
        if losses.size:
            norms[level] = LogNorm(losses.min(), losses.max())
    for axes, scale, name in zip(panels, scales, runs, strict=True):
        level, edges, losses = found.get(name, ("", None, None))
        if len(runs) > 1:
            axes.set_title(name, fontsize="small", loc="left", pad=2)
        if level not in norms:
            scale.set_axis_off()
            continue
        axes.set_ylabel(LEVELS.get(level, level))
        heights = np.linspace(0, 1, len(losses) + 1)
        mesh = axes.pcolormesh(edges, heights, losses, norm=norms[level], cmap=palette)
        ticks = np.geomspace(mesh.norm.vmin, mesh.norm.vmax, 3)
        colours = scale.figure.colorbar(mesh, cax=scale, ticks=ticks, format="%.3g", label="loss")
        colours.minorticks_off()


def levels_of(columns: dict[str, list]) -> tuple[str, np.ndarray, np.ndarray]:
    """The loss per bin of one stage.

    Returns: the name of the level; the steps between which each line's window lies (lines + 1);
        the loss (bins, lines), nan where nothing fell into a bin. Without such a column: "", and
        nothing.
    """
    edges = np.array([0, *columns["step"]], float)
    name = next((n for n in columns if n.startswith("loss_per_")), None)
    if name is None:
        return "", edges, np.empty((0, len(edges) - 1))
    bins = max(len(line) for line in columns[name] if line)
    empty = [None] * bins
    losses = np.array([line or empty for line in columns[name]], float).T
    return name.removeprefix("loss_per_").removesuffix("_bin"), edges, losses


def finish(panels: list["Axes"], runs: dict[str, dict[str, list]], stage: int) -> None:
    """The same steps below all panels of a stage, and words where there is nothing to draw."""
    last = max((columns["step"][-1] for columns in runs.values()), default=1)
    for axes in panels:
        axes.set_xlim(0, last)
        axes.tick_params(labelbottom=axes is panels[-1])
        lines = any(np.isfinite(line.get_ydata()).any() for line in axes.lines)
        if lines:
            axes.grid(color="#e4e4e4", lw=0.6)
        elif not axes.collections:
            axes.set_yticks([])
            frozen = stage == 1 and runs and axes is panels[-2]
            words = FROZEN if frozen else "nothing logged"
            axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, c="#888")
    panels[-1].set_xlabel("step")


def save(figure: "Figure", file: Path) -> None:
    """The picture as PNG, replaced as a whole."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(file, content.getvalue())


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------
def command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, example, more = __doc__.split("\n\n")
    parser = OneLineParser(
        prog="python -m training.curves",
        description=f"{summary}\n\n{example}",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, as runs/NAME")
    text = "PNG to write (default: curves.png in the run; of several, beside the first)"
    parser.add_argument("--out", default="", metavar="FILE.png", help=text)
    return parser.parse_args(arguments)


def main() -> None:
    args = command_line()
    first = Path(args.runs[0])
    folder = first if len(args.runs) == 1 else first.resolve().parent
    file = Path(args.out) if args.out else folder / "curves.png"
    if file.suffix != ".png":
        raise ValueError(f"--out {file}: the picture is a PNG, call it {file.name}.png")
    save(draw(read_runs(args.runs)), file)
    print(f"written: {printable(str(file))}")


if __name__ == "__main__":
    run_command(main)
