"""The backbones: CLIP models by name, file or folder, and one way to look through their eyes.

The paper enhances six of them (Tab. 1): OpenAI's and MetaCLIP's ViTs, whose [CLS] token is the
condition, and SigLIP's, which have none and give an attention-pooled vector instead (Sec. 5.4).
open_clip builds these and some hundred others; this file makes sure that the architecture, the
activation above all, is always known together with the weights, and brings all towers behind one
function. What a tower must have is a transformer over patch tokens, and one global vector made of
them (`encode_visual`). Convolutional towers have none: they can be judged, but not enhanced.

Letters: B images, H W height and width, d width of the global token, P patch tokens of width p.
This module imports nothing of this project: copy it freely.
"""

import difflib
import functools
import json
import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHT_FILES = {".safetensors", ".pt", ".pth", ".bin"}
# What a model's description may pass on to open_clip, timm and transformers. They take more, and
# some of it runs programs or opens other files: `trust_remote_code` runs the Python beside a
# tokenizer, timm reads "local-dir:…" and "hf-hub:…". So what is needed is listed, and the rest is
# refused by name. (Other keys are checked by open_clip, which knows all of its own.)
ALLOWED = {
    "tokenizer_kwargs": {"clean", "strip_sep_token", "language"},
    "act_kwargs": {"approximate"},
    "norm_kwargs": {"eps"},
}
PLAIN = re.compile(r"(\w[\w.-]*/)?[\w.-]*")  # any text, as in google/mt5-base: no path, no address
NUMBERS = {
    field.name
    for kind in (open_clip.model.CLIPVisionCfg, open_clip.model.CLIPTextCfg)
    for field in fields(kind)
    if type(field.default) in (int, float)
} | {"embed_dim"}
LARGEST, DEEPEST = 10_000_000, 1000  # of any number, and of the layers: a false one would hang


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
    interpolation: str = "bicubic"
    """for evaluation; CLIPA, MobileCLIP and Perception Encoder resize bilinearly"""
    words: tuple[str, ...] = ()
    """the vocabulary of a CLIP that reads whole words; open_clip's own need none"""

    @property
    def image_size(self) -> int:
        """H = W. Raises: ValueError for a tower whose images are no squares."""
        size = self.model_cfg["vision_cfg"].get("image_size", 224)  # open_clip's own default
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(
                f"CLIP {self.name} looks at images of {height} × {width} pixels; here images are "
                "square, since one crop feeds CLIP and the tokenizer"
            )
        return height

    def open_clip_config(self) -> dict:
        """The content of open_clip_config.json, which `local-dir:` folders carry."""
        preprocess = {
            "mean": list(self.mean),
            "std": list(self.std),
            "resize_mode": self.resize_mode,
        }
        # Bicubic is what open_clip takes where nothing is said. Checkpoints compare this content,
        # and those from before this field say nothing.
        if self.interpolation != "bicubic":
            preprocess["interpolation"] = self.interpolation
        about = {"model_cfg": self.model_cfg, "preprocess_cfg": preprocess}
        return about | ({"words": list(self.words)} if self.words else {})

    @classmethod
    def from_config(cls, name: str, about: dict) -> "ClipInfo":
        """The reverse, and the one way in for what a file says of a model.

        Raises: KeyError for a key that is missing, ValueError for one that may not say what it
            does.
        """
        preprocess, words = about["preprocess_cfg"], about.get("words", [])
        model_cfg = about["model_cfg"]
        check_model_cfg(model_cfg)
        for key, lowest in (("mean", -LARGEST), ("std", 1e-6)):
            values = preprocess[key]
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise ValueError(f"preprocess_cfg.{key}: expected three numbers")
            if not all(_is_number(v) and lowest <= v <= LARGEST for v in values):
                raise ValueError(f"preprocess_cfg.{key}: {values!r:.60} are no {key} of pictures")
        resize = preprocess.get("resize_mode", "shortest")
        kind = preprocess.get("interpolation", "bicubic")
        if resize not in ("shortest", "longest", "squash"):
            raise ValueError(f"preprocess_cfg.resize_mode: {resize!r:.60} is unknown")
        if kind not in ("bicubic", "bilinear", "random"):
            raise ValueError(f"preprocess_cfg.interpolation: {kind!r:.60} is unknown")
        if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
            raise ValueError("words: expected a list of texts")
        mean, std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        return cls(name, model_cfg, mean, std, resize, kind, tuple(words))


def check_model_cfg(about: dict, path: str = "model_cfg") -> None:
    """May this description of an architecture be handed to open_clip? See ALLOWED.

    Raises: ValueError naming the first key that may not say what it does.
    """
    if not isinstance(about, dict):
        raise ValueError(f"{path}: expected an object")
    for key, value in about.items():
        here = f"{path}.{key}"
        if isinstance(value, dict) or value is not None and key.endswith(("_cfg", "_kwargs")):
            check_model_cfg(value, here)
            if wrong := min(value.keys() - ALLOWED.get(key, value.keys()), default=None):
                only = ", ".join(sorted(ALLOWED[key]))
                raise ValueError(f"{here}.{wrong}: not allowed here, only {only}")
        if key == "timm_model_pretrained" and value:
            raise ValueError(f"{here}: must be false, for the weights come with the model")
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, str) and not PLAIN.fullmatch(item):
                raise ValueError(f"{here}: {item!r:.60} is no plain name")
            most = DEEPEST if key == "layers" else LARGEST
            if isinstance(item, (int, float)) and not abs(item) <= most:  # nan, too
                raise ValueError(f"{here}: {item!r:.60} is out of range")
            if isinstance(item, bool) and key in NUMBERS:  # Python would take true for 1
                raise ValueError(f"{here}: expected a number, found {item}")


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


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
        state, what = _read(model, weights), f"CLIP {model}: {weights.name}"
        if info.name == model:
            # A file's own description: a false size should be told by the file's tensors, before
            # memory is asked for.
            with torch.device("meta"):
                _fill(build_clip(info), state, what)
        clip = build_clip(info)
        _fill(clip, state, what)
        check_finite(clip.state_dict(), what)
        return clip.eval(), info
    try:
        clip = open_clip.create_model(name, pretrained=tag, weights_only=True)
    except Exception as error:  # open_clip raises many kinds: no network, broken download, …
        raise ValueError(
            f"CLIP {model!r}: open_clip could not load it ({_first_line(error)})"
        ) from None
    check_finite(clip.state_dict(), f"CLIP {model!r}")
    return _tokens_first(clip).eval(), info


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
        known, weights = _agreed(name), file
    else:
        known, weights = open_clip.get_pretrained_cfg(name, tag), None
        if not known:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ValueError(f"CLIP {model!r}: open_clip has no weights {tag!r} of it, only {tags}")
        other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        # Where no other name exists (roberta-ViT-B-32), the weights were trained as this one builds
        # them, and it is the remark at the weights that is missing.
        if known.get("quick_gelu", False) != quick and other != name:
            trained = "QuickGELU" if known.get("quick_gelu") else "GELU"
            raise ValueError(
                f"CLIP {model!r}: {tag}'s weights were trained with {trained}, and {name} builds "
                f"the other activation; use {other}:{tag}"
            )
    info = ClipInfo(
        name,
        model_cfg,
        tuple(known.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        tuple(known.get("std") or open_clip.OPENAI_DATASET_STD),
        known.get("resize_mode") or "shortest",
        known.get("interpolation") or "bicubic",
    )
    return info, weights


def _agreed(name: str) -> dict:
    """The preprocessing that all published weights of an architecture have in common: the best
    guess for a file that does not say how its images were made (all SigLIPs squash, all CLIPAs
    resize bilinearly)."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    keys = ("mean", "std", "resize_mode", "interpolation")
    first = {key: known[0].get(key) for key in keys} if known else {}
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in known)}


def build_clip(info: ClipInfo) -> nn.Module:
    """The architecture with whatever weights its modules start from."""
    return _tokens_first(_built(info))


def _tokens_first(clip: nn.Module) -> nn.Module:
    """Tokens first, images second, from the first block to the last. With images first, PyTorch's
    attention turns them round in every block, and of a tensor that lies so and needs no gradient it
    makes as many small products with the weights as there are tokens, not one: a frozen tower took
    1.3 times as long."""
    for module in clip.visual.modules():
        if isinstance(module, open_clip.transformer.Transformer):
            for part in (module, *(block.attn for block in module.resblocks)):
                part.batch_first = False
    return clip


def _built(info: ClipInfo) -> nn.Module:
    """open_clip's class for it. A text tower out of transformers (roberta-ViT-B-32, mt5, nllb, …)
    needs that library and its configuration from the hub. Without them it is carried along, not
    built (`CarriedText`)."""
    config = {**info.model_cfg}
    custom, text = config.pop("custom_text", False), config["text_cfg"]
    foreign = text.get("hf_model_name")
    if "multimodal_cfg" in config:
        build = open_clip.CoCa
    else:
        build = open_clip.CustomTextCLIP if custom or foreign else open_clip.CLIP
    if not foreign:
        return build(**config)
    # Its weights come with CLIP's: nothing is to be downloaded for the tower alone.
    config["text_cfg"] = {**text, "hf_model_pretrained": False}
    if why := _unavailable(foreign):
        small = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 1}
        clip = build(**{**config, "text_cfg": small})
        clip.text = CarriedText(f"CLIP {info.name}: the text tower is transformers' {foreign}", why)
        return clip
    return build(**config)


@functools.cache
def _unavailable(name: str) -> str:
    """Why a text tower of transformers cannot be built here; "" if it can. Only files on this
    machine count: training needs none of it, and should wait for no network."""
    try:
        from transformers import AutoConfig

        # Not asked, transformers would ask the user whether the tower's own Python may run.
        found = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        if hasattr(found, "auto_map"):
            return "it brings code of its own, which is not run"
    except Exception:  # not installed, not fetched, no such model: many kinds
        return (
            'pip install transformers, and fetch its configuration once: python -c "import '
            f"transformers; transformers.AutoConfig.from_pretrained('{name}')\""
        )
    return ""


class CarriedText(nn.Module):
    """A text tower that could not be built: its tensors, kept to be written again.

    GenHancer changes the image tower alone. To train it and to write the enhanced model, the text
    tower must be carried from one file to the other, and nothing has to know what it computes.
    """

    def __init__(self, what: str, why: str):
        super().__init__()
        self.what, self.why, self.tensors = what, why, {}

    def forward(self, text: Tensor) -> Tensor:
        """Raises: ValueError, always."""
        raise ValueError(f"{self.what}, which is not there to be built ({self.why})")

    # The two hooks of nn.Module through which a state dict goes; `prefix` is "text." here.
    def _load_from_state_dict(self, state_dict, prefix, *others):
        mine = [name for name in state_dict if name.startswith(prefix)]
        self.tensors = {name.removeprefix(prefix): state_dict[name] for name in mine}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination.update({prefix + name: tensor for name, tensor in self.tensors.items()})


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
    pairs = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, Tensor)}
    # DistributedDataParallel's prefix, as training scripts leave it.
    return {k.removeprefix("module."): v for k, v in tensors.items()}


def check_finite(state: dict[str, Tensor], what: str) -> None:
    """Raises: ValueError naming the first tensor that holds NaN or infinity: every feature would be
    NaN, and the run would say so an hour later, of another file."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: tensor {name} holds numbers that are not finite")


def _fill(clip: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """A file's tensors in the place of `clip`'s own, strictly, and in float32."""
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
        global token (B, d), as the tower gives it to be compared with texts, *not* L2-normalised:
        the class token after the final LayerNorm and projection, an attention-pooled vector
        (SigLIP, Perception Encoder, CoCa) or the mean of the patches (CLIPA, ViTamin);
        patch tokens (B, P, p) of the last layer, or None.
    Raises: ValueError for a tower without patch tokens.
    """
    trunk = getattr(visual, "trunk", None)  # a timm model's
    if trunk is None and hasattr(visual, "transformer"):
        return _encode_vit(visual, images, local)
    if not hasattr(trunk, "num_prefix_tokens"):
        # ResNet, ConvNeXt, FastViT, Swin: maps that shrink from stage to stage, and pooling.
        kind = type(trunk or visual).__name__
        raise ValueError(
            f"this CLIP's image tower ({kind}) is no ViT: it has neither patch tokens nor a class "
            "token or pool over them to make the condition of; take a ViT, such as "
            "ViT-B-16-quickgelu:openai"
        )
    if not local:
        return visual(images), None
    tokens = trunk.forward_features(images)  # (B, prefix + P, p); prefix: class token, registers
    return visual.head(trunk.forward_head(tokens)), tokens[:, trunk.num_prefix_tokens :]


def _encode_vit(visual: nn.Module, images: Tensor, local: bool) -> tuple[Tensor, Tensor | None]:
    """`encode_visual` for open_clip's own ViTs."""
    before, visual.output_tokens = visual.output_tokens, local
    kept = []
    # An attentional pool (CoCa) hands out its 255 other queries for tokens. Patches have a place in
    # the image: they are what goes into the pool, after the class token.
    pool = visual.attn_pool if local else None
    hook = pool and pool.register_forward_pre_hook(lambda module, inputs: kept.extend(inputs))
    try:
        found = visual(images)
    finally:
        visual.output_tokens = before
        if hook:
            hook.remove()
    if not local:
        return found, None
    token, patches = found  # (B, d), (B, P, p)
    return token, kept[0][:, 1:] if kept else patches
