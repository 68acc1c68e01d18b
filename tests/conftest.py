"""Shared by all tests: small models, one thread count, the repository on the path."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flow_denoiser import FlowDenoiser, FlowDenoiserConfig  # noqa: E402
from perceiver_denoiser import PerceiverDenoiser, PerceiverDenoiserConfig  # noqa: E402
from pretrained.autoencoders import VAE, VQGAN, AutoencoderConfig, VQGANConfig  # noqa: E402

TINY_DENOISER = FlowDenoiserConfig(
    latent_channels=4,
    width=32,
    heads=2,
    axes=(4, 6, 6),
    double_blocks=1,
    single_blocks=2,
    vector_dim=12,
    context_dim=20,
    guidance=True,
)
TINY_VAE = AutoencoderConfig(
    base_channels=4,
    channel_multipliers=(1, 1, 2, 2),
    blocks_per_level=1,
    latent_channels=4,
    groups=2,
    shift=0.1,
    scale=0.8,
)
TINY_VQGAN = VQGANConfig(
    base_channels=4,
    channel_multipliers=(1, 1, 2, 2),
    blocks_per_level=1,
    latent_channels=8,
    groups=2,
    attention_levels=(3,),
    codes=24,
    code_width=6,
)
TINY_PERCEIVER = PerceiverDenoiserConfig(
    codes=24, code_width=6, side=4, width=32, heads=2, layers=2
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _same_attention_everywhere():
    """As train.py sets it: PyTorch's inference path for attention rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)


@pytest.fixture
def tiny_denoiser():
    torch.manual_seed(0)
    return FlowDenoiser(TINY_DENOISER)


@pytest.fixture
def tiny_vae():
    torch.manual_seed(0)
    return VAE(TINY_VAE).eval().requires_grad_(False)


TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_vqgan():
    torch.manual_seed(0)
    return VQGAN(TINY_VQGAN).eval().requires_grad_(False)


@pytest.fixture
def make_genhancer(tiny_vae, tiny_vqgan):
    """A whole GenHancer of a few thousand parameters; keywords go to it or to its paradigm."""
    import open_clip

    from genhancer import GenHancer
    from paradigms import Continuous, Discrete
    from pretrained.backbones import ClipInfo

    def make(denoiser="flow", **settings):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**TINY_CLIP).eval()
        info = ClipInfo("tiny", TINY_CLIP, (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
        own = {k: settings.pop(k) for k in ("local_ratio", "drift_weight") if k in settings}
        if denoiser == "flow":
            paradigm = Continuous(tiny_vae, FlowDenoiser(TINY_DENOISER), 32, **settings)
        else:
            paradigm = Discrete(tiny_vqgan, PerceiverDenoiser(TINY_PERCEIVER), 32, **settings)
        return GenHancer(clip, info, paradigm, **own)

    return make


SIGLIP = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 64,
        "timm_model_name": "vit_tiny_patch16_siglip_test",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 80,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "width": 192,
        "heads": 4,
        "layers": 2,
        "mlp_ratio": 3.7362,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


@pytest.fixture(scope="session")
def small_siglip():
    """timm has no small one; this is its SigLIP at two layers."""
    from timm.models import register_model
    from timm.models.vision_transformer import _create_vision_transformer

    def vit_tiny_patch16_siglip_test(pretrained=False, **kwargs):
        about = {
            "patch_size": 16,
            "embed_dim": 192,
            "depth": 2,
            "num_heads": 3,
            "mlp_ratio": 3.7362,
        }
        about |= {"class_token": False, "global_pool": "map", "num_classes": 0, "img_size": 64}
        kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
        base = "vit_base_patch16_siglip_224"
        return _create_vision_transformer(base, pretrained=False, **{**about, **kwargs})

    vit_tiny_patch16_siglip_test.__module__ = "timm.models.vision_transformer"
    register_model(vit_tiny_patch16_siglip_test)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """One undisturbed run of both stages; other tests compare with it or go on from it."""
    from tiny_runs import train

    runs = tmp_path_factory.mktemp("runs")
    done = train(runs, "straight")
    assert done.returncode == 0, done.stderr
    return runs / "straight"
