"""autoencoders.py: published names and counts, shapes, nearest codes, loading, wrong files."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_VAE, TINY_VQGAN
from safetensors.torch import save_file

from pretrained import autoencoders as ae


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
    with pytest.raises(ValueError, match="VAE weights: .* does not fit: (Missing|Unexpected|size)"):
        ae.load_vae(tmp_path / "tiny.safetensors")


# -- VQ-GAN --------------------------------------------------------------------------------------
@pytest.mark.parametrize("codes", [1024, 16384])
def test_taming_vqgan_has_the_published_tensors(codes):
    with torch.device("meta"):
        state = ae.VQGAN(dataclasses.replace(ae.TAMING_VQGAN, codes=codes)).state_dict()
    published = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.1.block.0.conv1.weight": (128, 128, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.downsample.conv.weight": (256, 256, 3, 3),
        "encoder.down.4.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "encoder.down.4.attn.0.norm.weight": (512,),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.mid.attn_1.k.weight": (512, 512, 1, 1),
        "encoder.norm_out.bias": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "quant_conv.weight": (256, 256, 1, 1),
        "quantize.embedding.weight": (codes, 256),
        "post_quant_conv.weight": (256, 256, 1, 1),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.up.4.attn.2.q.bias": (512,),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {k: tuple(state[k].shape) for k in published} == published
    attended = {k.split(".attn.")[0] for k in state if ".attn." in k}
    assert attended == {"encoder.down.4", "decoder.up.4"}, "16 × 16 of a nominal 256 only"
    assert "encoder.down.4.downsample.conv.weight" not in state
    assert "decoder.up.0.upsample.conv.weight" not in state


@pytest.mark.parametrize("pixels, tokens", [(224, 196), (336, 441), (384, 576)])
def test_vqgan_token_counts(pixels, tokens):
    """Through the full-size VQ-GAN, random weights, there and back."""
    torch.manual_seed(0)
    vqgan = ae.VQGAN().eval().requires_grad_(False)
    indices = vqgan.indices(torch.rand(1, 3, pixels, pixels) * 2 - 1)
    assert indices.shape == (1, tokens) and indices.dtype == torch.long
    assert indices.min() >= 0 and indices.max() < 1024
    with torch.device("meta"):  # the way back costs seconds and shapes are all that is asked
        grid = torch.zeros(1, 256, *[int(tokens**0.5)] * 2)
        assert ae.Decoder(ae.TAMING_VQGAN)(grid).shape == (1, 3, pixels, pixels)


@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_nearest_codes_equal_the_naive_distance_matrix(rows):
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(500, 16, generator=g)
    codebook = torch.randn(300, 16, generator=g) * 3
    naive = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(ae.nearest_codes(vectors, codebook, rows), naive)


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import torch
from pretrained.autoencoders import nearest_codes
torch.manual_seed(0)
vectors, codebook = torch.randn(16 * 576, 256), torch.randn(16384, 256)
def naive(z, e):
    return (z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T).argmin(1)
nearest_codes(vectors[:8], codebook[:8]), naive(vectors[:8], codebook[:8])  # libraries loaded
def peak():  # of this program alone; getrusage would count the one that started it
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
before = peak()
{which}(vectors, codebook)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nearest_codes_need_a_quarter_of_the_naive_memory():
    """16 images of 384 px, K = 16384: peak memory of a process of its own, in MB."""
    peak = {}
    for which in ("naive", "nearest_codes"):
        script = MEMORY.format(root=str(ROOT), which=which)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        peak[which] = float(done.stdout)
    assert peak["naive"] > 500, peak  # 604 MB for one matrix: the measurement sees it
    assert peak["nearest_codes"] <= peak["naive"] / 4, peak


def test_vqgan_indices_and_decoding(tiny_vqgan):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    indices = tiny_vqgan.indices(images)
    assert indices.shape == (3, 16)
    grid = tiny_vqgan.quant_conv(tiny_vqgan.encoder(images))
    last = grid[1, :, 3, 2]  # row 3, column 2 is token 3·4 + 2
    distance = (tiny_vqgan.codebook - last).square().sum(1)
    assert int(indices[1, 14]) == int(distance.argmin())
    codes = tiny_vqgan.codebook[indices].view(3, 4, 4, 6).permute(0, 3, 1, 2)
    by_hand = tiny_vqgan.decoder(tiny_vqgan.post_quant_conv(codes))
    assert torch.equal(tiny_vqgan.decode(indices), by_hand) and by_hand.shape == images.shape


def taming_checkpoint(vqgan):
    """What taming's last.ckpt holds, as far as tensors go."""
    state = dict(vqgan.state_dict())
    state["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    return {"state_dict": state, "epoch": 3, "global_step": 7}


@pytest.mark.parametrize("kind", ["safetensors", "converted", "ckpt"])
def test_load_vqgan(tmp_path, tiny_vqgan, kind):
    """Ours with its configuration, taming's converted, taming's raw: `loss.*` dropped, K read off
    the file."""
    images = torch.rand(1, 3, 32, 32)
    path = tmp_path / ("vq.ckpt" if kind == "ckpt" else "vq.safetensors")
    checkpoint = taming_checkpoint(tiny_vqgan)
    if kind == "safetensors":
        text = ae.config_to_text(TINY_VQGAN)
        save_file(tiny_vqgan.state_dict(), path, metadata={"autoencoder": text})
        loaded = ae.load_vqgan(path)
    else:
        if kind == "converted":
            save_file(checkpoint["state_dict"], path)
        else:
            torch.save(checkpoint, path)
        loaded = ae.load_vqgan(path, dataclasses.replace(TINY_VQGAN, codes=9))
    assert loaded.config == TINY_VQGAN and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.indices(images), tiny_vqgan.indices(images))


class Callback:
    """What lightning puts beside the tensors; unpickling it would run whatever it says."""

    def __reduce__(self):
        return (print, ("never unpickle this",))


def test_a_checkpoint_with_other_objects_is_refused_with_the_way_out(tmp_path, tiny_vqgan, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({**taming_checkpoint(tiny_vqgan), "callbacks": Callback()}, path)
    with pytest.raises(ValueError, match="convert it once") as refused:
        ae.load_vqgan(path)
    assert "never unpickle" not in capsys.readouterr().out, "and nothing in it was run"
    # The printed conversion works.
    code = str(refused.value).split('python -c "', 1)[1].rsplit('"', 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    loaded = ae.load_vqgan(tmp_path / "vqgan.safetensors", TINY_VQGAN)
    assert torch.equal(loaded.codebook, tiny_vqgan.codebook)


def test_wrong_vqgan_files_are_named(tmp_path, tiny_vqgan, tiny_vae):
    with pytest.raises(FileNotFoundError, match="VQ-GAN weights: no file"):
        ae.load_vqgan(tmp_path / "absent.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(b"PK not a torch file")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        ae.load_vqgan(tmp_path / "cut.ckpt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        ae.load_vqgan(tmp_path / "list.pt")
    save_file(tiny_vqgan.state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="VQGAN weights: .* fit: Missing key.*encoder.down.0"):
        ae.load_vqgan(tmp_path / "tiny.safetensors")
    text = ae.config_to_text(TINY_VAE)
    save_file(tiny_vae.state_dict(), tmp_path / "vae.safetensors", metadata={"autoencoder": text})
    with pytest.raises(ValueError, match="VQGAN weights: .* does not fit"):
        ae.load_vqgan(tmp_path / "vae.safetensors")
    text = ae.config_to_text(TINY_VQGAN)
    save_file(tiny_vqgan.state_dict(), tmp_path / "v.safetensors", metadata={"autoencoder": text})
    with pytest.raises(ValueError, match="v.safetensors is of another kind"):
        ae.load_vae(tmp_path / "v.safetensors")
