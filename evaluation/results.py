"""Where an evaluation's results lie: beside the model that they are about.

    an enhanced model, runs/NAME/enhanced     runs/NAME/eval/
    any other model                           RUNS/eval/MODEL/
    any model, with --out DIR                 DIR/MODEL/

An evaluation compares models with the first one, so every model but the first gets a report of its
own (a model that stands alone gets one, too). Its files share one name, which says what was asked
and who was compared with: toy-vs-toy-clip.json, .md, and pictures. The same evaluation again
replaces them. Another evaluation that would have the same name (other prompts, another set of that
name) gets a number: toy-vs-toy-clip-2. That holds for two that run at the same time, too: a name is
taken by whoever creates its JSON first, with what was asked in it.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from util.cli import printable
from util.files import created, write_atomically


def folders_of(models: dict[str, str], out: str, runs: str) -> dict[str, Path]:
    """Name → folder, of every model that gets a report. Raises: OSError where nothing can be
    written. Asked before anything is computed; nothing is made."""
    first, *others = models
    folders = {name: folder_of(models[name], name, out, runs) for name in others or [first]}
    for folder in folders.values():
        check_folder(folder)
    return folders


def folder_of(model: str, name: str, out: str, runs: str) -> Path:
    """The folder for results about one model, by the table above.

    Args: model: its spelling; name: what tables call it; out: --out, "" for none; runs: --runs.
    """
    path = Path(model)
    if not out and path.name == "enhanced" and path.is_dir():
        return path.parent / "eval"
    return Path(out or Path(runs) / "eval") / slug(name)


def slug(text: str) -> str:
    """Letters that every file system takes: "ViT-B-32:openai" → "ViT-B-32-openai"."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "model"


def check_folder(folder: Path) -> None:
    """Can files be written there? Raises: OSError saying what is in the way."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"results go to {folder}, but {there} is a file; name another --out"
        )
    if not os.access(there, os.W_OK):
        raise PermissionError(
            f"results go to {folder}, but {there} cannot be written; change --out"
        )


def reports(
    models: dict[str, str], folders: dict[str, Path], what: str, evaluation: dict
) -> list[tuple[list[str], Path, dict]]:
    """The reports to write: the names of the models in it, the first one first; what the names of
    its files begin with; and `evaluation` with the models, for its JSON.

    Args:
        models: name → spelling; folders: name → folder, of those that get a report.
        what: the benchmark; evaluation: all that tells this evaluation from others but the models.
    """
    first, found = next(iter(models)), []
    for name, folder in folders.items():
        pair = list(dict.fromkeys((first, name)))
        whole = {**evaluation, "models": {n: identity(models[n]) for n in pair}}
        stem = slug(what if name == first else f"{what}-vs-{first}")
        stem = stem.encode()[:120].decode(errors="ignore")  # of the 255 bytes that a name may have
        taken = {other for _, other, _ in found}
        found.append((pair, place(folder, stem, whole, taken), whole))
    return found


def place(folder: Path, name: str, evaluation: dict, taken: Iterable[Path] = ()) -> Path:
    """The files' common beginning: folder/name, with a number if another evaluation has that. It is
    this evaluation's from now on: the JSON exists, with `evaluation` in it and no figures yet.

    Args: evaluation: all that tells it from others, as its JSON holds it under "evaluation";
        taken: places that are given away and not yet written to.
    """
    wanted = json.loads(json.dumps(evaluation))  # tuples become lists, as in a file
    for number in itertools.count(1):
        stem = folder / (name + (f"-{number}" if number > 1 else ""))
        if stem in taken:
            continue
        file = with_ending(stem, ".json")
        if created(file, json.dumps({"evaluation": wanted})):
            return stem
        try:
            if json.loads(file.read_text(encoding="utf-8"))["evaluation"] == wanted:
                return stem
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # somebody else's file


def with_ending(stem: Path, ending: str) -> Path:
    """Path.with_suffix would take what follows a dot in a model's name for a suffix."""
    return stem.with_name(stem.name + ending)


def write(stem: Path, content: dict, text: str) -> list[Path]:
    """Figures for programs as JSON, the tables as Markdown. Returns: the files."""
    files = [with_ending(stem, ".json"), with_ending(stem, ".md")]
    write_atomically(files[0], json.dumps(content, indent=1))
    write_atomically(files[1], text)
    return files


def written(files: list[Path]) -> str:
    """The lines that name every file, a folder once."""
    lines = []
    for folder, group in itertools.groupby(files, lambda file: file.parent):
        lines += [f"written to {printable(str(folder))}:"]
        lines += [f"  {printable(file.name)}" for file in group]
    return "\n".join(lines)


def identity(path: str) -> str:
    """One spelling for a file or folder; whatever is none stays as it is."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path
