"""Two processes under torchrun on the CPU (gloo) do what one process does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_runs import PERCEIVER, TINY, equal, metrics, tensors, train_here


def launch(ranks, runs, name, *extra, tiny=TINY, script=ROOT / "train.py", options=()):
    """The command line of torchrun on this machine's CPUs."""
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    flags = ["--runs", str(runs), "--name", name, *tiny, *map(str, extra)]
    return [*module, "--nproc_per_node", str(ranks), str(script), *flags]


ALONE = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}


def torchrun(*args, **kwargs):
    done = subprocess.run(launch(*args, **kwargs), capture_output=True, **ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# Runs train.py several times, and writes down what each rank saw and the gradient it had before its
# first step. Ranks are forks of one process that has imported everything: PyTorch's start is what
# takes longest in these tests.
SPY = f"""
import json, os, shutil, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from tiny_runs import free_port
import torch
import train
from training import stages
from training.sharding import whole
from util.files import fingerprint
def spy(here, rank):
    seen, gradients = [], []
    batches, clip, run_stage = stages.batches, torch.nn.utils.clip_grad_norm_, train.run_stage
    def watched(*args):
        for batch in batches(*args):
            seen.extend(batch["position"])
            yield batch
    def clipped(parameters, limit):
        if not gradients:
            gradients.extend(whole(p.grad.clone()) for p in parameters)
        return clip(parameters, limit)
    def ended(stage, model, *args):
        run_stage(stage, model, *args)
        with open(f"{{here}}/rank{{rank}}.json", "w") as file:
            weights = torch.nn.ParameterDict()
            for name, p in model.named_parameters():
                weights[name.replace(".", "/")] = torch.nn.Parameter(whole(p.detach()), False)
            json.dump({{"hash": fingerprint(weights), "seen": seen}}, file)
        torch.save(gradients, f"{{here}}/rank{{rank}}.pt")
    stages.batches, torch.nn.utils.clip_grad_norm_, train.run_stage = watched, clipped, ended
    train.main(train.command_line())
for here, ranks, flags, doomed in json.loads(sys.argv[1]):
    port = free_port()
    for folder in doomed:
        shutil.rmtree(folder)
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["train.py", *flags]
        spy(here, rank)
        os._exit(0)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children), (ranks, flags)
"""


def spied(folder, runs, tiny):
    """One run of train.py after the other, all in `folder`.

    Args: runs: {label: (ranks, run name, more flags, folders to delete before)}.
    Returns: {label: [(json, gradients) of each rank]}.
    """
    jobs = []
    for label, (ranks, name, more, doomed) in runs.items():
        (folder / f"spied {label}").mkdir()
        flags = ["--runs", str(folder), "--name", name, *tiny, *more]
        jobs.append((str(folder / f"spied {label}"), ranks, flags, list(map(str, doomed))))
    command = [sys.executable, "-c", SPY, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, **ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        label: [
            (
                json.loads((folder / f"spied {label}" / f"rank{rank}.json").read_text()),
                torch.load(folder / f"spied {label}" / f"rank{rank}.pt", weights_only=True),
            )
            for rank in range(ranks)
        ]
        for label, (ranks, *_) in runs.items()
    }


@pytest.mark.parametrize(
    "denoiser, accumulation", [(TINY, 1), (TINY, 2), (PERCEIVER, 1), (PERCEIVER, 2)]
)
def test_two_processes_equal_one(tmp_path, denoiser, accumulation):
    """Same images, same noise, same loss at step 1; same weights up to the rounding of sums."""
    tiny = [*denoiser, "--stage1_steps", "5", "--log_every", "1", "--save_every", "5"]
    micro = ["--micro_batch", str(8 // accumulation), "--stage", "1"]
    runs = {"one": (1, "one", ["--stage", "1"], []), "two": (2, "two", micro, [])}
    spied(tmp_path, runs, tiny)
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert len(two) == len(one) == 5
    assert abs(two[0]["loss"] - one[0]["loss"]) <= 1e-5
    assert abs(two[0]["gradient_norm"] - one[0]["gradient_norm"]) <= 1e-4 * one[0]["gradient_norm"]
    for key, value in tensors(tmp_path / "one", 1).items():
        assert torch.allclose(tensors(tmp_path / "two", 1)[key], value, atol=1e-4), key


@pytest.mark.parametrize("tiny", [TINY, PERCEIVER])
def test_gradients_and_images_of_one_two_and_four_processes(tmp_path, tiny):
    """The global batch is 16 whatever the number of ranks, each image seen by one of them, and the
    averaged gradient is that of one process on the joined batch; shared out (FSDP) as well."""
    tiny = [*tiny, "--batch", "16", "--stage1_steps", "3", "--stage", "1", "--micro_batch", "4"]
    # AdamW makes of the rounding of a gradient near 0 a rounding of the rate.
    tiny += ["--stage1_lr", "1e-4"]
    runs = {str(ranks): (ranks, str(ranks), [], []) for ranks in (1, 2, 4)}
    runs |= {f"{ranks} shard": (ranks, f"{ranks}shard", ["--shard"], []) for ranks in (2, 4)}
    found = spied(tmp_path, runs, tiny)
    [(_, alone)] = found["1"]
    for name, ranks in found.items():
        seen = [position for about, _ in ranks for position in about["seen"][: 48 // len(ranks)]]
        assert sorted(seen) == list(range(48)), "disjoint, and three global batches of 16"
        assert len({about["hash"] for about, _ in ranks}) == 1, f"{name}: all hold the same weights"
        for _, gradients in ranks:
            for mine, whole in zip(gradients, alone, strict=True):
                scale = float(whole.abs().max())
                assert float((mine - whole).abs().max()) <= 1e-5 * scale + 1e-7
    one = tensors(tmp_path / "1", 1)
    for ranks in ("2", "4", "2shard", "4shard"):
        for key, value in tensors(tmp_path / ranks, 1).items():
            assert float((value - one[key]).abs().max()) <= 1e-5, (ranks, key)


@pytest.mark.parametrize("tiny", [TINY, PERCEIVER])
def test_shared_out_and_whole_go_on_from_each_other(tmp_path, tiny):
    """Both stages. A checkpoint holds whole tensors by name, whoever wrote it: shared out over the
    same ranks the next start is bit-equal, over others and not at all it differs by rounding."""
    # Dropout belongs to a rank. The rates are nearer to the paper's than the toy's: AdamW makes of
    # the rounding of a gradient near 0 a rounding of the rate.
    tiny = [*tiny, "--micro_batch", "4", "--lora_dropout", "0"]
    tiny += ["--stage1_lr", "1e-4", "--stage2_lr", "1e-4"]
    shard, straight, run = ["--shard"], tmp_path / "straight", tmp_path / "stopped"
    spied(tmp_path, {run.name: (2, run.name, shard, []) for run in (straight, run)}, tiny)
    want = {stage: tensors(straight, stage) for stage in (1, 2)}
    assert metrics(run) == metrics(straight)
    later = {"same": (2, shard), "four": (4, shard), "whole": (2, []), "alone": (1, [])}
    again = {}
    for label, (ranks, flags) in later.items():
        for stage in (1, 2):
            copy = tmp_path / f"{label}{stage}"
            shutil.copytree(run, copy)
            gone = [copy / "stage1" / "step_00000006", copy / "stage2"]
            gone = gone if stage == 1 else [copy / "stage2" / "step_00000004"]
            again[copy.name] = (ranks, copy.name, flags, gone)
    spied(tmp_path, again, tiny)
    for name in again:
        stage = int(name[-1])
        for key, value in tensors(tmp_path / name, stage).items():
            assert float((value - want[stage][key]).abs().max()) <= 1e-6, (name, key)
        if name.startswith("same"):
            assert equal(tensors(tmp_path / name, stage), want[stage])
            moments = tensors(tmp_path / name, stage, "moments")
            assert equal(moments, tensors(straight, stage, "moments"))


@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_a_killed_rank_ends_the_run_and_a_restart_finishes_it(tmp_path, shard):
    """kill -9 of one of two ranks: the other says so in one line, torchrun starts both again, and
    the final weights are those of a run that nobody disturbed."""
    tiny = [*TINY, *shard, "--stage1_steps", "60", "--stage", "1", "--micro_batch", "4"]
    torchrun(2, tmp_path, "straight", tiny=tiny)
    command = launch(2, tmp_path, "killed", tiny=tiny, options=["--max-restarts", "2"])
    with subprocess.Popen(command, stderr=subprocess.PIPE, **ALONE) as running:
        while not list((tmp_path / "killed" / "stage1").glob("step_*")):
            assert running.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.02)
        victims = subprocess.run(
            ["pgrep", "-f", f"train.py --runs {tmp_path} --name killed"],
            capture_output=True,
            text=True,
        ).stdout.split()
        os.kill(int(victims[-1]), signal.SIGKILL)
        _, errors = running.communicate()
    assert running.returncode == 0, errors[-3000:]
    assert "another process of this run has died" in errors or "lost each other" in errors
    assert "step 0 of 60" not in errors
    assert equal(tensors(tmp_path / "killed", 1), tensors(tmp_path / "straight", 1))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")


def test_a_users_mistake_under_torchrun_is_a_line_of_a_rank(tmp_path):
    command = launch(2, tmp_path, "x", "--data", tmp_path / "nowhere")
    done = subprocess.run(command, capture_output=True, **ALONE)
    assert done.returncode and "train.py, rank 0: --data: no folder and no file" in done.stderr
    assert 'train.py", line' not in done.stderr, "no traceback of ours"


def test_ranks_that_see_different_runs_refuse(tmp_path):
    """--runs on each machine's own disk: rank 0 would go on from step 6, rank 1 from nothing."""
    tiny = [*TINY, "--stage", "1", "--micro_batch", "4", "--schedule", "constant"]
    assert train_here(tmp_path / "runs0", "x", tiny=tiny).returncode == 0
    own_disks = tmp_path / "own_disks.py"
    own_disks.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from training import stages\n"
        "stages.PATIENCE = 0.5\n"
        "sys.argv[2] += os.environ['RANK']\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    for steps, words in (
        ("9", "is there for rank 0 and not for rank 1: --runs must be a folder that all machines"),
        ("6", ""),  # finished, says rank 0, and rank 1 ends too
    ):
        flags = [*tiny, "--stage1_steps", steps]
        command = launch(2, tmp_path / "runs", "x", tiny=flags, script=own_disks)
        done = subprocess.run(command, capture_output=True, **ALONE)
        assert (words in done.stderr) and bool(done.returncode) == bool(words), done.stderr[-2000:]
        assert 'train.py", line' not in done.stderr


def test_unreadable_images_are_counted_over_all_ranks(tmp_path):
    """Two of 30 pictures are broken, one in each rank's way: together more than 5 %."""
    for i in range(30):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    for i in (3, 17):
        (tmp_path / f"{i:02d}.png").write_bytes(b"broken")
    tiny = [*TINY, "--stage", "1", "--micro_batch", "4", "--data", str(tmp_path), "--cache", ""]
    tiny += ["--stage1_steps", "20"]
    done = subprocess.run(launch(2, tmp_path, "bad", tiny=tiny), capture_output=True, **ALONE)
    assert done.returncode and "2 of 30 images cannot be read, more than 5 %" in done.stderr


@pytest.mark.parametrize("tiny", [TINY, PERCEIVER])
def test_two_processes_resume_bit_equal(tmp_path, tiny):
    tiny = [*tiny, "--micro_batch", "8"]
    run = tmp_path / "stopped"
    runs = {
        "straight": (2, "straight", [], []),
        "whole": (2, "stopped", [], []),
        "resumed": (2, "stopped", [], [run / "stage2" / "step_00000004"]),
    }
    spied(tmp_path, runs, tiny)
    assert equal(tensors(run, 2), tensors(tmp_path / "straight", 2))
    assert metrics(run) == metrics(tmp_path / "straight")
