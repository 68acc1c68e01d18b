"""plan.py: what it foretells is what a run then needs."""

import subprocess
import sys
import time
import weakref

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from settings import BACKBONES, Settings
from training import assemble, plan
from training import checkpoints as ckpt
from training.assemble import make_optimizer, parameter_groups
from training.process import Process

CPU = Process()


def toy(denoiser="flow", **more):
    return Settings.of("toy", denoiser=denoiser, **more)


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("micro_batch", [4, 16])
def test_parameters_and_memory_of_a_real_step(denoiser, stage, micro_batch):
    """Everything within 5 % of what a real step holds: weights, gradients, moments, and what
    autograd keeps."""
    fixed = {"mask_from": 0.7, "mask_to": 0.7} if denoiser == "perceiver" else {}
    settings = toy(denoiser, stage=str(stage), micro_batch=micro_batch, **fixed)
    foretold = plan.make_plan(settings, 1, "cpu")
    with plan.matrix_attention():
        _, model = assemble.build_model(settings, CPU)
        plan.start(model, settings, stage)
        groups = parameter_groups(model, settings, stage)
        optimizer = make_optimizer(groups, settings)
        images, draws = plan.one_batch(model, micro_batch, "cpu")
        kept, result = plan.saved_for_backward(model, images, draws)
        result["loss"].backward()
        optimizer.step()
    real = {
        "frozen weights": plan.bytes_of(p for p in model.parameters() if not p.requires_grad),
        "trainable weights": plan.bytes_of(p for g in groups for p in g["params"]),
        "gradients": plan.bytes_of(p.grad for g in groups for p in g["params"]),
        "moments of AdamW": sum(
            plan.bytes_of(v for v in state.values() if v.ndim) for state in optimizer.state.values()
        ),
        "kept for the backward pass": kept,
    }
    memory = foretold.stages[stage].memory
    assert memory.keys() == real.keys()
    for name, size in real.items():
        assert memory[name] == pytest.approx(size, rel=0.05), name
    counts = list(foretold.parameters.values())
    assert foretold.stages[stage].trainable * 4 == real["trainable weights"]
    assert counts[3] == sum(p.numel() for p in model.paradigm.denoiser.parameters())


class Live(TorchDispatchMode):
    """Bytes of all tensors that exist, and their peak."""

    def __init__(self, tensors):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}
        for tensor in tensors:
            self.hold(tensor)

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:

            def gone(_):
                self.now -= size
                del self.known[key]

            self.known[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return result


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_true_peak_of_a_step(denoiser, stage):
    """Everything that is alive at once, temporaries too, against the plan's sum."""
    settings = toy(denoiser, stage=str(stage))
    foretold = sum(plan.make_plan(settings, 1, "cpu").stages[stage].memory.values())
    with plan.matrix_attention():
        _, model = assemble.build_model(settings, CPU)
        plan.start(model, settings, stage)
        optimizer = make_optimizer(parameter_groups(model, settings, stage), settings)
        images, draws = plan.one_batch(model, settings.micro_batch, "cpu")
        with torch.no_grad():
            cached = model.precompute(images)
        for _ in range(2):  # the moments exist from the second step on
            moments = [v for state in optimizer.state.values() for v in state.values()]
            live = Live([*(p.data for p in model.parameters()), *model.buffers(), *moments])
            with live:
                model(images, draws, cached)["loss"].backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    print(f"{denoiser}, stage {stage}: peak {live.peak / foretold:.3f} of the plan")
    assert 0.9 < live.peak / foretold < 1.1


def test_checkpoints_are_as_large_as_foretold(tmp_path):
    settings = toy(stage="1")
    foretold = plan.make_plan(settings, 1, "cpu")
    _, model = assemble.build_model(settings, CPU)
    model.start_stage1()
    optimizer = make_optimizer(parameter_groups(model, settings, 1), settings)
    model.paradigm.denoiser.requires_grad_(True)
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    tensors = {"trained": ckpt.trainable(model), "moments": ckpt.moments(model, optimizer)}
    ckpt.save_checkpoint(tmp_path, 1, tensors, {}, 1)
    [folder] = tmp_path.iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert foretold.stages[1].checkpoint == pytest.approx(size, rel=0.05)


def test_flops_of_a_product_are_two_a_number():
    """Stage 1's count against the textbook: 6 × parameters × tokens for what learns, plus 2 × for
    what is frozen and only runs forward."""
    settings = Settings.of("openai-l14-224")
    figures = plan.make_plan(settings, 8, "cuda")
    denoiser = figures.parameters["denoiser (flow)"] * (196 + 1) * 6
    assert 0.6 * denoiser < figures.stages[1].flops < 2.0 * denoiser


@pytest.mark.parametrize("preset", BACKBONES)
def test_the_command_for_every_preset(preset):
    start = time.time()
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--plan",
        "--preset",
        preset,
        "--shard",
        "--gpus",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{preset}: {time.time() - start:.1f} s with the start of PyTorch")
    small = preset == "openai-b32-224"
    stages = ("3,200,000", "320,000") if small else ("25,600,000 images, 8.5 epochs", "1,280,000")
    assert all(images in done.stdout for images in stages)
    assert "without --shard" in done.stdout
    assert not (ROOT / "runs" / preset).exists()


def test_the_large_denoiser_fits_24_gb_shared_out_only():
    settings = Settings.of("openai-l14-224", micro_batch=2, shard=True)
    shared = plan.make_plan(settings, 8, "cuda").stages[1].memory
    assert sum(shared.values()) < 21e9
    trainable = shared["trainable weights"]
    assert shared["moments of AdamW"] == pytest.approx(2 * trainable / 8, rel=1e-6)
    assert 4 * trainable > 21e9, "weights, gradients and moments alone, on each of them"


def test_flux_in_the_plan():
    settings = Settings.of("openai-l14-224", flux="flux1-dev.safetensors", micro_batch=2)
    figures = plan.make_plan(settings, 8, "cuda")
    assert figures.parameters["denoiser (flow)"] / 1e9 == pytest.approx(11.90, abs=0.01)
    assert figures.stages[1].trainable < 25e6, "the projectors alone"
    assert figures.stages[1].memory["frozen weights"] > 23.8e9, "bf16"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpus", "7"], "--batch 256 is no multiple of --gpus 7"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--clip", "ViT-L-14:openai"], "use ViT-L-14-quickgelu:openai"),
        (["--width", "100"], "width 100 must be heads"),
    ],
)
def test_mistakes_are_one_line(flags, words):
    command = [sys.executable, str(ROOT / "train.py"), "--plan", "--preset", "openai-l14-224"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
