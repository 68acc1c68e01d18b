"""Strangers' VAE, VQ-GAN and FLUX files: their header's JSON, their tensors' names and numbers."""

import json

import pytest
import torch
from conftest import TINY_VAE, TINY_VQGAN
from safetensors.torch import save_file

from flow_denoiser import FlowDenoiser
from pretrained import autoencoders as ae
from pretrained.flux import FLUX_TRANSFORMER, config_of, load_flux


@pytest.fixture
def files(tmp_path, tiny_vae, tiny_vqgan):
    """name → (tensors, configuration, how it is loaded)"""
    return {
        "vae": (tiny_vae.state_dict(), TINY_VAE, ae.load_vae),
        "vqgan": (tiny_vqgan.state_dict(), TINY_VQGAN, ae.load_vqgan),
    }


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["vae", "vqgan"])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(
    tmp_path, files, kind, dtype, value
):
    tensors, config, load = files[kind]
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    about = {"autoencoder": ae.config_to_text(config)}
    save_file(tensors, tmp_path / "w.safetensors", about)
    load(tmp_path / "w.safetensors")
    tensors["decoder.conv_in.bias"][0] = value
    save_file(tensors, tmp_path / "w.safetensors", about)
    with pytest.raises(ValueError, match="w.safetensors: tensor decoder.conv_in.bias is not fin"):
        load(tmp_path / "w.safetensors")


def test_a_number_too_large_for_float32_is_none(tmp_path, files):
    tensors, config, load = files["vae"]
    tensors = {k: v.double() for k, v in tensors.items()}
    tensors["encoder.conv_in.bias"][0] = 1e300
    about = {"autoencoder": ae.config_to_text(config)}
    save_file(tensors, tmp_path / "w.safetensors", about)
    with pytest.raises(ValueError, match="tensor encoder.conv_in.bias is not finite"):
        load(tmp_path / "w.safetensors")


HEADERS = [
    "[]", "5", "[" * 100_000, "{", '{"unknown": 1}', '{"groups": 0}', '{"groups": "2"}',
    '{"base_channels": 1e9}', '{"blocks_per_level": 1000000000000}', '{"blocks_per_level": 999999}',
    '{"channel_multipliers": "1124"}', '{"channel_multipliers": 4}', '{"channel_multipliers": []}',
    '{"channel_multipliers": [1, [2]]}', '{"scale": NaN}', '{"shift": "x"}',
    '{"latent_channels": -4}', '{"attention_levels": [null]}', '{"groups": true}',
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_of_another_shape_is_a_line(tmp_path, files, header):
    tensors, _, load = files["vae"]
    save_file(tensors, tmp_path / "w.safetensors", {"autoencoder": header})
    for read in (load, lambda path: ae.published_config(path, ae.FLUX_VAE)):
        with pytest.raises(ValueError, match="w.safetensors"):
            read(tmp_path / "w.safetensors")


def test_a_damaged_file_is_a_line_for_a_plan_too(tmp_path, files):
    tensors, _, load = files["vae"]
    save_file(tensors, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-100])
    for read in (load, lambda path: ae.published_config(path, ae.FLUX_VAE)):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [{1: torch.zeros(1)}, {"state_dict": [1]}, [1], 5])
def test_a_torch_file_of_another_shape_is_a_line(tmp_path, content):
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        ae.load_vqgan(tmp_path / "w.ckpt")


def test_a_codebook_without_rows_is_a_line(tmp_path):
    save_file({"quantize.embedding.weight": torch.tensor(1.0)}, tmp_path / "w.safetensors")
    for read in (ae.load_vqgan, lambda path: ae.published_config(path, ae.TAMING_VQGAN)):
        with pytest.raises(ValueError, match="codes 0"):
            read(tmp_path / "w.safetensors")


# -- FLUX ----------------------------------------------------------------------------------------
def test_a_false_number_in_a_name_builds_no_blocks():
    names = ["double_blocks.1000000000000.x", "double_blocks.x.y", "single_blocks.0.x"]
    config = config_of(dict.fromkeys(names, (1,)) | {"img_in.weight": (1,)})
    assert (config.double_blocks, config.single_blocks) == (2, 1)
    assert config_of({"img_in.weight": (3, 64)}).heads == 1


def test_flux_weights_are_finite_or_refused(tmp_path, monkeypatch):
    from pretrained import flux

    monkeypatch.setattr(flux, "config_of", lambda shapes: tiny)
    tiny = flux.replace(FLUX_TRANSFORMER, width=128, heads=1, double_blocks=1, single_blocks=1,
                        vector_dim=8, context_dim=8)  # fmt: skip
    state = {k: v.bfloat16() for k, v in FlowDenoiser(tiny).state_dict().items()}
    save_file(state, tmp_path / "flux.safetensors")
    load_flux(tmp_path / "flux.safetensors", torch.bfloat16)
    state["img_in.bias"][0] = float("nan")
    save_file(state, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="flux.safetensors: tensor img_in.bias is not finite"):
        load_flux(tmp_path / "flux.safetensors", torch.bfloat16)


def test_what_is_written_is_read_again():
    text = ae.config_to_text(TINY_VQGAN)
    assert ae.config_from_text(text, ae.VQGANConfig) == TINY_VQGAN and json.loads(text)
