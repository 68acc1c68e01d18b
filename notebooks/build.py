"""Execute the notebooks and write them with their outputs.

    python notebooks/build.py                  all of them: NN_name.py → NN_name.ipynb
    python notebooks/build.py 02 05            some of them

The source of a notebook is its .py file, in the percent format: ``# %%`` begins a cell of code,
``# %% [markdown]`` one of text. It runs as a plain script as well, which is how the tests run it;
the .ipynb beside it is made here and not edited. The picture of the cell with the tag "gallery"
becomes docs/NN_name.png.
"""

import base64
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from util.cli import run_command
from util.files import write_atomically

SOURCES = sorted(HERE.glob("[0-9][0-9]_*.py"))


def build(source: Path) -> nbformat.NotebookNode:
    """A notebook with its outputs, and with nothing that tells when or where they were made."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    # Progress is plain text here, and that is as it should be: no warning that widgets are missing.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    where = {"metadata": {"path": str(HERE)}}
    quiet = {"timeout": 300, "resources": where, "extra_arguments": ["--log-level=ERROR"]}
    try:
        NotebookClient(notebook, kernel_name="python3", **quiet).execute()
    except CellExecutionError as error:
        raise ValueError(f"{source.name}: a cell failed:\n{error}") from None
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # nbformat draws them at random: files would always differ
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
    return notebook


def gallery(notebook: nbformat.NotebookNode) -> bytes | None:
    """The last picture of the cell tagged so, as PNG."""
    outputs = [
        o for c in notebook.cells if "gallery" in c.metadata.get("tags", []) for o in c.outputs
    ]
    found = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return base64.b64decode(found[-1]) if found else None


def main() -> None:
    wanted = sys.argv[1:]
    if wanted in (["-h"], ["--help"]):
        print(__doc__)
        return
    chosen = [s for s in SOURCES if not wanted or s.name[:2] in wanted]
    if len(chosen) < len(wanted):
        raise ValueError(f"expected numbers of notebooks, like {SOURCES[0].name[:2]}")
    for source in chosen:
        start = time.time()
        notebook = build(source)
        target = source.with_suffix(".ipynb")
        write_atomically(target, nbformat.writes(notebook) + "\n")
        if picture := gallery(notebook):
            write_atomically(HERE.parent / "docs" / f"{source.stem}.png", picture)
        size = target.stat().st_size / 1e6
        print(f"written: notebooks/{target.name}, {size:.2f} MB, {time.time() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
