"""autoencoders.py: the published VAE's names and counts, shapes, normalisation, wrong files."""

import dataclasses

import pytest
import torch
from conftest import TINY_VAE
from safetensors.torch import save_file

import autoencoders as ae


def test_flux_vae_has_the_published_tensors():
    with torch.device("meta"):
        state = ae.VAE(ae.FLUX_VAE).state_dict()
    assert len(state) == 244
    assert sum(t.numel() for t in state.values()) == 83_819_683  # 83.8 M
    published = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.mid.block_2.norm1.weight": (512,),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.upsample.conv.bias": (512,),
        "decoder.up.1.block.2.conv2.weight": (256, 256, 3, 3),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {k: tuple(state[k].shape) for k in published} == published
    assert not any("downsample" in k for k in state if k.startswith("encoder.down.3"))
    assert not any("upsample" in k for k in state if k.startswith("decoder.up.0"))


@pytest.mark.parametrize("pixels, cells", [(224, 28), (336, 42), (384, 48)])
def test_token_counts(pixels, cells):
    """224 → 196 tokens, 336 → 441, 384 → 576, through the full-size encoder on the meta device."""
    with torch.device("meta"):
        mean, _ = ae.VAE(ae.FLUX_VAE).moments(torch.zeros(1, 3, pixels, pixels))
    assert mean.shape == (1, 16, cells, cells)
    assert (cells // 2) ** 2 in (196, 441, 576)


def test_encode_and_decode_shapes(tiny_vae):
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = tiny_vae.encode(images)
    assert latents.shape == (2, 4, 4, 6)
    assert tiny_vae.decode(latents).shape == images.shape


def test_shift_and_scale_are_applied_and_undone(tiny_vae):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, log_variance = tiny_vae.moments(images)
    assert torch.allclose(tiny_vae.encode(images), (mean - 0.1) * 0.8)
    assert torch.allclose(
        tiny_vae.decode(tiny_vae.encode(images)), tiny_vae.decoder(mean), atol=1e-5
    )
    noise = torch.randn_like(mean)
    sampled = tiny_vae.encode(images, noise)
    assert torch.allclose(sampled, (mean + torch.exp(0.5 * log_variance) * noise - 0.1) * 0.8)


def test_attention_levels_give_taming_names():
    config = dataclasses.replace(TINY_VAE, attention_levels=(3,))
    state = ae.VAE(config).state_dict()
    assert (
        "encoder.down.3.attn.0.proj_out.weight" in state and "decoder.up.3.attn.1.q.bias" in state
    )
    assert not any(".attn." in k for k in state if "down.2" in k or "up.2" in k)


def test_load_round_trip_with_configuration(tmp_path, tiny_vae):
    path = tmp_path / "vae.safetensors"
    save_file(tiny_vae.state_dict(), path, metadata={"autoencoder": ae.config_to_text(TINY_VAE)})
    loaded = ae.load_vae(path)
    assert loaded.config == TINY_VAE and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.encode(images), tiny_vae.encode(images))


def test_wrong_files_are_named(tmp_path, tiny_vae):
    with pytest.raises(FileNotFoundError, match="no file"):
        ae.load_vae(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a whole safetensors"):
        ae.load_vae(tmp_path / "cut.safetensors")
    save_file(tiny_vae.state_dict(), tmp_path / "tiny.safetensors")  # read as FLUX's: does not fit
    with pytest.raises(ValueError, match=r"expected 244; first mismatch decoder.conv_in.bias"):
        ae.load_vae(tmp_path / "tiny.safetensors")
