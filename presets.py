"""The numbers of the presets, each group with its reason; and what people type instead of a flag.

settings.py holds the paper's full size; a preset replaces some of its numbers.
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
# settings, the reason is its few steps (hundreds, not 100 000 + 5 000): small batches for more
# steps, higher rates with a cosine to end quietly, AdaLN-zero for a quick start, and a light drift
# term (λ of Eq. 5) for what the paper's 100 times smaller rate does at full size: staying near the
# original.
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
    "drift_weight": 0.1,
}
# Both at once: the batch between theirs, and more drift weight, since two losses pull.
JOINT = {"loss_weights": "1,0.2"}
TOY_JOINT = {
    **JOINT,
    "batch": 48,
    "micro_batch": 48,
    "stage2_steps": 500,
    "stage2_lr": 9e-4,
    "drift_weight": 0.04,
}
# The full size's Perceiver is a twelfth of its flow denoiser, and fits one GPU as it is.
PERCEIVER = {"width": 1024, "heads": 16}
# For people with photographs and one GPU of 12 GB or more: OpenAI's smallest ViT, a denoiser of
# about 100 M parameters, batches of 64, and an epoch of CC3M. The rates are the paper's.
ONE_GPU = {"gpus": 1, "batch": 64, "micro_batch": 64, "stage1_steps": 50_000, "sample_every": 2_500}
ONE_GPU_FLOW = {"width": 1152, "heads": 9, "blocks": 1, "context_dim": 1024}

# What people type, and what it is called here.
HINTS = {
    "zero": "--shard shares weights, gradients and moments out among the ranks",
    "fsdp": "--shard",
    "vae_fp32": "--tokenizer_dtype fp32 (the default), or bf16",
    "lr": "the stages have rates of their own: --stage1_lr and --stage2_lr",
    "learning_rate": "the stages have rates of their own: --stage1_lr and --stage2_lr",
    "steps": "the stages have steps of their own: --stage1_steps and --stage2_steps",
    "max_steps": "the stages have steps of their own: --stage1_steps and --stage2_steps",
    "epochs": "there are steps, not epochs: --stage1_steps and --stage2_steps, of --batch images",
    "batch_size": "--batch is the global batch, --micro_batch what one GPU takes at once",
    "output": "everything goes to --runs DIR/--name NAME",
    "out": "everything goes to --runs DIR/--name NAME",
    "output_dir": "everything goes to --runs DIR/--name NAME",
    "resume": "the same command again goes on from the newest checkpoint",
    "device": "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= (empty) hides it",
    "gpu": "torchrun --nproc_per_node N train.py … takes N GPUs",
    "model": "the CLIP to enhance is --clip, a whole set of defaults --preset",
    "bf16": "--precision bf16",
    "fp16": "--precision bf16: it needs no loss scaling",
    "lora_r": "--lora_rank",
    "no_cache": "--cache '' is none, --cache memory in memory, --cache DIR a folder",
}
