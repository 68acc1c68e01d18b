"""README.md tells the truth: its equation map, its file table, its flags, its figures, its
links."""

import ast
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = {p.name: p.read_text(encoding="utf-8") for p in ROOT.glob("*.py")}


def table(heading):
    """The rows of the first Markdown table after a heading, cells stripped."""
    part = README.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
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


def test_equation_map_is_true():
    """Every row: the function exists, and the equation's name stands inside it."""
    rows = table("Where each equation lives")
    assert len(rows) >= 12
    for paper, place, _ in rows:
        file, name = re.fullmatch(r"`(\S+\.py):(\S+)`", place).groups()
        body = definition(file, name)
        for reference in paper.split(", "):
            assert reference in body, f"{reference} is not named in {file}:{name}"


def test_every_equation_named_in_the_code_is_in_the_map():
    mapped = {
        reference for row in table("Where each equation lives") for reference in row[0].split(", ")
    }
    for file, source in SOURCES.items():
        for number in re.findall(r"# .*?(Eq\. \(S?\d\))", source):
            assert number in mapped, f"{file} implements {number}, and the map does not say so"


def test_reading_order_lists_every_module():
    listed = {re.search(r"`(\w+\.py)`", row[0]).group(1) for row in table("Reading order")}
    assert listed == set(SOURCES), listed ^ set(SOURCES)


def commands():
    """Every command of the README's shell blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")
    ]


def test_the_first_two_commands():
    first = [c for c in commands() if c.startswith("make")]
    assert first[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{c.split()[1]}:", makefile, re.M) for c in first)


@pytest.mark.parametrize("command", [c for c in commands() if ".py" in c])
def test_every_python_command_knows_its_flags(command):
    """Each flag is one the script declares: appended --help would hide a wrong one, so compare."""
    words = shlex.split(command)
    script = next(w for w in words if w.endswith(".py"))
    done = subprocess.run(
        [sys.executable, script, *(["pretrain"] if "pretrain" in words else []), "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for word in words[words.index(script) + 1 :]:
        if word.startswith("--"):
            assert word in done.stdout, f"{script} has no {word}"


def test_flags_named_anywhere_exist():
    from settings import Settings

    fields = set(Settings.__dataclass_fields__)
    known = (
        fields
        | {f"no-{f}" for f in fields}
        | {
            "benchmark",
            "model",
            "nproc_per_node",
            "seeds",
            "name",
            "nnodes",
            "rdzv_backend",
            "rdzv_endpoint",
            "flags",
            "run",
            "out",
            "max-restarts",
            "template",
            "doubts",
            "classify",
            "root",
            "captions",
            "images",
            "probe",
            "layers",
            "only",
            "eval_only",
            "help",
        }
    )
    for flag in re.findall(r"(?<![-|])--([a-z][a-z0-9_-]*)", README):
        assert flag in known, f"README names --{flag}"


@pytest.mark.parametrize(
    "heading, denoiser", [("Settings", "flow"), ("Settings of the discrete denoiser", "perceiver")]
)
def test_settings_tables_name_the_presets_own_numbers(heading, denoiser):
    from settings import PERCEIVER, Settings, preset_of

    rows = {row[0]: row[1:] for row in table(heading)}
    full = Settings(**(PERCEIVER if denoiser == "perceiver" else {}))
    toy = Settings(**preset_of({"denoiser": denoiser}))
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

    part = README.split("Parameters of the Perceiver")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")][2:]
    assert [int(row[0]) for row in rows] == [2, 4, 6, 8]
    for layers, *cells in rows:
        for codes, cell in zip((1024, 16384), cells, strict=True):
            config = PerceiverDenoiserConfig(codes=codes, layers=int(layers))
            with torch.device("meta"):
                count = sum(p.numel() for p in PerceiverDenoiser(config).parameters())
            assert int(cell.replace(" ", "").replace("\u202f", "")) == count


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "name",
    [
        "toy_seeds",
        "perceiver",
        "side_by_side",
        "condition",
        "plans",
        "drift_study",
        "selection_study",
        "retention",
    ],
)
def test_result_figures_are_those_of_the_benchmark_files(name):
    """The tables in the README are the committed output of the commands beside them, to the
    letter; of the discrete denoiser's, the one on mentioned subjects is only linked."""
    text = (ROOT / "benchmarks" / f"{name}.md").read_text(encoding="utf-8")
    if name in ("toy_seeds", "perceiver"):
        result = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        assert len(result["seeds"]) == 5
    if name == "perceiver":
        text = text.split("**Toy benchmark, mentioned subjects**")[0]
    for line in text.splitlines():
        if line.startswith("|"):
            assert line in README, line
