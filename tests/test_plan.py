"""plan.py: what it foretells is what a run then needs."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT
from tiny_runs import train_here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from presets import BACKBONES
from settings import Settings
from training import assemble, plan, speed
from training import checkpoints as ckpt
from training.assemble import make_optimizer, parameter_groups
from training.fakes import matrix_attention, without_memory
from training.process import Process

CPU = Process()


def toy(denoiser="flow", **more):
    return Settings.of("toy", denoiser=denoiser, **more)


CASES = [(denoiser, stage) for denoiser in ("flow", "perceiver") for stage in (1, 2)]


@pytest.mark.parametrize("denoiser, stage", CASES)
@pytest.mark.parametrize("micro_batch", [4, 16])
def test_parameters_and_memory_of_a_real_step(denoiser, stage, micro_batch):
    """Everything within 5 % of what a real step holds: weights, gradients, moments, and what
    autograd keeps."""
    fixed = {"mask_from": 0.7, "mask_to": 0.7} if denoiser == "perceiver" else {}
    settings = toy(denoiser, stage=str(stage), micro_batch=micro_batch, **fixed)
    foretold = plan.make_plan(settings, 1, "cpu")
    with matrix_attention():
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


@pytest.mark.parametrize("denoiser, stage", CASES)
@pytest.mark.parametrize("cache", ["memory", ""])
@pytest.mark.parametrize("batch", [16, 32])
def test_the_true_peak_of_a_step(denoiser, stage, cache, batch):
    """Everything that is alive at once, temporaries too, within 5 %: with what the frozen parts
    make of the images known before or not, in one piece and in two."""
    settings = toy(denoiser, stage=str(stage), cache=cache, micro_batch=16, batch=batch)
    foretold = plan.make_plan(settings, 1, "cpu").stages[stage]
    with matrix_attention():
        _, model = assemble.build_model(settings, CPU)
        plan.start(model, settings, stage)
        optimizer = make_optimizer(parameter_groups(model, settings, stage), settings)
        images, draws = plan.one_batch(model, 16, "cpu")
        cached = model.precompute(images) if cache else None
        for _ in range(2):  # the moments exist from the second step on
            moments = [v for state in optimizer.state.values() for v in state.values()]
            given = [images, *draws.values(), *(cached or {}).values()]
            live = Live([*(p.data for p in model.parameters()), *model.buffers(), *moments, *given])
            with live:
                for _ in range(batch // 16):
                    model(images, draws, cached)["loss"].backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert foretold.peak == pytest.approx(live.peak, rel=0.05)
    assert ("tokenizer" in foretold.peaks) is not bool(cache)


# Two ranks, forks of a process that has imported everything; each takes three steps and says what
# it holds.
RANKS = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from tiny_runs import free_port
import torch, train
from settings import Settings
from training import assemble, plan, stages
from training.fakes import Watch
from training.process import start_process
def rank(settings, number, file):
    process = start_process("fp32")
    _, model = assemble.build_model(settings, process)
    stage = stages.begin(number, model, settings, process)
    batches = stage.global_batches(assemble.find_data(settings, process))
    for _ in range(2):  # in the second, DDP cuts its buckets anew
        train.train_step(stage, next(batches))
    found, step = dict(), stage.optimizer.step
    def watched(*args):
        found["gradients"] = plan.bytes_of(p.grad for p in stage.learning)
        return step(*args)
    stage.optimizer.step = watched
    moments = [v for s in stage.optimizer.state.values() for v in s.values() if v.ndim]
    held = [p.grad for p in stage.learning if p.grad is not None]
    watch, pieces = Watch([*model.parameters(), *model.buffers(), *moments, *held]), next(batches)
    with watch:
        train.train_step(stage, pieces)
    found["moments of AdamW"] = plan.bytes_of(moments)
    found["trainable weights"] = plan.bytes_of(stage.learning)
    found["frozen weights"] = plan.bytes_of(p for p in model.parameters() if not p.requires_grad)
    found["peak"] = max(watch.peaks.values())
    with open(file, "w") as out:
        json.dump(found, out)
for folder, number, given in json.loads(sys.argv[1]):
    children, port = [], free_port()
    for me in "01":
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= dict(WORLD_SIZE="2", RANK=me, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        rank(Settings.of("toy", **given), number, f"{{folder}}/{{me}}.json")
        os._exit(0)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children), given
"""
SHARED = [(*case, shard) for case in CASES for shard in (True, False)]


def given_to_ranks(denoiser, stage, shard):
    fixed = {"mask_from": 0.7, "mask_to": 0.7} if denoiser == "perceiver" else {}
    given = {"denoiser": denoiser, "shard": shard, "stage": str(stage), "cache": ""}
    return given | {"batch": 16, "micro_batch": 4, "toy_images": 64, **fixed}


@pytest.fixture(scope="module")
def held_by_ranks(tmp_path_factory):
    """{case: what each of two ranks held}"""
    folders = {case: tmp_path_factory.mktemp("ranks") for case in SHARED}
    jobs = [(str(folders[case]), case[1], given_to_ranks(*case)) for case in SHARED]
    command = [sys.executable, "-c", RANKS, json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        c: [json.loads((f / f"{r}.json").read_text()) for r in "01"] for c, f in folders.items()
    }


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_each_of_two_ranks_holds_what_was_foretold(case, held_by_ranks):
    """Shared out (FSDP) and whole (DDP), accumulated in two pieces: each figure within 5 %."""
    figures = plan.make_plan(Settings.of("toy", **given_to_ranks(*case)), 2, "cpu")
    foretold = figures.stages[case[1]]
    real = {
        name: max(rank[name] for rank in held_by_ranks[case]) for name in held_by_ranks[case][0]
    }
    print(f"{case}: {foretold.peak / real['peak']:.3f} of the peak")
    for name, size in real.items():
        known = foretold.peak if name == "peak" else foretold.memory[name]
        assert known == pytest.approx(size, rel=0.05), name


@pytest.mark.parametrize("denoiser, stage", CASES)
def test_fake_tensors_do_as_a_gpus(denoiser, stage):
    """What autograd keeps of a forward pass, to the byte: of the CPU's fake tensors that were told
    how, and of a GPU's, which can go no further than that."""
    settings = Settings.of("openai-b32-224", denoiser=denoiser, micro_batch=2, lora_dropout=0.1)
    kept = []
    for device in ("cpu", "cuda"):
        _, model = plan.skeleton(settings)
        plan.start(model, settings, stage)
        speed.lower_frozen(model, settings, Process(device=torch.device("cuda"), autocast=True))
        with without_memory("cuda"):
            plan.fill(model, device)
            images, draws = plan.one_batch(model, 2, device)
            # torch.autocast asks for a real GPU
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                kept.append(plan.saved_for_backward(model, images, draws)[0])
            finally:
                torch.set_autocast_enabled(device, False)
                torch.clear_autocast_cache()
    assert kept[0] == pytest.approx(kept[1], rel=1e-3)


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
def test_the_command_for_every_preset(preset, tmp_path):
    flags = ["--plan", "--preset", preset, "--gpus", "8"]
    done = train_here(tmp_path / "runs", "planned", tiny=flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "memory on the host, per rank" in done.stdout and "text tower" in done.stdout
    small = preset == "openai-b32-224"
    stages = ("3,200,000", "320,000") if small else ("25,600,000 images, 8.5 epochs", "1,280,000")
    assert all(images in done.stdout for images in stages)
    assert "together with --shard" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("micro_batch, most", [(2, (9e9, 9e9)), (16, (20e9, 20e9))])
def test_the_full_size_shared_out_among_eight(micro_batch, most):
    """The paper's 13.07 GB (Tab. 7) at two images a GPU; and what its 16 take."""
    settings = Settings.of("openai-l14-224", micro_batch=micro_batch, shard=True)
    figures = plan.make_plan(settings, 8, "cuda").stages
    shared = figures[1].memory
    for stage, limit in zip((1, 2), most, strict=True):
        assert figures[stage].peak <= limit
        assert sum(figures[stage].memory.values()) <= figures[stage].peak
    eighth = 4 * figures[1].trainable / 8
    for name, times in (("trainable weights", 1), ("gradients", 1), ("moments of AdamW", 2)):
        assert shared[name] == pytest.approx(times * eighth, rel=1e-3), name
    assert 16 * figures[1].trainable > 21e9, "weights, gradients and moments, on each of them whole"


def test_the_cache_in_the_plan():
    """FLUX's VAE on 224 px: 16 × 28 × 28 means and log-variances and 768 features, in halves."""
    from training.plan_report import report

    figures = plan.make_plan(Settings.of("openai-l14-224", stage="1", shard=True), 8, "cuda")
    assert figures.cache == 2 * (2 * 16 * 28 * 28 + 768) + 4
    assert 1.3 < figures.stages[1].flops / (figures.stages[1].flops - figures.spared) < 1.6
    said = "51.7 kB an image, 155 GB for CC3M; stage 1 then takes 816.1 of 1,186.7 GFLOP an image"
    assert said in report(figures)
    # With it: a step that is spared them, and the same line.
    asked = Settings.of("openai-l14-224", stage="1", shard=True, cache="features")
    with_it = plan.make_plan(asked, 8, "cuda")
    assert with_it.stages[1].flops == figures.stages[1].flops - figures.spared
    assert "tokenizer" not in with_it.stages[1].peaks and said in report(with_it)


def test_the_plan_has_the_stages_of_the_run():
    for more, stages in (({}, [1, 2]), ({"stage1_from": "a"}, [2]), ({"end_to_end": True}, [2])):
        assert list(plan.make_plan(toy(**more), 1, "cpu").stages) == stages


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
        (["--micro_batch", "12"], "--batch 256 is no multiple of micro_batch 12 × 8 ranks"),
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
