"""README.md and docs/ tell the truth: equation map, file table, flags, figures, links, commands."""

import ast
import importlib
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")}
FOLDERS = ("pretrained", "training", "evaluation", "toy", "util")
FILES = [*ROOT.glob("*.py"), *(f for d in FOLDERS for f in (ROOT / d).glob("[!_]*.py"))]
SOURCES = {f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8") for f in FILES}


def table(text, heading):
    """The rows of the first Markdown table after a heading, cells stripped."""
    part = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def definition(file, dotted):
    """Source lines of a function, class or method, by dotted name."""
    node = ast.parse(SOURCES[file])
    for name in dotted.split("."):
        node = next(
            n
            for n in ast.walk(node)
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name
        )
    return "\n".join(SOURCES[file].splitlines()[node.lineno - 1 : node.end_lineno])


def test_it_is_two_pages():
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 15_000
    tables = [line for line in README.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) <= 100


# -- the equation map ----------------------------------------------------------------------------
MAP = table(README, "Where each equation lives")


@pytest.mark.parametrize("paper, place", [row[:2] for row in MAP])
def test_equation_map_is_true(paper, place):
    """Every row: the function exists, and the equation's name stands inside it."""
    file, name = re.fullmatch(r"`(\S+\.py):(\S+)`", place).groups()
    body = definition(file, name)
    for reference in paper.split("; "):
        # "Alg. 1, lines 3-7", "Alg. 1, lines 2 and 11" and "Eq. (1)" name their lines in one breath
        algorithm, _, line = reference.partition(", line ")
        spelling = rf"{re.escape(algorithm)}, lines? (\d+(-| and ))*{line}\b"
        found = re.search(spelling, body) if line else reference in body
        assert found, f"{reference} is not named in {file}:{name}"


def test_the_equation_map_is_whole():
    """Every equation, table and line that a comment marks in the code is in it."""
    assert len(MAP) >= 20
    mapped = {reference for row in MAP for reference in row[0].split("; ")}
    asked = {"Eq. (2)", "Theorem 1", "Alg. 1, line 6", "Alg. 2, line 5", "Eq. (5)", "Key Point #1"}
    assert asked <= mapped
    for file, source in SOURCES.items():
        for number in re.findall(r"# .*?(Eq\. \(S?\d\))", source):
            assert number in mapped, f"{file} implements {number}, and the map does not say so"


def test_reading_order_lists_every_file_and_room():
    rows = [
        re.search(r"`(\w+(?:\.py|/))`", row[0]).group(1) for row in table(README, "Reading order")
    ]
    assert set(rows) == {f.name for f in ROOT.glob("*.py")} | {f"{d}/" for d in FOLDERS}


# -- commands ------------------------------------------------------------------------------------
def commands(text):
    """Every command of the shell blocks, continuation lines joined, and of the tables' cells."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]
    cells = re.findall(r"`((?:python|torchrun|make) [^`]+)`", text)
    return [command.replace(" …", "") for command in [*found, *cells]]


ALL_COMMANDS = sorted({c for text in (README, *DOCS.values()) for c in commands(text)})


def test_the_first_two_commands():
    first = [c for c in commands(README) if c.startswith("make")]
    assert first[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{c.split()[1]}:", makefile, re.M) for c in first)


def script_of(command):
    """A command's script as a path from the root, and the words after it."""
    words = shlex.split(command)
    if words[1] == "-m":
        return words[2].replace(".", "/") + ".py", words[3:]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at], words[at + 1 :]


HELP = {}  # script → its --help, asked once


def help_of(script):
    if script not in HELP:
        module = ["-m", script.removesuffix(".py").replace("/", ".")]
        how = [script] if "/" not in script or script.startswith("benchmarks/") else module
        everything = ["--help", "all"] if script == "train.py" else ["--help"]
        done = subprocess.run(
            [sys.executable, *how, *everything], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        HELP[script] = done.stdout
    return HELP[script]


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if not c.startswith("make")])
def test_every_python_command_knows_its_flags(command):
    """The script exists, and each flag is one that it declares."""
    script, words = script_of(command)
    assert (ROOT / script).is_file()
    if script.startswith("notebooks/"):  # they are run by test_notebooks.py
        assert not any(word.startswith("--") for word in words)
        return
    text = help_of(script)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word.split('=')[0]}\b", text), f"{script} has no {word}"


def test_every_command_of_the_makefile_knows_its_flags():
    lines = (ROOT / "Makefile").read_text().splitlines()
    scripts = [line.strip().replace("$(PY)", "python") for line in lines if ".py " in line]
    assert len(scripts) >= 3
    for command in scripts:
        script, words = script_of(command)
        for word in words:
            assert not word.startswith("--") or word in help_of(script), f"{script} has no {word}"


def test_flags_named_anywhere_exist():
    """In running text a flag has no script beside it: some command must declare it."""
    scripts = {script_of(c)[0] for c in ALL_COMMANDS if not c.startswith("make")}
    known = "".join(help_of(script) for script in scripts if not script.startswith("notebooks/"))
    torchruns = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts"}
    for name, text in {"README.md": README, **DOCS}.items():
        for flag in re.findall(r"(?<![-|<!])--([a-z][a-z0-9_-]*)", text):
            declared = flag in torchruns | {"help"} or re.search(rf"--{flag}\b", known)
            assert declared, f"{name} names --{flag}"


def test_the_snippets_are_python_that_names_what_exists():
    for text in (README, *DOCS.values()):
        for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
            for node in ast.walk(ast.parse(snippet)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    for name in (alias.name for alias in node.names):
                        inside = f"{node.module}.{name}"
                        assert hasattr(module, name) or importlib.import_module(inside)


CELLS = re.findall(r"```python\n(.*?)```", DOCS["USAGE.md"].split("## From Python")[1], re.S)


@pytest.mark.parametrize("cell", CELLS, ids=range(1, len(CELLS) + 1))
def test_the_cells_run_and_are_short(cell, straight, tmp_path, monkeypatch, capsys):
    """Each as a script of its own, beside a run called runs/demo."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(straight)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    lines = [line for line in cell.splitlines() if line.strip()]
    beyond = [line for line in lines if not re.match(r"(from|import) ", line)]
    assert 3 <= len(beyond) <= 12
    exec(compile(cell, "cell", "exec"), {})  # our own text, from docs/USAGE.md
    printed = capsys.readouterr().out.splitlines()
    wanted = [name for name in ("drawn.png", "loss.png") if name in cell]
    assert all((tmp_path / name).stat().st_size > 1000 for name in wanted)
    assert wanted or len(printed) in (6, 20, 4)


def test_there_are_five_cells():
    assert len(CELLS) == 5


# -- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "heading, denoiser", [("Continuous denoiser", "flow"), ("Discrete denoiser", "perceiver")]
)
def test_settings_tables_name_the_presets_own_numbers(heading, denoiser):
    from settings import Settings

    rows = {row[0]: row[1:] for row in table(DOCS["SETTINGS.md"], heading)}
    full = Settings.of("openai-l14-224", denoiser=denoiser)
    toy = Settings.of("toy", denoiser=denoiser)
    plain = [cell.replace(" ", "").replace("\u202f", "") for cell in rows["steps"]]
    expected = [full.stage1_steps, full.stage2_steps, toy.stage1_steps, toy.stage2_steps]
    assert [int(cell) for cell in plain] == expected
    rates = [float(cell.split(",")[0]) for cell in rows["learning rate"]]
    assert rates == [full.stage1_lr, full.stage2_lr, toy.stage1_lr, toy.stage2_lr]
    assert [int(c) for c in rows["global batch"]] == [full.batch, full.batch, toy.batch, toy.batch]
    assert float(rows["λ of the drift term"][3]) == toy.drift_weight and full.drift_weight == 0
    if denoiser == "perceiver":
        for settings, cell in ((full, rows["denoiser"][0]), (toy, rows["denoiser"][2])):
            numbers = [settings.layers, settings.width, settings.heads]
            assert [int(n) for n in re.findall(r"\d+", cell)] == numbers


def test_parameter_table_of_the_perceiver():
    from perceiver_denoiser import PerceiverDenoiser, PerceiverDenoiserConfig

    part = DOCS["SETTINGS.md"].split("Parameters of the Perceiver")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")][2:]
    assert [int(row[0]) for row in rows] == [2, 4, 6, 8]
    for layers, *cells in rows:
        for codes, cell in zip((1024, 16384), cells, strict=True):
            config = PerceiverDenoiserConfig(codes=codes, layers=int(layers))
            with torch.device("meta"):
                count = sum(p.numel() for p in PerceiverDenoiser(config).parameters())
            assert int(cell.replace(" ", "").replace("\u202f", "")) == count


def test_links_and_pictures_exist():
    for folder, texts in ((ROOT, [README]), (ROOT / "docs", DOCS.values())):
        for text in texts:
            markdown = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
            for target in markdown + re.findall(r'(?:src|href)="([^"]+)"', text):
                if not target.startswith("http"):
                    assert (folder / target).exists(), target


def test_documents_hold_the_benchmarks_own_tables():
    """What `python benchmarks/results.py` would write is what stands there."""
    blocks = {}
    for name in ("RESULTS.md", "SETTINGS.md"):
        found = re.findall(r"<!-- benchmarks/(\w+)\.md -->\n(.*?)<!-- end -->", DOCS[name], re.S)
        blocks |= dict(found)
    for name, text in blocks.items():
        file = ROOT / "benchmarks" / f"{name}.md"
        assert text.strip() == file.read_text(encoding="utf-8").strip(), name
    committed = {file.stem for file in (ROOT / "benchmarks").glob("*.md")}
    arms = {"lambda0", "end_to_end", "end_to_end_lambda0", "perceiver_lambda0", "perceiver_learnt"}
    arms |= {"flow_along", "flow_along_scaled"}
    assert committed - arms == set(blocks), "each is shown; the arms are rows of one table"


def test_the_result_of_the_readme_is_in_the_benchmarks_files():
    """The side-by-side table's rows of sides, cost and group match on unmentioned subjects, each as
    it stands there; pattern by pattern is RESULTS.md's."""
    shown = table(README, "What it does, measured")
    whole = (ROOT / "benchmarks" / "side_by_side.md").read_text(encoding="utf-8")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in whole.splitlines()]
    heads = ("**unmentioned**", "group match, unmentioned", "**mentioned**",
             "**subject zero-shot**", "cosine to the original")  # fmt: skip
    assert shown == [row for row in rows if row[0] in heads] and len(shown) >= 4
