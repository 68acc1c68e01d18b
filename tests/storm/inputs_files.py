"""Everything that a command reads from the disk, made wrong on purpose.

Here are tables, lists, weights and folders, each with its own ways of being wrong. JSON is in
inputs_json.py, tar shards and their index in inputs_shards.py.
"""

import copy
import csv
import io
import itertools
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .forks import ROOT
from .inputs import REFUSED, Input
from .inputs_flags import ZEROSHOT
from .inputs_json import CAPTIONS, PAIRS, PHOTOS, VAE, json_cases
from .inputs_shards import shard_cases
from .inputs_world import QUESTIONS

# ------------------------------------------------------------------------------------------------
# Tables and lists
# ------------------------------------------------------------------------------------------------
CELLS = ("", " ", "x", "-1", "0", "1.5", "1000000000", "9" * 5000, "nan", "1", "\x00", '"', "a\nb",
         "\x1b[31m", "../..", "x" * 200_000, "/etc/passwd", "é", "١")  # fmt: skip


def table_cases() -> Iterator[Input]:
    """MMVP's Questions.csv and Flickr30k's results.csv."""
    rows = list(csv.reader(io.StringIO(QUESTIONS)))
    wrong: list[tuple[str, bytes]] = []
    for r, c in itertools.product((0, 1, 4), range(3)):
        for number, cell in enumerate(CELLS):
            table = copy.deepcopy(rows)
            table[r][c] = cell
            text = io.StringIO()
            csv.writer(text).writerows(table)
            wrong.append((f"row {r} column {c} = {number}", text.getvalue().encode()))
    wrong += raw_tables(QUESTIONS)
    line = (*PAIRS, "--benchmark", "{here}/set")
    for what, content in wrong:

        def prepare(here: Path, world: Path, content=content) -> None:
            (here / "set").mkdir()
            (here / "set" / "MMVP_VLM_Images").symlink_to(world / "mmvp" / "MMVP_VLM_Images")
            (here / "set" / "Questions.csv").write_bytes(content)

        yield Input(f"Questions.csv: {what}", line, prepare)
    plain = "image_name| comment_number| comment\npictures/0.png| 0| a red ball\n"
    cells = [(f"{k} = {number}", plain.replace(k, cell).encode("utf-8", "replace"))
             for k in ("pictures/0.png", " 0", "a red ball", "comment_number")
             for number, cell in enumerate(CELLS)]  # fmt: skip
    for what, content in (*cells, *raw_tables(plain)):

        def prepare(here: Path, world: Path, content=content) -> None:
            (here / "results.csv").write_bytes(content)

        yield Input(f"results.csv: {what}", (*CAPTIONS, "{here}/results.csv"), prepare)


def raw_tables(text: str) -> list[tuple[str, bytes]]:
    """A table that is wrong as a text."""
    whole = text.encode()
    lines = text.splitlines(keepends=True)
    return [
        ("empty", b""), ("head alone", lines[0].encode()), ("no head", "".join(lines[1:]).encode()),
        ("half", whole[: len(whole) // 2]), ("utf-16", text.encode("utf-16")),
        ("latin-1", whole + b"9,Color,\xe9\n"), ("NUL", whole.replace(b",", b"\x00,")),
        ("quote left open", whole.replace(b"a ", b'"a ', 1)),
        ("CR alone", whole.replace(b"\n", b"\r")),
        ("long field", whole + b'9,Color,"' + b"x" * 300_000 + b'"\n'),
        ("short row", whole + b"5\n"), ("long row", whole + b"5,Color,a,b,c,d\n"),
        ("row twice", whole + lines[1].encode()),
        ("other order", "".join([lines[0], *lines[:0:-1]]).encode()),
        ("columns swapped", whole.replace(b"Type,Statement", b"Statement,Type")),
        ("semicolons", whole.replace(b",", b";")), ("many lines", whole + b"\n" * 100_000),
        ("zeros", bytes(4096)),
    ]  # fmt: skip


def list_cases() -> Iterator[Input]:
    """--data LIST, a path a line."""
    good = "{world}/pictures/0.png\n" * 3
    wrong = {
        "empty": b"", "blank": b"\n \n\t\n", "zeros": bytes(4096), "utf-16": good.encode("utf-16"),
        "latin-1": b"\xe9.png\n", "NUL": b"a\x00b.png\n", "long line": b"x" * 5000,
        "itself": b"list.txt\n", "folder": b".\n", "pipe": b"pipe.png\n", "device": b"/dev/zero\n",
        "control": b"\x1b[31m.png\n", "no pictures": b"file\n" * 30, "one huge": b"x/" * 500_000,
        "carriage returns": b"file\r" * 3, "URL": b"https://a/b.png\n",
    }  # fmt: skip
    for what, content in wrong.items():

        def prepare(here: Path, world: Path, content=content) -> None:
            os.mkfifo(here / "pipe.png")
            (here / "file").write_bytes(b"no picture")
            (here / "list.txt").write_bytes(content)

        # Training stops before the first batch: what lies in the files is not seen.
        yield Input(f"list: {what}", (*PHOTOS, "--data", "{here}/list.txt"), prepare)


# ------------------------------------------------------------------------------------------------
# Weights and folders
# ------------------------------------------------------------------------------------------------
def weight_cases() -> Iterator[Input]:
    """Weights files: lengths that lie, numbers that are none."""
    whole = VAE.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    wrong = {"empty": b"", "half": whole[: len(whole) // 2], "seven bytes": whole[:7],
             "one byte short": whole[:-1], "one byte more": whole + b"\0",
             "header alone": whole[: 8 + size], "zeros": bytes(4096)}  # fmt: skip
    for number in (0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1):
        wrong[f"header of {number}"] = struct.pack("<Q", number) + whole[8:]
    for what, content in wrong.items():

        def prepare(here: Path, world: Path, content=content) -> None:
            (here / "wrong.safetensors").write_bytes(content)
            (here / "wrong.json").symlink_to(ROOT / "toy" / "clip.json")

        for flag in ("--vae", "--clip"):
            yield Input(f"weights {flag}: {what}", (*PHOTOS, flag, "{here}/wrong.safetensors"),
                       prepare, REFUSED)  # fmt: skip
    for flag, file in (("--vae", "vae"), ("--clip", "clip"), ("--vqgan", "vqgan")):
        for value in ("nan", "inf"):
            line = (*PHOTOS, flag, "{here}/wrong.safetensors")
            if flag == "--vqgan":
                line = tuple(
                    w
                    for w in line
                    if w
                    not in ("--rope_axes", "4,6,6", "--vector_dim", "12", "--context_dim", "20")
                )
                line += ("--denoiser", "perceiver")  # fmt: skip
            yield Input(f"weights {flag}: {value}", line, poisoned(file, float(value)), REFUSED)
    line = (PAIRS[0], "--model", "{here}/wrong.safetensors", *PAIRS[3:], "--benchmark",
            "{world}/pairs.json")  # fmt: skip
    yield Input("weights judged: nan", line, poisoned("clip", float("nan")), REFUSED)
    line = ("export_hf.py", "--model", "{here}/wrong.safetensors", "--out", "{here}/out")
    yield Input("weights exported: nan", line, poisoned("clip", float("nan")))


def poisoned(name: str, value: float) -> Callable[[Path], None]:
    """One number of a weights file is none."""

    def prepare(here: Path, world: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        source = ROOT / "toy" / f"{name}.safetensors"
        with safe_open(source, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = file.metadata()
        last = max(tensors, key=lambda key: tensors[key].numel())
        tensors[last].view(-1)[7] = value
        save_file(tensors, here / "wrong.safetensors", about)
        (here / "wrong.json").symlink_to(ROOT / "toy" / "clip.json")

    return prepare


def folder_cases() -> Iterator[Input]:
    """Folders of classes and of pictures, and model folders, with what does not belong there."""
    ways = {
        "a pipe": lambda f: os.mkfifo(f / "x.png"),
        "a loop": lambda f: (f / "x.png").symlink_to("x.png"),
        "a folder": lambda f: (f / "x.png").mkdir(), "nothing": lambda f: (f / "x.png").touch(),
        "a link to nothing": lambda f: (f / "x.png").symlink_to("nowhere"),
        "a device": lambda f: (f / "x.png").symlink_to("/dev/zero"),
        "a name beyond UTF-8": lambda f: shutil.copy(f / "0.png", f / "\udcff.png"),
        "an escape": lambda f: shutil.copy(f / "0.png", f / "\x1b[31m.png"),
        "a line": lambda f: shutil.copy(f / "0.png", f / "a\nb.png"),
        "a circle": lambda f: (f / "again").symlink_to(f, target_is_directory=True),
        "a bomb": lambda f: bomb(f / "x.png", 60_000),
        "a large one": lambda f: bomb(f / "x.png", 10_000),
        "text": lambda f: (f / "x.png").write_text("no picture"),
        "PostScript": lambda f: (f / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n"),
    }  # fmt: skip
    judge = (PAIRS[0].replace("mmvp", "zeroshot"), *ZEROSHOT[1:3], *PAIRS[3:])
    for what, make in ways.items():
        for commands in ("classes", "pictures"):

            def prepare(here: Path, world: Path, make=make, commands=commands) -> None:
                shutil.copytree(world / commands, here / "data")
                make(here / "data" / "red_ball" if commands == "classes" else here / "data")

            if commands == "classes":
                line = (*judge, "--classify", "{here}/data", "--template", "{}")
            else:
                line = (*PHOTOS, "--data", "{here}/data")
            yield Input(f"{commands} hold {what}", line, prepare)
    names = ("\x1b[31m", "bad\udcff", "line\nline", "x" * 200, "{}", "unknown word", " ", "%s")
    for name in names:

        def prepare(here: Path, world: Path, name=name) -> None:
            shutil.copytree(world / "classes", here / "data")
            (here / "data" / "red_ball").rename(here / "data" / name)

        line = (*judge, "--classify", "{here}/data", "--template", "{}")
        yield Input(f"class called {name!r:.40}", line, prepare)


def bomb(file: Path, side: int) -> None:
    """A PNG of side × side pixels, all black, in a few bytes a line."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    packer, line = zlib.compressobj(9), bytes(1 + side // 8)
    body = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def inputs(world: Path) -> Iterator[Input]:
    """Every file."""
    yield from json_cases(world)
    yield from table_cases()
    yield from list_cases()
    yield from shard_cases(world)
    yield from weight_cases()
    yield from folder_cases()
