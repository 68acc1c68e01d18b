"""What can happen to a run between two starts, and beside it: said or refused, never silent."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_runs import TINY, equal, metrics, tensors, train_here

import train as training
from training import checkpoints as ckpt
from training.lock import sole_writer
from training.process import Process, die_with_parent

ALONE = Process()


@pytest.fixture
def run(straight, tmp_path):
    """A copy of the undisturbed run, which is not quite finished."""
    shutil.copytree(straight, tmp_path / "a")
    (tmp_path / "a" / "enhanced" / "README.md").unlink()
    return tmp_path / "a"


def flip(file):
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def names(run):
    """Of all files below a folder."""
    return sorted(str(p.relative_to(run)) for p in run.rglob("*"))


# -- damage ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["trained.safetensors", "moments.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, straight, file):
    flip(run / "stage2" / "step_00000004" / file)
    done = train_here(run.parent, "a")
    assert done.returncode == 0, done.stderr
    assert f"step_00000004: {file}" in done.stderr and "going on from step_00000002" in done.stderr
    assert equal(tensors(run, 2), tensors(straight, 2)) and metrics(run) == metrics(straight)
    shutil.rmtree(run / "stage2" / "damaged_step_00000004")
    assert names(run) == names(straight), "nothing else is left behind"


def test_a_stage_1_that_is_damaged_is_not_replaced_by_half_a_stage_1(run):
    shutil.rmtree(run / "stage2")
    flip(run / "stage1" / "step_00000006" / "trained.safetensors")
    done = train_here(run.parent, "a", "--stage", "2")
    assert done.returncode == 2 and "step_00000006 is damaged: delete it" in done.stderr


def test_what_a_killed_start_had_still_to_drop_goes(run, straight):
    """A kill after the last checkpoint of a stage, and before the oldest is removed for it. That
    start's --keep counts, since another one may be given by now."""
    kept = names(run / "stage1")
    shutil.copytree(run / "stage1" / "step_00000006", run / "stage1" / "step_00000001")
    done = train_here(run.parent, "a", "--keep", "9")
    assert done.returncode == 0, done.stderr
    assert names(run / "stage1") == kept and names(run) == names(straight)


def test_half_a_stage_1_is_refused_unless_it_is_asked_for(run):
    shutil.rmtree(run / "stage2")
    shutil.rmtree(run / "stage1" / "step_00000006")
    done = train_here(run.parent, "a", "--stage", "2")
    assert done.returncode == 2 and "has come to step 4 of 6: let it end" in done.stderr
    assert train_here(run.parent, "a", "--stage", "2", "--stage1_steps", "4").returncode == 0


def test_damaged_and_missing_lines_of_metrics_are_said(run, straight):
    """And those of the other stage stay."""
    shutil.rmtree(run / "stage2" / "step_00000004")
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0].replace('"stage"', '"stagf"'), *lines[1:]]) + '{"sta')
    done = train_here(run.parent, "a")
    assert "1 damaged line(s) were put aside, into metrics.damaged.jsonl" in done.stderr
    assert "has 1 of the 2 lines that stage 1 had written" in done.stderr
    assert metrics(run) == metrics(straight)[1:]
    assert json.loads((run / "metrics.damaged.jsonl").read_text())["step"] == 3


def test_a_deleted_metrics_file_is_said(run):
    shutil.rmtree(run / "stage2" / "step_00000004")
    (run / "metrics.jsonl").unlink()
    done = train_here(run.parent, "a")
    assert done.returncode == 0, done.stderr
    assert "has 0 of the 2 lines that stage 1 had written" in done.stderr


def test_another_log_every_is_said(run):
    shutil.rmtree(run / "stage2" / "step_00000004")
    done = train_here(run.parent, "a", "--log_every", "1")
    assert done.returncode == 0, done.stderr
    assert "a line every 3 steps up to step 2, and one every 1 from there on" in done.stderr


def test_as_many_other_pictures_are_refused(tmp_path):
    def photos(name, seed):
        rng = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 255, (70, 70, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
        return tmp_path / name

    flags = ["--stage", "1", "--stage1_steps", "4", "--data"]
    assert train_here(tmp_path, "p", *flags, photos("one", 0)).returncode == 0
    shutil.rmtree(tmp_path / "p" / "stage1" / "step_00000004")
    done = train_here(tmp_path, "p", *flags, photos("two", 1))
    assert (
        done.returncode == 2 and "differs from this run in its settings (samples.0: " in done.stderr
    )
    moved = shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert train_here(tmp_path, "p", *flags, moved).returncode == 0, "the same, elsewhere"


def test_files_that_were_moved_are_read_where_they_are(run, tmp_path):
    """The enhanced model is made from what config.json names, so that names the new places."""
    file, vae = run / "config.json", tmp_path / "moved" / "vae.safetensors"
    before = json.loads(file.read_text())["stages"]["2"]
    vae.parent.mkdir()
    shutil.copy(ROOT / "toy" / "vae.safetensors", vae)
    shutil.rmtree(run / "stage2" / "step_00000004")
    assert train_here(run.parent, "a", "--vae", vae, "--keep", "9").returncode == 0
    after = json.loads(file.read_text())["stages"]["2"]
    assert after["settings"].pop("vae") == str(vae) != before["settings"].pop("vae")
    assert after == before, "all else is as the stage was started"


def test_an_interrupted_run_waits_for_its_checkpoint(tmp_path, monkeypatch):
    """Ctrl-C while a checkpoint is being written: the lock is held until it is whole."""
    write, seen = ckpt.save_checkpoint, []

    def slow(*what):
        time.sleep(1)
        seen.append((tmp_path / "c" / ".lock").exists())
        write(*what)

    def interrupted(stage, *rest, **more):
        if stage.done == 2:  # its checkpoint has just been begun
            raise KeyboardInterrupt
        return step(stage, *rest, **more)

    step = training.train_step
    monkeypatch.setattr(ckpt, "save_checkpoint", slow)
    monkeypatch.setattr(training, "train_step", interrupted)
    assert train_here(tmp_path, "c").returncode == 130
    assert seen == [True] and not (tmp_path / "c" / ".lock").exists()
    assert [p.name for p in ckpt.checkpoints_in(tmp_path / "c" / "stage1")] == ["step_00000002"]


# -- two at once -----------------------------------------------------------------------------------
def test_one_run_has_one_writer(run):
    before = names(run)
    with sole_writer(run, ALONE):
        done = train_here(run.parent, "a")
        who = f"process {os.getpid()} on {platform.node()} since 20"
        assert done.returncode == 2 and f"{run} is being written by {who}" in done.stderr
        assert "wait for it, end it, or choose another --name" in done.stderr
    assert names(run) == before
    assert train_here(run.parent, "a").returncode == 0


def test_the_lock_of_the_dead_is_nobodys(tmp_path):
    """Killed without a chance to clean up: the file stays, the lock does not."""
    code = (
        "import sys, time; from pathlib import Path; from training.lock import sole_writer; "
        "from training.process import Process\n"
        "with sole_writer(Path(sys.argv[1]), Process()): print('locked', flush=True); "
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x" / "r")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"locked\n"
    refused = pytest.raises(ValueError, match=f"written by process {holder.pid} on")
    with refused, sole_writer(tmp_path / "x" / "r", ALONE):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / "x" / "r" / ".lock").exists()
    with sole_writer(tmp_path / "x" / "r", ALONE):
        pass
    assert names(tmp_path) == ["x", "x/r"], "that folder was not made by this start"
    with sole_writer(tmp_path / "new" / "r", ALONE):
        assert names(tmp_path / "new") == ["r", "r/.lock"]
    assert not (tmp_path / "new").exists()


def test_ranks_die_with_torchrun(tmp_path, monkeypatch):
    """A process whose parent is killed without warning; not one that was started by hand."""
    child = (
        "import os, sys, time; from training.process import die_with_parent; die_with_parent(); "
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    for torchrun in (True, False):
        environment = {**os.environ, **({"TORCHELASTIC_RUN_ID": "x"} if torchrun else {})}
        command = [sys.executable, "-c", parent]
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
        rank = int(agent.stdout.readline())
        agent.kill()
        agent.wait()
        deadline = time.time() + (30 if torchrun else 1)
        while alive(rank) and time.time() < deadline:
            time.sleep(0.05)
        assert alive(rank) != torchrun
        if not torchrun:
            os.kill(rank, signal.SIGKILL)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    die_with_parent()  # by hand: nothing


def alive(pid):
    """Whether a process runs; one that waits to be buried does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- the disk --------------------------------------------------------------------------------------
def test_a_run_whose_folder_is_removed_ends_in_one_line(tmp_path, monkeypatch):
    import train as training

    whole = training.train_step

    def step(stage, pieces, measure_drift=False):
        if stage.done == 2:
            # At once: a removal file by file would race with the thread that writes a checkpoint.
            (tmp_path / "gone").rename(tmp_path / "elsewhere")
        return whole(stage, pieces, measure_drift)

    monkeypatch.setattr(training, "train_step", step)
    done = train_here(tmp_path, "gone", "--stage", "1")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "could not be written (No such file or directory)" in last
    assert not (tmp_path / "gone").exists()


def test_a_file_size_limit_is_one_line(tmp_path):
    """As `ulimit -f` sets it: the checkpoint does not fit, and nothing of it stays."""
    command = [sys.executable, "train.py", "--runs", str(tmp_path), "--name", "small", *TINY]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert "step_00000002 could not be written (File too large): it takes " in last
    assert not list((tmp_path / "small").rglob("*tmp*")) and "Traceback" not in done.stderr
    assert train_here(tmp_path, "small").returncode == 0


def test_weights_that_are_not_finite_are_never_an_enhanced_model(run, monkeypatch):
    from training import enhanced

    merged = enhanced.merged_state_dict

    def broken(visual):
        return {k: v * float("nan") if v.ndim == 2 else v for k, v in merged(visual).items()}

    monkeypatch.setattr(enhanced, "merged_state_dict", broken)
    before = (run / "enhanced" / "open_clip_model.safetensors").read_bytes()
    done = train_here(run.parent, "a")
    assert done.returncode == 2 and "is not finite; lower --stage2_lr" in done.stderr
    assert (run / "enhanced" / "open_clip_model.safetensors").read_bytes() == before
    assert torch.isfinite(torch.tensor(metrics(run)[-1]["loss"]))
