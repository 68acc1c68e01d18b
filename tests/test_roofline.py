"""roofline.py counts what a step does; and what a step must not do: wait for the host."""

import sys

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from settings import Settings
from training import plan, speed
from training.fakes import without_memory
from training.process import Process

sys.path.insert(0, str(ROOT / "benchmarks"))
import roofline

GPU = Process(device=torch.device("cuda"), autocast=True)
BARE, ALL = (next(w for w in roofline.WAYS if w.name == n) for n in ("no option", "all together"))


class Crossings(TorchDispatchMode):
    """Operations that carry something from one device to another, or a GPU's number to Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # a number () of the CPU goes along with a kernel's arguments, at no cost
        given, made = (
            {t.device.type for t in tree_iter(x) if isinstance(t, torch.Tensor) and t.ndim}
            for x in ((args, kwargs), result)
        )
        read = "_local_scalar_dense" in str(func) and args[0].device.type == "cuda"
        if len(given | made) > 1 or read:
            self.found.append(str(func))
        return result


def crossings(denoiser, stage, run=None):
    """What crosses in a full-size forward pass whose batch lies on the GPU."""
    settings = Settings.of("openai-b32-224", denoiser=denoiser, drift_weight=0.1)
    _, model = plan.skeleton(settings)
    speed.tune_tokenizer(model, settings, GPU)
    plan.start(model, settings, stage)
    speed.lower_frozen(model, settings, GPU)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast asks for a real GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with without_memory("cuda"):
            plan.fill(model, "cuda")
            images, draws = plan.one_batch(model, 2, "cuda")
            model(images, draws)  # what is made once is made now
            with Crossings() as watch:
                (run or model)(images, draws, measure_drift=True)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    return watch.found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("denoiser", ["flow", "perceiver"])
def test_nothing_crosses_between_host_and_device_beyond_the_batch(denoiser, stage):
    assert crossings(denoiser, stage) == []


def test_a_crossing_would_be_seen():
    """The test above can fail: a copy to the GPU, a number read, a list made a tensor."""

    def run(images, draws, measure_drift):
        torch.zeros(3, device="cpu").to("cuda")
        images.cpu()

    assert len(crossings("perceiver", 1, run)) == 2


def test_a_product_is_counted_as_textbooks_do():
    """2·m·n·k operations; a matrix read once, the result written once."""
    with without_memory("cpu"):
        a, b = torch.empty(64, 32), torch.empty(32, 16)
        wide = torch.empty(1, 16).expand(64, 16)
        with roofline.Kernels([a, b, wide], True) as watch:
            c = a @ b
            (c.view(32, 32).t()).add_(1)
            c + wide
    product, added, last = watch.kernels
    assert product.flops == 2 * 64 * 32 * 16 and product.name == "mm"
    assert product.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert added.bytes == 4 * 2 * 64 * 16 and not added.flops, "read and written"
    assert last.bytes == 4 * (2 * 64 * 16 + 16), "what is expanded is read once"


def test_a_chain_reads_and_writes_once():
    """Three kernels in a row: what stays inside is neither written nor read."""

    def kernel(reads, writes, flops=0.0):
        return roofline.Kernel(
            "x", "denoiser", dict.fromkeys(reads, 10), dict.fromkeys(writes, 10), flops, "bf16"
        )

    chain = [kernel([1], [2]), kernel([2], [3]), kernel([2, 3], [4])]
    found = roofline.joined([*chain, kernel([4, 2], [5], 7.0), kernel([5], [6])])
    assert [k.name for k in found] == ["chain", "x", "chain"]
    assert found[0].reads == {1: 10} and set(found[0].writes) == {2, 4}
    assert found[1].flops == 7.0


@pytest.mark.parametrize("stage", [1, 2])
def test_every_kernel_is_of_a_part_and_no_operation_is_lost(stage):
    kernels = roofline.kernels_of_step(BARE, stage, 2)
    parts = {roofline.shown(kernel) for kernel in kernels}
    assert parts == set(roofline.PARTS)
    settings = Settings.of("openai-l14-224", batch=2, micro_batch=2, stage=str(stage))
    counted = plan.make_plan(settings, 1, "cuda").stages[stage].flops
    assert sum(kernel.flops for kernel in kernels) / 2 == pytest.approx(counted, rel=1e-6)
    # In stage 2 the tower runs back too, twice its work, and the denoiser for its input alone, two
    # thirds of it.
    work = {part: sum(k.flops for k in kernels if k.part == part) for part in ("CLIP", "denoiser")}
    assert work["CLIP"] / work["denoiser"] == pytest.approx(0.2 if stage == 1 else 0.6, rel=0.1)


def test_the_options_do_what_they_are_for():
    """At 32 images in stage 1: the tokenizer's bytes halved, and under 95 ms on an H200."""
    before, after = (roofline.figures(way, 1, 32)["parts"] for way in (BARE, ALL))
    assert after["tokenizer"]["gb"] <= 0.5 * before["tokenizer"]["gb"]
    assert after["together"]["ms_H200"] <= 95 < before["together"]["ms_H200"]
    for part in roofline.PARTS:
        assert after[part]["ms_H200"] <= before[part]["ms_H200"], part
