"""The backbones: CLIP models by name, file or folder, and one way to look through their eyes.

The paper enhances six of them (Tab. 1): OpenAI's and MetaCLIP's ViTs, whose [CLS] token is the
condition, and SigLIP's, which have none and give an attention-pooled vector instead (Sec. 5.4).
open_clip builds all; this file makes sure that the architecture, the activation above all, is
always known together with the weights, and brings both kinds of tower behind one function.

Letters: B images, H W height and width, d width of the global token, P patch tokens of width p.
This module imports nothing of this project: copy it freely.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import open_clip
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class ClipInfo:
    """What must be known about a CLIP besides its weights; written into every checkpoint.

    The activation (`quick_gelu`) is part of `model_cfg`: built with the wrong one, OpenAI's weights
    load without a murmur and give worse features.
    """

    name: str
    model_cfg: dict
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: str = "shortest"  # for evaluation; SigLIP squashes instead of cropping

    @property
    def image_size(self) -> int:
        return self.model_cfg["vision_cfg"]["image_size"]

    def open_clip_config(self) -> dict:
        """The content of open_clip_config.json, which `local-dir:` folders carry."""
        return {
            "model_cfg": self.model_cfg,
            "preprocess_cfg": {
                "mean": list(self.mean),
                "std": list(self.std),
                "resize_mode": self.resize_mode,
            },
        }


def load_clip(model: str) -> tuple[nn.Module, ClipInfo]:
    """A CLIP on the CPU, in eval mode, by one of three spellings.

    * ``FOLDER`` with open_clip_config.json and open_clip_model.safetensors (an enhanced model);
    * ``FILE.safetensors`` with FILE.json, an open_clip config, beside it (the toy weights);
    * ``NAME:TAG``, open_clip's own, e.g. ``ViT-L-14-quickgelu:openai``; TAG may be a weights file.

    Raises: FileNotFoundError, or ValueError saying which part of `model` is not known or not sound.
    """
    path = Path(model)
    if path.is_dir() or path.suffix == ".safetensors":
        weights = path / "open_clip_model.safetensors" if path.is_dir() else path
        config = path / "open_clip_config.json" if path.is_dir() else path.with_suffix(".json")
        for file in (weights, config):
            if not file.is_file():
                raise FileNotFoundError(
                    f"CLIP {model}: {file} is missing; weights need their architecture beside "
                    "them (a folder with open_clip_config.json, or FILE.json)"
                )
        return _clip_from_files(model, weights, config)
    name, _, tag = model.partition(":")
    if name not in open_clip.list_models():
        raise ValueError(
            f"CLIP {model!r}: not a folder, not a .safetensors file, and {name!r} is not an "
            "open_clip "
            "model name; try ViT-L-14-quickgelu:openai"
        )
    if not tag:
        raise ValueError(f"CLIP {model!r}: add the weights, as in {name}:openai or {name}:FILE")
    try:
        clip = open_clip.create_model(name, pretrained=tag, weights_only=True)
    except (
        Exception
    ) as error:  # open_clip raises many kinds: no network, no such tag, wrong tensors
        raise ValueError(
            f"CLIP {model!r}: open_clip could not load it ({str(error).splitlines()[0]})"
        ) from None
    preprocess = open_clip.get_model_preprocess_cfg(clip)
    info = ClipInfo(
        name,
        open_clip.get_model_config(name),
        tuple(preprocess["mean"]),
        tuple(preprocess["std"]),
        preprocess["resize_mode"],
    )
    return clip.eval(), info


def _clip_from_files(model: str, weights: Path, config: Path) -> tuple[nn.Module, ClipInfo]:
    try:
        text = json.loads(config.read_text())
        cfg, preprocess = text["model_cfg"], text["preprocess_cfg"]
        info = ClipInfo(
            model,
            cfg,
            tuple(preprocess["mean"]),
            tuple(preprocess["std"]),
            preprocess.get("resize_mode", "shortest"),
        )
        build = open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP
        clip = build(**{k: v for k, v in cfg.items() if k != "custom_text"})
        clip.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    except Exception as error:  # bad JSON, missing key, cut file, tensors of another architecture
        first = " ".join(str(error).split())[:200]
        raise ValueError(
            f"CLIP {model}: {weights.name} and {config.name} do not make a model "
            f"({type(error).__name__}: {first})"
        ) from None
    return clip.eval(), info


def encode_visual(
    visual: nn.Module, images: Tensor, local: bool = False
) -> tuple[Tensor, Tensor | None]:
    """One pass through an open_clip image tower.

    Args: images, already normalised for CLIP (B, 3, H, W); local: also return the patch tokens.
    Returns:
        global token (B, d): for CLIP the class token after the final LayerNorm and projection,
        *not* L2-normalised; for SigLIP's timm tower the attention-pooled vector;
        patch tokens (B, P, p) of the last layer, or None.
    """
    if not local:
        return visual(images), None
    if hasattr(visual, "trunk"):
        tokens = visual.trunk.forward_features(images)  # (B, P, p), after any prefix tokens
        patches = tokens[:, visual.trunk.num_prefix_tokens :]
        return visual.head(visual.trunk.forward_head(tokens)), patches
    before, visual.output_tokens = visual.output_tokens, True
    try:
        return visual(images)
    finally:
        visual.output_tokens = before
