"""The numbers that a preset puts in the place of the paper's, each group with its reason.

settings.py holds the paper's full size (Sec. 5.1, App. B): whoever gives a backbone's preset gets
just that. The toy and the small backbone need other numbers; so does a Perceiver, of which the
paper gives only the layers, and a run of both denoisers at once, which the paper does not have.

Groups are laid over one another, later ones on top, by `overrides`: the paper's numbers,
then the preset's, then those of its denoiser, then what is given by hand.
"""

from pathlib import Path

TOY_DIR = Path(__file__).resolve().parent / "toy"
# The six backbones of Tab. 1 by preset, and a small one. "quickgelu" is not optional: OpenAI's and
# MetaCLIP's weights were trained with that activation, and load without a murmur into the other.
BACKBONES = {
    "openai-b32-224": "ViT-B-32-quickgelu:openai",
    "openai-l14-224": "ViT-L-14-quickgelu:openai",
    "openai-l14-336": "ViT-L-14-336-quickgelu:openai",
    "metaclip-l14-224": "ViT-L-14-quickgelu:metaclip_fullcc",
    "metaclip-h14-224": "ViT-H-14-quickgelu:metaclip_fullcc",
    "siglip-so400m-224": "ViT-SO400M-14-SigLIP:webli",
    "siglip-so400m-384": "ViT-SO400M-14-SigLIP-384:webli",
}

# The toy: the same code at a size that two CPU cores train in minutes. Where it leaves the paper's
# settings, the reason is its few steps (400 to 3 000, not 100 000 + 5 000): small batches for more
# steps, higher rates with a cosine to end quietly, AdaLN-zero for a quick start, and a light drift
# term (λ of Eq. 5) to stay near the original, since stage 2's rate is 70 to 90 times the paper's.
TOY = {
    "clip": str(TOY_DIR / "clip.safetensors"),
    "toy_images": 12_288,
    "cache": "memory",
    "cache_dtype": "fp32",
    "workers": 0,
    "crop_min": 1.0,
    "schedule": "cosine",
    "warmup": 50,
    "log_every": 20,
    "sample_every": 700,
    "save_every": 100,
}
TOY_FLOW = {
    "vae": str(TOY_DIR / "vae.safetensors"),
    # one MM-DiT and two Single-DiT blocks, 192 wide: 3 M parameters on 16 tokens
    "blocks": 1,
    "width": 192,
    "heads": 6,
    "rope_axes": "8,12,12",
    "vector_dim": 64,
    "context_dim": 64,
    "guidance": False,
    "initialisation": "adaln-zero",
    "batch": 64,
    "micro_batch": 64,
    "stage1_steps": 1400,
    "stage1_lr": 2e-3,
    "stage2_steps": 400,
    "stage2_lr": 7e-4,
    "drift_weight": 0.02,
}
# 64 tokens where the flow's has 16, so it is narrower (1.3 M parameters) and takes smaller batches.
# A nat of cross-entropy weighs more than a unit of squared error, and so must the drift.
TOY_PERCEIVER = {
    "vqgan": str(TOY_DIR / "vqgan.safetensors"),
    "width": 128,
    "heads": 4,
    "layers": 4,
    "batch": 16,
    "micro_batch": 16,
    "stage1_steps": 3000,
    "stage1_lr": 1.5e-3,
    "stage2_steps": 900,
    "stage2_lr": 9e-4,
    "drift_weight": 0.15,
}
# Both at once: a nat pulls about five times as hard as a unit of squared error, so it counts a
# fifth. The toy's batch lies between those of its denoisers alone. Unlike the paper's stage 2 this
# one trains the denoisers along ("all", Fig. S4), which taught more at equal cost. A high λ and
# many steps move the tower less and in a better direction: more is gained where equally much is
# lost, once its change is scaled by 1.25 (training/blend.py). All this was chosen with training
# seed 0 on validation pairs.
JOINT = {"loss_weights": "1,0.2"}
TOY_JOINT = {
    **JOINT,
    "batch": 48,
    "micro_batch": 48,
    "stage2_steps": 1000,
    "stage2_lr": 9e-4,
    "stage2_trains": "all",
    "drift_weight": 0.2,
}
# The full size's Perceiver is a twelfth of its flow denoiser, and fits one GPU as it is.
PERCEIVER = {"width": 1024, "heads": 16}
# For people with photographs and one GPU of 12 GB or more: OpenAI's smallest ViT, a denoiser of
# about 100 M parameters, batches of 64, and an epoch of CC3M. The rates are the paper's.
ONE_GPU = {"gpus": 1, "batch": 64, "micro_batch": 64, "stage1_steps": 50_000, "sample_every": 2_500}
ONE_GPU_FLOW = {"width": 1152, "heads": 9, "blocks": 1, "context_dim": 1024}


def overrides(preset: str, denoiser: str) -> dict:
    """What a preset with a denoiser puts in the place of the full size's numbers."""
    # Where both teach, a number that both know has the flow's value here; each one's stage 1 still
    # takes its own (`parts` in settings.py).
    flow, both = "flow" in denoiser.split("+"), "+" in denoiser
    if preset == "toy":
        discrete = TOY_PERCEIVER if denoiser != "flow" else {}
        return TOY | discrete | (TOY_FLOW if flow else {}) | (TOY_JOINT if both else {})
    chosen = {"clip": BACKBONES.get(preset, "")} | (JOINT if both else {})
    if preset == "openai-b32-224":
        return chosen | ONE_GPU | (ONE_GPU_FLOW if flow else PERCEIVER)
    return chosen | ({} if flow else PERCEIVER)
