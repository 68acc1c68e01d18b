"""Our from-scratch modules against the libraries of the field, on the same random weights.

diffusers for FLUX's VAE and transformer, peft for LoRA. They are extras of the tests alone.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_CLIP
from safetensors.torch import save_file

import export_hf
from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from lora import inject_lora, lora_layers, lora_state_dict
from pretrained import flux
from pretrained.autoencoders import FLUX_VAE, VAE, load_vae

SMALL_FLUX = FlowDenoiserConfig(
    latent_channels=16, width=256, heads=2, double_blocks=2, single_blocks=3, vector_dim=48,
    context_dim=40, flux_time=True,
)  # fmt: skip


def shaken(module, size=0.05):
    """No zeros, no ones: every tensor takes part."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


# -- FLUX's VAE ----------------------------------------------------------------------------------
def test_vae_equals_diffusers():
    """Full channel plan at an eighth of its width; names converted by diffusers' own code."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    torch.manual_seed(0)
    mine = shaken(VAE(replace(FLUX_VAE, base_channels=32)).eval())
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=FLUX_VAE.shift,
        scaling_factor=FLUX_VAE.scale,
    ).eval()
    state = convert_ldm_vae_checkpoint(dict(mine.state_dict()), theirs.config)
    theirs.load_state_dict(state, strict=True)
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, log_variance = mine.moments(images)
        assert (mean - posterior.mean).abs().max() <= 1e-4
        assert (log_variance - posterior.logvar).abs().max() <= 1e-4
        latents = mine.latents(mean, log_variance, None)
        scaled = (posterior.mean - theirs.config.shift_factor) * theirs.config.scaling_factor
        assert (latents - scaled).abs().max() <= 1e-4
        assert (mine.decoder(mean) - theirs.decode(posterior.mean).sample).abs().max() <= 1e-4


def test_the_published_vae_layout_has_244_tensors(tmp_path):
    with torch.device("meta"):
        names = VAE(FLUX_VAE).state_dict()
    assert len(names) == 244
    save_file({"x": torch.zeros(1)}, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="does not fit: Missing key.*encoder"):
        load_vae(tmp_path / "ae.safetensors")


# -- FLUX's transformer --------------------------------------------------------------------------
@pytest.fixture
def flux_file(tmp_path):
    """Random weights in FLUX's layout, on the disk."""
    torch.manual_seed(0)
    file = tmp_path / "flux1-small.safetensors"
    save_file(shaken(FlowDenoiser(SMALL_FLUX), 0.02).state_dict(), file)
    return file


def diffusers_flux_names(state, width):
    """diffusers' own conversion, whose source has the full width written in."""
    import inspect

    from diffusers.loaders import single_file_utils as theirs

    source = inspect.getsource(theirs.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    space = dict(vars(theirs))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"](state)


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_transformer_equals_diffusers(tmp_path, guidance):
    """FLUX's time is ours the other way round: velocity(x, t) = −flux(x, 1 − t)."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = replace(SMALL_FLUX, guidance=guidance)
    file = tmp_path / "flux.safetensors"
    save_file(shaken(FlowDenoiser(config), 0.02).state_dict(), file)
    mine = flux.load_flux(file)
    assert mine.config == config, "the size is read off the file"
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=48,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    ).eval()
    state = diffusers_flux_names(dict(mine.state_dict()), config.width)
    theirs.load_state_dict(state, strict=True)

    x, t = torch.randn(2, 16, 8, 6), torch.tensor([0.2, 0.9])
    context, vector = torch.randn(2, 3, 40), torch.randn(2, 48)
    h, w = 4, 3
    packed = x.view(2, 16, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, h * w, 64)
    ids = torch.zeros(h, w, 3)
    ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
    with torch.no_grad():
        out = theirs(
            hidden_states=packed,
            encoder_hidden_states=context,
            pooled_projections=vector,
            timestep=1 - t,
            img_ids=ids.view(-1, 3),
            txt_ids=torch.zeros(3, 3),
            guidance=torch.full((2,), FlowDenoiser.GUIDANCE) if guidance else None,
        ).sample
        velocity = mine(x, t, context, vector)
    unpacked = out.view(2, h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 2 * h, 2 * w)
    assert velocity.std() > 0.1, "a test of zeros would prove nothing"
    assert (velocity + unpacked).abs().max() <= 1e-4


def test_the_published_transformer_layout():
    with torch.device("meta"):
        state = FlowDenoiser(flux.FLUX_TRANSFORMER).state_dict()
    assert len(state) == 780
    assert sum(t.numel() for t in state.values()) == pytest.approx(11.90e9, rel=1e-3)
    assert flux.config_of({k: tuple(v.shape) for k, v in state.items()}) == flux.FLUX_TRANSFORMER


def test_wrong_flux_files_are_named(tmp_path, flux_file):
    from safetensors.torch import load_file

    with pytest.raises(FileNotFoundError, match="no file .*nowhere"):
        flux.load_flux(tmp_path / "nowhere.safetensors")
    state = load_file(flux_file)
    state.pop("single_blocks.1.linear2.bias")
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"depth 2 \+ 3: Missing key.*single_blocks.1.linear2.b"):
        flux.load_flux(tmp_path / "a.safetensors")
    save_file({"encoder.conv_in.weight": torch.zeros(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="does not fit a transformer of depth 19 .* 38"):
        flux.load_flux(tmp_path / "vae.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(flux_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        flux.load_flux(tmp_path / "cut.safetensors")


# -- LoRA ----------------------------------------------------------------------------------------
def test_lora_equals_peft(tmp_path):
    """The same CLIP in two libraries, the same adapters: equal features and equal gradients."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.CLIP(**TINY_CLIP).eval()
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    about = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    export_hf.export(tmp_path, tmp_path / "hf")
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf").eval()
    targets = "q_proj k_proj v_proj out_proj fc1 fc2 visual_projection".split()
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "lora_only"}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=targets, **settings))

    inject_lora(clip.visual, rank=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, tensor in lora_state_dict(clip.visual).items():
            if name.endswith(".B"):  # zero at the start: then A would have no gradient
                dict(adapters(clip.visual))[name].copy_(0.1 * torch.randn_like(tensor))
        pairs = list(matching(clip.visual, theirs))
        assert len(pairs) == 2 * (2 * 6 + 1), "A and B of two blocks' six layers, and of proj"
        for mine, other in pairs:
            other.copy_(mine)
    images = torch.randn(3, 3, 32, 32)
    features, embeds = clip.visual(images), theirs(pixel_values=images).image_embeds
    assert (features - embeds).abs().max() <= 1e-5
    weights = torch.randn_like(features)
    (features * weights).sum().backward()
    (embeds * weights).sum().backward()
    for mine, other in pairs:
        assert mine.grad.abs().max() > 0
        assert (mine.grad - other.grad).abs().max() <= 1e-5 * max(1.0, float(mine.grad.abs().max()))
    biases = {n: p for n, p in theirs.named_parameters() if n.endswith("bias") and p.requires_grad}
    mine = [p for _, layer in lora_layers(clip.visual) for p in layer.biases().values()]
    assert sum(p.numel() for p in mine) == sum(p.numel() for p in biases.values())
    assert sum(float(p.grad.square().sum()) for p in mine) == pytest.approx(
        sum(float(p.grad.square().sum()) for p in biases.values()), rel=1e-4
    )


def adapters(tower):
    for name, layer in lora_layers(tower):
        for part, adapter in layer.adapters.items():
            yield f"{name}.{part}.A", adapter.A
            yield f"{name}.{part}.B", adapter.B


def matching(tower, theirs):
    """(our parameter, peft's) for every adapter."""
    own = dict(theirs.named_parameters())
    for name, parameter in adapters(tower):
        *path, part, letter = name.split(".")
        if path == ["proj"]:
            where = "visual_projection"
        else:
            layer = f"vision_model.encoder.layers.{path[2]}"
            if path[3] == "attn":
                where = f"{layer}.self_attn.{part}_proj"
            else:
                where = f"{layer}.mlp.{'fc1' if path[4] == 'c_fc' else 'fc2'}"
        yield parameter, own[f"base_model.model.{where}.lora_{letter}.default.weight"]
