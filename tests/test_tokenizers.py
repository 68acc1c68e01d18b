"""autoencoders.py as a joint: other architectures plugged in, halves, channels last, no waiting."""

import copy
import inspect
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_VAE
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pretrained import autoencoders as ae
from settings import Settings
from toy.world import ToyScenes
from train import train_steps
from training.assemble import build_model
from training.plan import make_plan, report

SMALL = {"width": 32, "heads": 2, "batch": 8, "micro_batch": 8, "warmup": 2, "lora_rank": 4}
FLOW = {**SMALL, "rope_axes": "4,6,6", "vector_dim": 12, "context_dim": 20}


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(ae, "_REGISTERED", {})


def lines_of_register():
    """The example in the docstring of `register`, word for word."""
    text = inspect.getdoc(ae.register).split("::\n")[1].split("\nArgs:")[0]
    return textwrap.dedent(text).strip()


@pytest.fixture(scope="module")
def diffusers_vae(tmp_path_factory):
    """A tiny VAE of diffusers, as its folders are published."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("sd-vae")
    model.save_pretrained(folder)
    return model.eval(), folder / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def plugged_in(diffusers_vae):
    """The example's lines were run, with what a script would import."""
    import diffusers

    names = {**vars(ae), "diffusers": diffusers, "Path": Path, "torch": torch}
    exec(lines_of_register(), names)
    return diffusers_vae


def test_the_example_is_about_ten_lines():
    assert len(lines_of_register().splitlines()) <= 12


def test_a_foreign_vae_gives_its_own_numbers(plugged_in):
    model, file = plugged_in
    vae = ae.load_vae(file)
    assert type(vae).__name__ == "StableDiffusionVAE" and not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        mean, log_variance = vae.moments(images)
        assert torch.allclose(mean, posterior.mean, atol=1e-6)
        assert torch.allclose(log_variance, posterior.logvar, atol=1e-5)
        latents = vae.encode(images)
        assert torch.allclose(latents, posterior.mean * 0.18215, atol=1e-6)
        assert latents.shape == (2, 4, 8, 8)
        assert torch.allclose(vae.decode(latents), model.decode(posterior.mean).sample, atol=1e-5)


def test_three_steps_of_both_stages_on_a_foreign_vae(plugged_in):
    """`--vae …/diffusion_pytorch_model.safetensors`, in memory, by the loop of train.py."""
    settings = Settings.of("toy", **FLOW, vae=str(plugged_in[1]))
    _, model = build_model(settings)
    assert model.paradigm.latent_shape == (4, 8, 8)
    for stage in (1, 2):
        found = list(train_steps(model, ToyScenes(16, seed=1), 3, stage, settings))
        assert len(found) == 3 and all(0 < m["loss"] < 100 for m in found)
        assert all(m["gradient_norm"] > 0 for m in found)
    assert model.architecture()["flow"]["tokenizer"]["latent_channels"] == 4


def test_a_script_of_ones_own_is_train_py_with_another_vae(diffusers_vae, tmp_path):
    """Imports, the example, train.py's last lines: as docs/BACKBONES.md says."""
    head = "from pathlib import Path\nimport diffusers, torch\nfrom train import *\n"
    head += "from pretrained.autoencoders import *\n"
    end = (ROOT / "train.py").read_text().rpartition("\nif __name__")
    script = tmp_path / "my_train.py"
    script.write_text(f"{head}{lines_of_register()}\n{end[1]}{end[2]}")
    flags = ["--vae", str(diffusers_vae[1]), "--runs", str(tmp_path), "--toy_images", "16"]
    for name, value in FLOW.items():
        flags += [f"--{name}", str(value)]
    flags += ["--stage1_steps", "3", "--stage2_steps", "2", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, script, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy" / "enhanced" / "open_clip_model.safetensors").is_file()
    flags += ["--name", "other"]
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and b"does not fit" in done.stderr, "without the lines"


def test_a_plan_counts_a_foreign_vae(plugged_in):
    model, file = plugged_in
    settings = Settings.of("toy", **FLOW, vae=str(file))
    plan = make_plan(settings, 1, "cpu")
    assert plan.parameters["tokenizer"] == sum(p.numel() for p in model.parameters())
    assert "image 16 tokens" in report(plan)
    assert ae.published_config(file, ae.FLUX_VAE).latent_channels == 4


@dataclass(frozen=True)
class GridConfig:
    """What a discrete tokenizer must say of itself."""

    codes: int = 8
    code_width: int = 3
    downsampling: int = 16


class Corners(torch.nn.Module):
    """The eight corners of the colour cube, as a tokenizer: no file of weights was ever smaller."""

    def __init__(self, path):
        super().__init__()
        self.config = GridConfig()
        bits = torch.arange(8)[:, None].bitwise_right_shift(torch.arange(3)) % 2
        self.register_buffer("codebook", bits * 2.0 - 1)

    def indices(self, images):
        colours = torch.nn.functional.avg_pool2d(images, 16).flatten(2).mT  # (B, N, 3)
        return ae.nearest_codes(colours.flatten(0, 1), self.codebook).view(len(images), -1)

    def decode(self, indices):
        side = int(indices.shape[1] ** 0.5)
        return self.codebook[indices].mT.unflatten(2, (side, side)).repeat_interleave(16, -1)


def test_a_foreign_discrete_tokenizer(tmp_path):
    file = tmp_path / "colours.bin"
    file.write_bytes(b"")
    ae.register("colours.bin", Corners)
    settings = Settings.of("toy", **SMALL, denoiser="perceiver", layers=2, vqgan=str(file))
    _, model = build_model(settings)
    assert model.paradigm.tokens == 16
    found = list(train_steps(model, ToyScenes(16, seed=1), 3, 1, settings))
    assert all(0 < m["loss"] < 10 for m in found)


def test_what_is_no_tokenizer_and_what_is_not_registered_is_named(tmp_path, tiny_vae):
    file = tmp_path / "colours.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="VAE weights: .* does not fit"):
        ae.load_vae(file)
    ae.register("colours.safetensors", Corners)
    with pytest.raises(ValueError, match="registered for it has no moments, no latents"):
        ae.load_vae(file)
    assert ae.load_vqgan(file).config.codes == 8
    with pytest.raises(FileNotFoundError, match="VAE weights: no file"):
        ae.load_vae(tmp_path / "absent" / "colours.safetensors")
    own = tmp_path / "vae.safetensors"
    save_file(tiny_vae.state_dict(), own, metadata={"autoencoder": ae.config_to_text(TINY_VAE)})
    assert type(ae.load_vae(own)) is ae.VAE, "files of this project are read as before"


# -- halves --------------------------------------------------------------------------------------
def test_halves_give_float32_moments_near_the_true_ones():
    vae = ae.load_vae(ROOT / "toy" / "vae.safetensors")
    images = torch.stack([ToyScenes(8, seed=3)[(i, 0)]["image"] for i in range(8)]) * 2 - 1
    with torch.no_grad():
        mean, log_variance = vae.moments(images)
        half = copy.deepcopy(vae).to(torch.bfloat16)
        for given in (images, images.to(torch.bfloat16)):
            halves = half.moments(given)
            assert [m.dtype for m in halves] == [torch.float32] * 2
        assert not torch.equal(halves[0], mean), "computed in halves"
        error = (halves[0] - mean).abs().mean()
        assert error < 0.02 * mean.std() and (halves[1] - log_variance).abs().mean() < 0.1
        latents = half.latents(*halves, torch.randn_like(mean))
        assert latents.dtype == torch.float32
        shown = half.decode(latents).float() - vae.decode(latents)
        assert shown.abs().mean() < 0.02
        assert vae.double().moments(images.double())[0].dtype == torch.float64, "not cut down"


def test_halves_find_nearly_the_same_codes():
    vqgan = ae.load_vqgan(ROOT / "toy" / "vqgan.safetensors")
    images = torch.stack([ToyScenes(8, seed=3)[(i, 0)]["image"] for i in range(8)]) * 2 - 1
    with torch.no_grad():
        indices = vqgan.indices(images)
        half = copy.deepcopy(vqgan).to(torch.bfloat16)
        for given in (images, images.to(torch.bfloat16)):
            found = half.indices(given)
            assert found.shape == indices.shape and found.dtype == torch.long
            assert (found == indices).float().mean() > 0.9
        assert half.decode(indices).shape == images.shape


def test_codes_are_compared_in_float32_whatever_autocast_says():
    """Two codes that differ in the ninth bit: bf16's product knows seven."""
    codebook = torch.tensor([[1.0, 0.0], [1.0 + 2**-9, 0.0], [1.0 + 2**-8, 0.0]])
    vectors = codebook.flip(0).repeat(2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert ae.nearest_codes(vectors, codebook).tolist() == [2, 1, 0] * 2
    assert torch.is_autocast_enabled("cpu") is False
    with torch.device("meta"):
        assert ae.nearest_codes(torch.zeros(5, 2), torch.zeros(3, 2)).shape == (5,)


# -- order in memory -----------------------------------------------------------------------------
def test_channels_last_is_the_same_function(tiny_vae, tiny_vqgan):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        for tokenizer in (tiny_vae, tiny_vqgan):
            other = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last)
            weight = other.encoder.conv_in.weight
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert torch.allclose(other.encoder(images), tokenizer.encoder(images), atol=1e-5)
        assert torch.equal(other.indices(images), tokenizer.indices(images))


# -- devices -------------------------------------------------------------------------------------
class Waits(TorchDispatchMode):
    """Notes what makes a host and a device wait for one another: a number read off a tensor, a
    tensor made of numbers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal"):
            self.found.append(name)
        if name in ("_to_copy", "copy_") and (kwargs or {}).get("device") is not None:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_counter_sees_what_it_should():
    with Waits() as waits:
        torch.tensor(3.0).item()
    assert waits.found == ["lift_fresh", "_local_scalar_dense"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_between_images_and_tokens(tiny_vae, tiny_vqgan, dtype):
    images, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 4, 4)
    vae, vqgan = tiny_vae.to(dtype), tiny_vqgan.to(dtype)
    with torch.no_grad(), Waits() as waits:
        vae.decode(vae.encode(images, noise))
        vqgan.decode(vqgan.indices(images))
    assert not waits.found
