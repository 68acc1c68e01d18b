"""The parts of a step as diffusers, transformers and peft have them, on this project's weights.

Names and shapes are converted by the libraries' own code, by export_hf.py, and for LoRA by the one
table below. Every conversion is strict: nothing is missing and nothing left over. Each function
imports its library itself, so that only what is used must be installed.

Letters: B batch, C latent channels, h w latent height and width, N = (h/2)·(w/2) tokens.
"""

import inspect
import json
import tempfile
from pathlib import Path

import torch
from report import ROOT  # noqa: F401  (makes the project's modules importable)
from safetensors.torch import save_file
from torch import Tensor, nn

import export_hf
from flow_denoiser import FlowDenoiser
from lora import lora_layers
from pretrained.autoencoders import VAE
from pretrained.backbones import ClipInfo

LORA = "q_proj k_proj v_proj out_proj fc1 fc2 visual_projection".split()


def their_vae(mine: VAE) -> nn.Module:
    """diffusers.AutoencoderKL; names converted by diffusers' own code."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    channels = [mine.config.base_channels * m for m in mine.config.channel_multipliers]
    theirs = diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=mine.config.blocks_per_level,
        latent_channels=mine.config.latent_channels,
        norm_num_groups=mine.config.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=mine.config.shift,
        scaling_factor=mine.config.scale,
    )
    state = {k: v.contiguous() for k, v in mine.state_dict().items()}
    theirs.load_state_dict(convert_ldm_vae_checkpoint(state, theirs.config), strict=True)
    return theirs.eval().requires_grad_(False)


def their_denoiser(mine: FlowDenoiser) -> nn.Module:
    """diffusers.FluxTransformer2DModel; in its own conversion the full width is written in."""
    import diffusers
    from diffusers.loaders import single_file_utils as files

    c = mine.config
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=4 * c.latent_channels,
        num_layers=c.double_blocks,
        num_single_layers=c.single_blocks,
        attention_head_dim=c.width // c.heads,
        num_attention_heads=c.heads,
        joint_attention_dim=c.context_dim,
        pooled_projection_dim=c.vector_dim,
        guidance_embeds=c.guidance,
        axes_dims_rope=c.axes,
    )
    source = inspect.getsource(files.convert_flux_transformer_checkpoint_to_diffusers)
    space = dict(vars(files))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {c.width}"), space)
    state = space["convert_flux_transformer_checkpoint_to_diffusers"](dict(mine.state_dict()))
    theirs.load_state_dict(state, strict=True)
    return theirs


def their_tower(clip: nn.Module, info: ClipInfo, adapted: bool) -> nn.Module:
    """transformers' CLIPVisionModelWithProjection, by peft with LoRA's paper settings."""
    import peft
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
        text = json.dumps(info.open_clip_config())
        (folder / "open_clip_config.json").write_text(text)
        export_hf.export(folder, folder / "hf")
        transformers.logging.set_verbosity_error()  # the text tower stays behind, as it should
        transformers.logging.disable_progress_bar()
        kind = transformers.CLIPVisionModelWithProjection
        theirs = kind.from_pretrained(folder / "hf").eval().requires_grad_(False)
    if not adapted:
        return theirs
    how = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1, "bias": "lora_only"}
    return peft.get_peft_model(theirs, peft.LoraConfig(target_modules=LORA, **how))


def copy_adapters(tower: nn.Module, theirs: nn.Module) -> None:
    """Our adapters' numbers into peft's."""
    own = dict(theirs.named_parameters())
    for name, layer in lora_layers(tower):
        path = name.split(".")
        for part, adapter in layer.adapters.items():
            if path == ["proj"]:
                where = "visual_projection"
            else:
                mlp = {"c_fc": "mlp.fc1", "c_proj": "mlp.fc2"}.get(path[-1])
                where = f"vision_model.encoder.layers.{path[2]}.{mlp or f'self_attn.{part}_proj'}"
            with torch.no_grad():
                for letter in "AB":
                    other = own[f"base_model.model.{where}.lora_{letter}.default.weight"]
                    other.copy_(getattr(adapter, letter))


def image_ids(side: int) -> Tensor:
    """(0, row, column) of every token of a square, (N, 3)."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)
    return ids.view(-1, 3)


def velocity_by_diffusers(denoiser: nn.Module, x, t, condition: tuple, ids: Tensor) -> Tensor:
    """Latents (B, C, h, w) into tokens, through the transformer, and back."""
    b, c, h, w = x.shape
    tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    out = denoiser(
        hidden_states=tokens.reshape(b, h * w // 4, 4 * c),
        timestep=t,
        encoder_hidden_states=condition[0],
        pooled_projections=condition[1],
        img_ids=ids,
        txt_ids=torch.zeros(condition[0].shape[1], 3),
    ).sample
    out = out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(b, c, h, w)
