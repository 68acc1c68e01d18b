"""Everything a user can get wrong, over all commands: one clear line, exit code 2, no traceback.

One table, run in this process: each row is a command line and the words its one line must hold.
Runs on several ranks and kills are in test_distributed.py and test_train.py.
"""

import io
import json
import pickle
import runpy
import shlex
import shutil
import sys
import tarfile

import open_clip
import pytest
import torch
from conftest import ROOT, TINY_CLIP
from PIL import Image
from safetensors.torch import save_file

FAST = (
    "train.py --toy_images 32 --width 32 --heads 2 --rope_axes 4,6,6 --batch 8 --micro_batch 8 "
    "--stage1_steps 2 --stage2_steps 2 --save_every 1 --runs {runs} "
)
NO_DATA = "train.py --preset openai-l14-224 --clip {toy}/clip.safetensors --runs {runs} "
FULL = NO_DATA + "--data {here}/good "
SMALL = NO_DATA + "--vae {toy}/vae.safetensors --width 32 --heads 2 --rope_axes 4,6,6 "


class Evil:
    """What a pickle can do to whoever opens it."""

    def __reduce__(self):
        return (open, ("/tmp/genhancer-was-here", "w"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of every broken kind, and one finished run."""
    here = tmp_path_factory.mktemp("world")
    names = {"toy": ROOT / "toy", "runs": here / "runs", "here": here}
    for folder in ("empty", "broken", "good", "garbage", "bare", "hf"):
        (here / folder).mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(here / "good" / f"{i}.png")
        (here / "broken" / f"{i}.jpg").write_bytes(b"\xff\xd8 no picture")
    (here / "list.txt").write_text("good/0.png\ngood/nowhere.png\n")
    (here / "empty.txt").write_text("\n")
    (here / "garbage" / "0.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(here / "words.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("1.txt"), io.BytesIO())
    (here / "cut.safetensors").write_bytes((ROOT / "toy" / "vae.safetensors").read_bytes()[:5000])
    with open(here / "evil.ckpt", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    other = open_clip.CLIP(**{**TINY_CLIP, "embed_dim": 12})
    save_file(other.state_dict(), here / "other.safetensors")
    shutil.copy(ROOT / "toy" / "clip.json", here / "other.json")
    save_file(other.state_dict(), here / "alone.safetensors")
    (here / "hf" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (here / "file").write_text("a file where a folder should be")

    code, text = command(f"{FAST} --name done", names)
    assert code == 0, text
    for name, victim in (("damaged", "trained.safetensors"), ("halved", "moments.safetensors")):
        shutil.copytree(here / "runs" / "done", here / "runs" / name)
        (here / "runs" / name / "enhanced" / "README.md").unlink()  # else it is finished
        for file in (here / "runs" / name / "stage2").glob(f"step_*/{victim}"):  # not one is sound
            file.write_bytes(file.read_bytes()[:50])
    mmvp(here / "mmvp")
    for case in ("no table", "no id", "no picture", "bad picture", "no column"):
        shutil.copytree(here / "mmvp", here / case.replace(" ", "_"))
    (here / "no_table" / "Questions.csv").unlink()
    table = here / "no_id" / "Questions.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    (here / "no_picture" / "MMVP_VLM_Images" / "Color" / "2.jpg").unlink()
    (here / "bad_picture" / "MMVP_VLM_Images" / "Color" / "2.jpg").write_bytes(b"nothing")
    (here / "no_column" / "Questions.csv").write_text("Question ID,Statement\n1,a\n")
    return names


def mmvp(folder):
    pictures = folder / "MMVP_VLM_Images" / "Color"
    pictures.mkdir(parents=True)
    rows = ["Question ID,Type,Statement"]
    for i in range(1, 5):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(pictures / f"{i}.jpg")
        rows.append(f'{i},Color,"a ""red"" thing, number {i}"')
    (folder / "Questions.csv").write_text("\n".join(rows) + "\n")


def command(line, names):
    """Run a command of this project in this process. Returns: exit code, what it printed."""
    script, *arguments = [part.format(**names) for part in shlex.split(line)]
    out, argv, streams = io.StringIO(), sys.argv, (sys.stdout, sys.stderr)
    sys.argv, sys.stdout, sys.stderr = [script, *arguments], out, out
    code = 0
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, (sys.stdout, sys.stderr) = argv, streams
        torch.manual_seed(0)
    return code, out.getvalue()


TABLE = [
    # flags
    ("train.py --stag 1", "did you mean --stage?"),
    ("train.py --preset tyo", "invalid choice: 'tyo'"),
    ("train.py --stage 3", "invalid choice: '3'"),
    ("train.py --stage1_steps many", "invalid int value: 'many'"),
    (FAST + "--no-cache", "--cache '' is none"),
    (FAST + "--cache none", "--cache none: give a folder"),
    (FAST + "--batch 0", "--batch 0: must be at least 1"),
    (FAST + "--batch 10 --micro_batch 4", "no multiple of micro_batch 4"),
    (FAST + "--local_ratio 200", "must be at most 100"),
    (FAST + "--rope_axes a,b", "expected three numbers like 16,56,56"),
    (FAST + "--width 100", "--width 100 must be heads"),
    (FAST + "--time_scale 0", "must be above 0"),
    (FAST + "--end_to_end --stage 1", "drop --stage 1"),
    (FAST + "--time_distribution uniform --time_scale 5", "would do nothing with uniform times"),
    (FAST + "--tuning direct --lora_rank 4", "would do nothing with --tuning direct"),
    (FAST + "--crop_white", "--crop_white would do nothing without --data"),
    (FAST + "--layers 4", "--layers is of the perceiver denoiser"),
    ("train.py --denoiser perceiver --blocks 3 --runs {runs}", "--blocks is of the flow denoiser"),
    ("train.py --denoiser perceiver --mask_from 0.9 --mask_to 0.5 --runs {runs}", "mask"),
    # data
    (FAST + "--data {here}/nowhere", "no folder and no file"),
    (FAST + "--data {here}/empty", "no images"),
    (FAST + "--data {here}/list.txt", "which does not exist"),
    (FAST + "--data {here}/empty.txt", "is empty"),
    (FAST + "--data {here}/good/0.png", "give a folder"),
    (FAST + "--data {here}/broken --cache ''", "in a row cannot be read"),
    (FAST + "--data {here}/broken --cache '' --workers 2", "in a row cannot be read"),
    (FAST + "--data '{here}/0*.tar'", "no tar shard"),
    (FAST + "--data '{here}/{{0..2}}.tar'", "no tar shard"),
    (FAST + "--data {here}/garbage", "no pictures in"),
    (FAST + "--data {here}/words.tar", "holds no pictures"),
    (SMALL, "--data is missing"),
    (SMALL + "--cache memory", "--data is missing"),
    # weights
    (FULL, "--vae is missing"),
    (FULL + "--denoiser perceiver", "--vqgan is missing"),
    (FULL + "--vae {here}/nowhere.safetensors", "no file"),
    (FULL + "--vae {here}/cut.safetensors", "not a whole safetensors file"),
    (FULL + "--vae {toy}/clip.safetensors", "does not fit"),
    (FULL + "--vae {toy}/vqgan.safetensors", "is of another kind"),
    (FULL + "--denoiser perceiver --vqgan {here}/evil.ckpt", "cannot be read as tensors alone"),
    (FULL + "--vae {toy}/vae.safetensors --flux {here}/nowhere.safetensors", "--flux: no file"),
    (FULL + "--vae {toy}/vae.safetensors --flux {toy}/vae.safetensors", "FLUX weights:"),
    (FULL + "--flux x --blocks 3", "--blocks would do nothing beside --flux"),
    (FAST + "--clip ViT-L-99:openai", "did you mean"),
    (FAST + "--clip ViT-L-14:openai", "use ViT-L-14-quickgelu:openai"),
    (FAST + "--clip ViT-B-32:nowhere.pt", "no weights file"),
    (FAST + "--clip {here}/alone.safetensors", "need their architecture beside"),
    (FAST + "--clip {here}/other.safetensors", "does not fit"),
    (FAST + "--clip {here}/empty", "is missing"),
    (FAST + "--clip {here}/hf", "export_hf.py"),
    # runs
    (FAST + "--stage 2 --name new", "stage 2 needs stage 1"),
    (FAST + "--name x --stage1_from {here}/nowhere", "holds no checkpoint"),
    (FAST + "--name done --stage2_steps 3", "in its settings"),
    (FAST + "--name done --lora_rank 3", "lora_rank: 16 → 3"),
    (FAST + "--name damaged", "is not what was written there"),
    (FAST + "--name halved", "moments.safetensors is not what was written there"),
    (FAST.replace("{runs}", "{here}/file") + "--name x", "file"),
    ("train.py --plan --preset openai-l14-224 --gpus 7", "no multiple of --gpus 7"),
    # evaluation
    ("eval_mmvp.py --modle x", "did you mean --model?"),
    ("eval_mmvp.py --runs {here}/empty", "enhanced"),
    ("eval_mmvp.py --benchmark {here}/no_table --pairs 3", "--pairs and --seed draw the toy's"),
    ("eval_zeroshot.py --captions x.json --template imagenet7", "--template needs --classify"),
    ("eval_mmvp.py --model {toy}/clip.safetensors --model {here}/empty", "is missing"),
    ("eval_mmvp.py --model {toy}/clip.safetensors --benchmark {here}/nowhere", "missing"),
    ("eval_mmvp.py --model {toy}/clip.safetensors --benchmark {here}/no_table", "Questions.csv"),
    ("eval_mmvp.py --model {toy}/clip.safetensors --benchmark {here}/no_id", "lacks 1 of the ids"),
    ("eval_mmvp.py --model {toy}/clip.safetensors --benchmark {here}/no_column", "no column Type"),
    (
        "eval_mmvp.py --model {toy}/clip.safetensors --benchmark {here}/no_picture",
        "picture 2.jpg is missing",
    ),
    (
        "eval_mmvp.py --model {toy}/clip.safetensors --benchmark {here}/bad_picture --out {here}/o",
        "cannot be read",
    ),
    # the rest
    ("toy/benchmark.py", "expected 'pairs FOLDER'"),
    ("toy/pretrain.py --onyl vae", "did you mean --only?"),
    ("toy/pretrain.py --scenes 500", "must be at least 513"),
    ("toy/pretrain.py --only vqgan --out {here}/empty", "make it with --only vae"),
    ("export_hf.py --model {here}/nowhere --out {here}/x", "no folder"),
    ("export_hf.py --model {here}/empty --out {here}/x", "is no model folder"),
    ("export_hf.py --model {here}/hf --out {here}/x", "no vision_config"),
]


@pytest.mark.parametrize("line, words", TABLE, ids=range(len(TABLE)))
def test_one_line_and_exit_2(world, line, words):
    code, text = command(line, world)
    said = [part for part in text.replace("\r", "\n").splitlines() if words in part]
    assert code == 2, text
    assert len(said) == 1 and said[0].startswith(line.split()[0].split("/")[-1]), text
    assert "Traceback" not in text and 'File "' not in text


def test_the_table_is_long_enough_and_nothing_was_executed_or_lost(world):
    assert len(TABLE) >= 25
    from pathlib import Path

    assert not Path("/tmp/genhancer-was-here").exists()
    assert (world["runs"] / "done" / "enhanced" / "README.md").is_file()
    assert len(list((world["runs"] / "damaged" / "stage2").glob("step_*"))) == 2


def test_too_little_memory_is_a_line(monkeypatch, capsys):
    """What PyTorch says on a GPU and on a CPU, and what a killed worker looks like."""
    from util.cli import run_command

    for message, words in (
        ("CUDA out of memory. Tried to allocate 20.00 GiB", "lower --micro_batch"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to", "lower --micro_batch"),
        ("DataLoader worker (pid 12) is killed by signal: Killed.", "lower --workers"),
    ):

        def fail(message=message):
            raise RuntimeError(message)

        with pytest.raises(SystemExit) as stop:
            run_command(fail, lambda: "checkpoints so far are in X")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and "checkpoints so far" in error
        assert len(error.strip().splitlines()) == 1
