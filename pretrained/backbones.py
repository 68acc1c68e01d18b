"""The backbones: CLIP models by name, file or folder, and one way to look through their eyes.

The paper enhances six of them (Tab. 1): OpenAI's and MetaCLIP's ViTs, whose [CLS] token is the
condition, and SigLIP's, which have none and give an attention-pooled vector instead (Sec. 5.4).
open_clip builds all; this file makes sure that the architecture, the activation above all, is
always known together with the weights, and brings both kinds of tower behind one function.

Letters: B images, H W height and width, d width of the global token, P patch tokens of width p.
This module imports nothing of this project: copy it freely.
"""

import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHT_FILES = {".safetensors", ".pt", ".pth", ".bin"}


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
    resize_mode: str = "shortest"
    """for evaluation; SigLIP squashes instead of cropping"""
    words: tuple[str, ...] = ()
    """the vocabulary of a CLIP that reads whole words; open_clip's own need none"""

    @property
    def image_size(self) -> int:
        return self.model_cfg["vision_cfg"]["image_size"]

    def open_clip_config(self) -> dict:
        """The content of open_clip_config.json, which `local-dir:` folders carry."""
        about = {
            "model_cfg": self.model_cfg,
            "preprocess_cfg": {
                "mean": list(self.mean),
                "std": list(self.std),
                "resize_mode": self.resize_mode,
            },
        }
        return about | ({"words": list(self.words)} if self.words else {})

    @classmethod
    def from_config(cls, name: str, about: dict) -> "ClipInfo":
        """The reverse. Raises: KeyError for a key that is missing."""
        preprocess = about["preprocess_cfg"]
        return cls(
            name,
            about["model_cfg"],
            tuple(preprocess["mean"]),
            tuple(preprocess["std"]),
            preprocess.get("resize_mode", "shortest"),
            tuple(about.get("words", ())),
        )


def load_clip(model: str) -> tuple[nn.Module, ClipInfo]:
    """A CLIP on the CPU, in float32 and eval mode, by one of four spellings.

    * ``FOLDER`` with open_clip_config.json and open_clip_model.safetensors (an enhanced model);
    * ``FILE.safetensors`` with FILE.json, an open_clip config, beside it (the toy weights);
    * ``NAME:TAG``, open_clip's own, e.g. ``ViT-L-14-quickgelu:openai``;
    * ``NAME:FILE``, that architecture with weights from a safetensors or torch file.

    Raises: FileNotFoundError, or ValueError saying which part of `model` is not known or not sound.
    """
    info, weights = describe_clip(model)
    name, _, tag = model.partition(":")
    if weights is not None:
        if tag and info.name == name and "timm_model_name" not in info.model_cfg["vision_cfg"]:
            # NAME:FILE. Nothing in the file can tell. OpenAI's, MetaCLIP's, DFN's are QuickGELU.
            activation = "QuickGELU" if info.model_cfg.get("quick_gelu") else "GELU"
            print(
                f"CLIP {model}: built with {activation}, as {name} says; a weights file cannot "
                "tell which it was trained with",
                file=sys.stderr,
            )
        clip = build_clip(info)
        _fill(clip, _read(model, weights), f"CLIP {model}: {weights.name}")
        return clip.eval(), info
    try:
        clip = open_clip.create_model(name, pretrained=tag, weights_only=True)
    except Exception as error:  # open_clip raises many kinds: no network, broken download, …
        raise ValueError(
            f"CLIP {model!r}: open_clip could not load it ({str(error).splitlines()[0]})"
        ) from None
    return clip.eval(), info


def describe_clip(model: str) -> tuple[ClipInfo, Path | None]:
    """What a model will be, before any weights are read, and the file that holds them (None:
    open_clip downloads it). Spellings and errors are those of `load_clip`."""
    path, (name, _, tag) = Path(model), model.partition(":")
    named = name in open_clip.list_models()
    if not named and (path.is_dir() or path.suffix == ".safetensors"):
        weights = path / "open_clip_model.safetensors" if path.is_dir() else path
        config = path / "open_clip_config.json" if path.is_dir() else path.with_suffix(".json")
        if path.is_dir() and not config.is_file() and (path / "config.json").is_file():
            raise ValueError(
                f"CLIP {model} is in transformers' layout: convert it with "
                f"`python export_hf.py --model {model} --out FOLDER`"
            )
        for file in (weights, config):
            if not file.is_file():
                raise FileNotFoundError(
                    f"CLIP {model}: {file} is missing; weights need their architecture beside "
                    "them (a folder with open_clip_config.json, or FILE.json, or NAME:FILE)"
                )
        return _read_config(model, config), weights
    if not named:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1)
        if "/" in model:
            what = "a file, but not .safetensors" if path.is_file() else "no such folder or file"
            raise ValueError(f"CLIP {model!r}: {what}")
        raise ValueError(
            f"CLIP {model!r}: not a folder, not a .safetensors file, and {name!r} is not an "
            f"open_clip model name; {f'did you mean {near[0]}' if near else 'try ViT-B-32:openai'}?"
        )
    if not tag:
        raise ValueError(f"CLIP {model!r}: add the weights, as in {name}:openai or {name}:FILE")
    model_cfg, file = open_clip.get_model_config(name), Path(tag)
    quick = model_cfg.get("quick_gelu", False)
    if file.suffix in WEIGHT_FILES or file.is_file():
        if not file.is_file():
            raise FileNotFoundError(f"CLIP {model!r}: no weights file {file}")
        known, weights = {}, file
    else:
        known, weights = open_clip.get_pretrained_cfg(name, tag), None
        if not known:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ValueError(f"CLIP {model!r}: open_clip has no weights {tag!r} of it, only {tags}")
        if known.get("quick_gelu", False) != quick:
            trained = "QuickGELU" if known.get("quick_gelu") else "GELU"
            other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
            raise ValueError(
                f"CLIP {model!r}: {tag}'s weights were trained with {trained}, and {name} builds "
                f"the other activation; use {other}:{tag}"
            )
    siglip = "siglip" in str(model_cfg["vision_cfg"].get("timm_model_name", ""))
    info = ClipInfo(
        name,
        model_cfg,
        tuple(known.get("mean") or ((0.5,) * 3 if siglip else open_clip.OPENAI_DATASET_MEAN)),
        tuple(known.get("std") or ((0.5,) * 3 if siglip else open_clip.OPENAI_DATASET_STD)),
        known.get("resize_mode") or ("squash" if siglip else "shortest"),
    )
    return info, weights


def build_clip(info: ClipInfo) -> nn.Module:
    """The architecture with whatever weights its modules start from."""
    build = open_clip.CustomTextCLIP if info.model_cfg.get("custom_text") else open_clip.CLIP
    return build(**{k: v for k, v in info.model_cfg.items() if k != "custom_text"})


def _read_config(model: str, file: Path) -> ClipInfo:
    try:
        info = ClipInfo.from_config(model, json.loads(file.read_text()))
        with torch.device("meta"):
            build_clip(info)
        return info
    except Exception as error:  # bad JSON, a missing key, an unknown layer
        raise ValueError(
            f"CLIP {model}: {file.name} describes no model ({_first_line(error)})"
        ) from None


def _read(model: str, file: Path) -> dict[str, Tensor]:
    """Tensors of a weights file. Torch files are unpickled with weights_only."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds
        raise ValueError(
            f"CLIP {model}: {file} cannot be read as tensors alone ({_first_line(error)}); of "
            "OpenAI's own archives take the tag instead, as in ViT-L-14-quickgelu:openai"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    # DistributedDataParallel's prefix, as training scripts leave it.
    return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def _fill(clip: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """A file's tensors in the place of `clip`'s own, strictly."""
    own = clip.state_dict().keys()
    # Old files carry a buffer of position ids that open_clip no longer has.
    state = {k: v.float() for k, v in state.items() if k in own or not k.endswith("position_ids")}
    try:
        clip.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:  # it names what is missing, left over and of another shape
        first = " ".join(str(error).partition("\n")[2].split())[:300]
        raise ValueError(f"{what} does not fit this architecture: {first} …") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


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
