"""The house of the project: who may import whom, what may be copied alone, and how long a file,
a function or a line may be."""

import ast
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("pretrained", "training", "evaluation", "toy", "util")
ROOT_FILES = {
    "genhancer", "paradigms", "flow_denoiser", "perceiver_denoiser", "lora", "data",  # the method
    "settings", "presets", "train", "eval_mmvp", "eval_zeroshot", "export_hf",  # the commands
}  # fmt: skip
# Floors from the ground up: a file imports what stands on a lower floor. Within a folder, files may
# use one another, as long as there is no circle.
FLOORS = [
    {"flow_denoiser", "perceiver_denoiser", "lora", "data", "export_hf", "presets", "util"},
    {"pretrained", "settings"},
    {"paradigms", "evaluation"},
    {"genhancer"},
    {"toy"},
    {"training", "eval_mmvp", "eval_zeroshot"},
    {"train"},
    {"benchmarks", "notebooks"},
]
COPY_ALONE = (
    "lora.py",
    "flow_denoiser.py",
    "perceiver_denoiser.py",
    "export_hf.py",
    "pretrained/autoencoders.py",
    "pretrained/backbones.py",
)


def modules():
    """Dotted name → source file, of everything that is ours but tests."""
    files = [*ROOT.glob("*.py"), *(f for d in FOLDERS for f in (ROOT / d).glob("*.py"))]
    files += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in sorted(files)}


MODULES = modules()
OURS = {name.split(".")[0] for name in MODULES}


def imports(name):
    """Modules of ours that a module imports, within functions as well."""
    tree, found = ast.parse(MODULES[name].read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            # `from toy import world` names a module, `from toy.world import draw` does not
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        found |= {n for n in names if n.split(".")[0] in OURS}
    beside = {f"benchmarks.{n}" for n in found if f"benchmarks.{n}" in MODULES}
    return {n for n in found if n in MODULES or n in FOLDERS} | beside


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if name.split(".")[0] in names)


def functions(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


# -- rooms ---------------------------------------------------------------------------------------
def test_twelve_files_at_the_root_and_five_folders_of_code():
    assert {f.stem for f in ROOT.glob("*.py")} == ROOT_FILES and len(ROOT_FILES) == 12
    aside = {"tests", "benchmarks", "notebooks", "docs", "runs"}
    with_code = {f.parent.name for f in ROOT.glob("[!.]*/*.py")} - aside
    assert with_code == set(FOLDERS)
    nested = [f for d in FOLDERS for f in (ROOT / d).glob("*/*.py")]
    assert not nested, "one deep"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_says_in_one_line_what_lives_there(folder):
    text = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree) and len(tree.body) == 1 and len(text.splitlines()) == 1


# -- arrows --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODULES)
def test_arrows_go_down_only(name):
    for other in imports(name):
        same_room = "." in name and name.split(".")[0] == other.split(".")[0]
        assert same_room or floor(other) < floor(name), f"{name} imports {other}, which is no lower"


def test_no_circles():
    seen, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' → '.join([*path, name])}"
        if name in seen or name not in MODULES:
            return
        path.append(name)
        for other in imports(name) - {name}:
            visit(other)
        seen.add(path.pop())

    for name in MODULES:
        visit(name)
    assert seen == set(MODULES)


@pytest.mark.parametrize("file", [*COPY_ALONE, "data.py"])
def test_copy_alone_files_import_nothing_of_ours(file):
    assert not imports(file.removesuffix(".py").replace("/", "."))


def test_copy_alone_files_work_in_an_empty_folder(tmp_path):
    """Copied there together and imported one by one, from outside of this project."""
    for file in COPY_ALONE:
        (tmp_path / Path(file).name).write_bytes((ROOT / file).read_bytes())
    names = [Path(file).stem for file in COPY_ALONE]
    code = f"import {', '.join(names)}, sys; print([m for m in sys.modules if m in {sorted(OURS)}])"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in (["-c", code], ["perceiver_denoiser.py"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "guessing uniformly costs" in done.stdout


# -- sizes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODULES)
def test_lengths_of_lines_files_and_functions(name):
    file = MODULES[name]
    lines = file.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines), default=0) <= 100
    # A notebook's text is in its source too; export_hf goes both ways, and is copied as one file.
    limit = 600 if name.startswith("notebooks.") else 500
    assert len(lines) <= {"train": 370, "export_hf": 535}.get(name, limit)
    for function in functions(file):
        limit = 70 if function.name == "run_stage" else 80
        length = function.end_lineno - function.lineno + 1
        assert length <= limit, f"{name}.{function.name}: {length} lines"


def test_no_function_of_the_loop_and_the_commands_has_more_than_six_parameters():
    for name in MODULES:
        for function in functions(MODULES[name]):
            arguments = function.args
            named = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
            count = len([a for a in named if a not in ("self", "cls")])
            # LoRAAttention.forward has the signature of the nn.MultiheadAttention it stands in for,
            # and fakes' flash() that of scaled_dot_product_attention.
            if (name, function.name) in (("lora", "forward"), ("training.fakes", "flash")):
                continue
            assert count <= 6, f"{name}.{function.name}: {named}"


def test_test_files_are_no_longer_than_others():
    for file in (ROOT / "tests").glob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 500 and max(map(len, lines), default=0) <= 100, file.name


@pytest.mark.parametrize("name", sorted(ROOT_FILES))
def test_a_quarter_to_45_percent_of_a_root_file_is_prose(name):
    """Lines with a comment or of a docstring (also a field's): at least a quarter of all lines, at
    most 45 % of those that are not empty."""
    source = MODULES[name].read_text(encoding="utf-8")
    lines = source.splitlines()
    prose = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    full = {number for number, line in enumerate(lines, start=1) if line.strip()}
    share, dense = len(prose) / len(lines), len(prose & full) / len(full)
    assert share >= 0.25 and dense <= 0.45, f"{name}: {share:.1%} of all, {dense:.1%} of non-empty"


def test_nothing_speaks_of_how_it_was_made():
    """The paper's notes that the authors of this project worked from are not part of it."""
    for file in [*MODULES.values(), *(ROOT / "tests").glob("*.py")]:
        text = file.read_text(encoding="utf-8")
        if file.name != Path(__file__).name:
            assert "METHOD" not in text and "DESIGN.md" not in text, file.name
