"""speed.py and what goes with it: bf16 everywhere, frozen matrices, compiled blocks, one wait."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import save_file

from evaluation.reconstruction import reconstruct
from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from settings import Settings
from toy.world import ToyScenes
from train import train_step
from training import runlog, speed
from training.assemble import build_model
from training.process import Process, clear_gradients, ending_well, in_parallel
from training.stages import begin

HALF = Process(autocast=True)
SMALL = {"batch": 4, "micro_batch": 2, "lora_rank": 4, "lora_dropout": 0.0, "toy_images": 8}
DENOISERS = {
    "flow": {"width": 32, "heads": 2, "rope_axes": "4,6,6", "vector_dim": 12, "context_dim": 20},
    "perceiver": {"denoiser": "perceiver", "width": 32, "heads": 2, "layers": 1},
    "flux": {},
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A file like FLUX's, small."""
    file = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    config = FlowDenoiserConfig.small(latent_channels=32, width=128, heads=1, flux_time=True)
    save_file(FlowDenoiser(config).state_dict(), file)
    return str(file)


def started(denoiser, number, flux, process=HALF, **more):
    """A stage of a tiny model at step 0, and its scenes."""
    given = DENOISERS[denoiser] | ({"flux": flux} if denoiser == "flux" else {})
    small = {k: v for k, v in SMALL.items() if "tuning" not in more or not k.startswith("lora_")}
    settings = Settings.of("toy", **small, **given, **more)
    _, model = build_model(settings, process)
    return begin(number, model, settings, process), ToyScenes(2, seed=1)


WAYS = [
    (1, {}),
    (2, {}),
    (2, {"stage2_trains": "all"}),
    (2, {"tuning": "direct"}),
    (2, {"tuning": "direct", "stage2_trains": "all", "drift_weight": 0.1}),
    (2, {"end_to_end": True}),
    (2, {"local_ratio": 50.0}),
    (2, {"tokenizer_dtype": "bf16"}),
]


@pytest.mark.parametrize("number, more", WAYS)
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_a_step_and_a_grid_in_bf16(denoiser, number, more, flux, tmp_path, monkeypatch, capsys):
    """Every combination, as on a GPU: finite, no parameter without gradient, and a grid."""
    stage, scenes = started(denoiser, number, flux, frozen_dtype="bf16", **more)
    without, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        named = stage.model.named_parameters()
        without.extend(n for n, p in named if p.requires_grad and p.grad is None)
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    pieces = next(stage.global_batches(scenes))
    assert len(pieces) == 2 and train_step(stage, pieces)["loss"] > 0 and not without
    runlog.draw_samples(stage.model, scenes, tmp_path / "x.png", HALF)
    assert (tmp_path / "x.png").is_file(), capsys.readouterr().err


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_drawings_of_a_model_in_bf16_outside_a_run(denoiser):
    settings = Settings.of("toy", denoiser=denoiser, frozen_dtype="bf16", precision="bf16")
    model = build_model(settings, HALF)[1]
    model.start_stage1()
    speed.lower_frozen(model.eval(), settings, HALF)
    drawn = reconstruct(model, ToyScenes(2, seed=1).batch(2), steps=2)["drawn"].pictures
    assert drawn.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("error", [OSError("No space left"), ValueError("cannot be read")])
def test_a_grid_never_ends_a_run(error, flux, tmp_path, monkeypatch, capsys):
    """Too little memory in the drawing, a full disk, pictures that cannot be read: one line."""
    stage, scenes = started("flow", 1, flux, process=Process())
    if isinstance(error, OSError):
        monkeypatch.setattr(runlog, "sample_grid", lambda *args: (_ for _ in ()).throw(error))
    else:
        monkeypatch.setattr(ToyScenes, "__getitem__", lambda *args: (_ for _ in ()).throw(error))
    runlog.draw_samples(stage.model, scenes, tmp_path / "x.png", Process())
    said = capsys.readouterr().err
    assert said.startswith("no sample grid") and str(error) in said and said.count("\n") == 1
    assert stage.model.training and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_frozen_matrices_in_bf16_change_no_number(denoiser, number, flux):
    """Autocast would have rounded these very matrices: the same loss and weights after two steps,
    bit by bit, in less memory."""
    found = []
    for dtype in ("fp32", "bf16"):
        stage, scenes = started(denoiser, number, flux, frozen_dtype=dtype)
        pieces = stage.global_batches(scenes)
        losses = [train_step(stage, next(pieces))["loss"] for _ in range(2)]
        frozen = [p for p in stage.model.parameters() if not p.requires_grad]
        size = sum(p.numel() * p.element_size() for p in frozen)
        found.append((losses, [p.detach() for p in stage.learning], size))
    (losses, weights, size), (other_losses, other_weights, smaller) = found
    assert losses == other_losses and smaller < size
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_frozen_matrices_cannot_be_bf16_in_a_run_in_float32(flux):
    with pytest.raises(ValueError, match="needs a run in bf16: add --precision bf16"):
        speed.check_switches(Settings.of("toy", frozen_dtype="bf16"), Process())
    speed.check_switches(Settings.of("toy", frozen_dtype="bf16"), HALF)


def test_shares_in_bf16_beside_a_cache_need_gpus():
    """A CPU's LayerNorm would end the run with a traceback."""
    two = replace(HALF, ranks=2)
    with pytest.raises(ValueError, match="needs GPUs: on CPUs add --precision fp32"):
        speed.check_switches(Settings.of("toy", shard=True), two)
    speed.check_switches(Settings.of("toy", shard=True, cache=""), two)
    speed.check_switches(Settings.of("toy", shard=True), HALF)
    stage, _ = started("flow", 1, flux, process=Process(), frozen_dtype="auto")
    assert {p.dtype for p in stage.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_the_blocks_of_every_part_are_found(denoiser, flux):
    """For --compile and --shard: those of the tower, with LoRA or without, and of the denoiser."""
    stage, _ = started(denoiser, 2, flux, process=Process())
    kinds = [type(block).__name__ for block in speed.blocks_of(stage.model)]
    depth = len(stage.model.visual.transformer.resblocks)
    assert kinds.count("ResidualAttentionBlock") == 2 * depth  # v_θ, and v_θ0 beside it
    expected = {"flow": {"DoubleStreamBlock", "SingleStreamBlock"}, "perceiver": {"PerceiverLayer"}}
    assert expected[denoiser] <= set(kinds)


@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_compiled_blocks_are_the_same_training(denoiser, flux, monkeypatch):
    """Forward and backward through the compiler, LoRA included, and the names are the usual ones.
    (All of it but the last phase, which writes C++ and takes minutes.)"""
    eagerly = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    found = []
    for compiled in (False, True):
        stage, scenes = started(denoiser, 2, flux, process=Process(), compile=compiled)
        loss = train_step(stage, next(stage.global_batches(scenes)))["loss"]
        trained = {n: p.detach() for n, p in stage.model.named_parameters() if p.requires_grad}
        found.append((loss, trained))
        blocks = list(speed.blocks_of(stage.model))
        assert all((b._compiled_call_impl is not None) == compiled for b in blocks)
    (eager, weights), (other, other_weights) = found
    assert abs(eager - other) < 1e-5 and weights.keys() == other_weights.keys()
    assert all(torch.allclose(weights[k], other_weights[k], atol=1e-4) for k in weights)


def test_where_nothing_can_be_compiled_a_line_says_so(tmp_path):
    """No C++ compiler: before any model is built, and nothing is written."""
    code = "import sys, train; train.run_command(lambda: train.main(train.command_line()))"
    nothing = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    flags = ["--compile", "--runs", str(tmp_path / "runs"), "--toy_images", "8"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        env={**os.environ, **nothing},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-1000:]
    assert "--compile: PyTorch cannot compile on this machine" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_the_cpu_waits_once_a_step(denoiser, number, flux, monkeypatch):
    """What would make it wait for a GPU: nothing within the accumulation, one list of two numbers a
    step. (The number of masked tokens lies on the CPU, where it was drawn.)"""
    stage, scenes = started(denoiser, number, flux, process=Process())
    pieces = stage.global_batches(scenes)
    seen = []

    def counted(name):
        before = getattr(torch.Tensor, name)

        def wait(tensor, *args, **kwargs):
            if not (tensor.ndim == 0 and tensor.dtype == torch.int64):
                seen.append((name, tuple(tensor.shape)))
            return before(tensor, *args, **kwargs)

        return wait

    train_step(stage, next(pieces))  # what is done once
    batch = next(pieces)
    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    stage.window.add(train_step(stage, batch))
    assert seen == [("tolist", (2,))]


# -- processes -----------------------------------------------------------------------------------
@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_gradients_exist_once(group, flux):
    """Under DDP too, from before the first piece on: they lie in its buckets and stay there."""
    stage, scenes = started("flow", 1, flux, process=Process())
    learner = in_parallel(stage.model, Process(ranks=2))

    def places():
        grads = [p.grad for p in stage.learning]
        assert all(g is not None for g in grads)
        return {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in grads}

    first, size = places(), sum(p.numel() * 4 for p in stage.learning)
    assert sum(first.values()) == size
    for step in range(3):
        for piece, batch in enumerate(next(stage.global_batches(scenes))):
            images, draws = batch["image"], batch["draws"]
            with learner.no_sync() if piece == 0 else torch.enable_grad():
                learner(images, draws)["loss"].backward()
            assert sum(places().values()) == size, f"step {step}, piece {piece}"
        clear_gradients(learner, stage.optimizer)
        assert not any(p.grad.any() for p in stage.learning)


@pytest.mark.parametrize(
    "error",
    [
        "NCCL error in: NCCLUtils.cpp:94, unhandled system error\nLast error:\nnet/ib: no route",
        "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5678",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
    ],
)
def test_what_the_connection_says_is_shown(group, error):
    with pytest.raises(ConnectionError) as found, ending_well(Process(), "checkpoints are in X"):
        raise RuntimeError(error)
    text = str(found.value)
    assert " ".join(error.split()) in text and "checkpoints are in X" in text
    assert "\n" not in text


def test_other_errors_stay_what_they_are(group):
    with pytest.raises(RuntimeError, match="shapes"), ending_well(Process(), ""):
        raise RuntimeError("shapes do not match")


def test_auto_precision_asks_for_native_bf16(monkeypatch):
    """A GPU without the units says that it has bf16, by emulation, unless asked twice."""
    from training import process

    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not process.start_process("auto").autocast and asked == [False]
    assert process.start_process("bf16").autocast
