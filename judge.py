"""A CLIP under examination: any spelling of a model, its pictures and texts as unit vectors.

Every evaluation asks the same of a model: encode these pictures, encode these texts, in float32 and
with the preprocessing that the model was trained with. That takes minutes on real data, and the
answer is the same tomorrow; so features are kept on the disk, under a name made of the weights,
the preprocessing and the inputs. A second call on the same weights is quick, a changed weight or
picture is never mistaken for the old one.

Letters: K pictures or texts, d width of the joint space, D width of the tower.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import export_hf
import toyworld
from backbones import ClipInfo, build_clip, load_clip
from checkpoints import fingerprint, save_tensors

Picture = Path | str | np.ndarray


@dataclass
class Judge:
    """One CLIP with its tokenizer and preprocessing, in float32.

    Args: cache: folder for features; None keeps none.
    """

    name: str
    clip: torch.nn.Module
    info: ClipInfo
    device: torch.device
    cache: Path | None = None
    _weights: str = field(default="", init=False)

    def __post_init__(self):
        self.clip = self.clip.to(self.device).float().eval()
        self.transform = image_transform(
            self.info.image_size,
            is_train=False,
            mean=self.info.mean,
            std=self.info.std,
            resize_mode=self.info.resize_mode,
        )
        self.tokenizer = find_tokenizer(self.info)

    def images(self, pictures: list[Picture], batch: int = 64) -> Tensor:
        """Pictures, uint8 arrays (H, W, 3) or files → unit vectors (K, d).

        Raises: ValueError naming a picture that cannot be read.
        """

        def encode(part: list[Picture]) -> Tensor:
            stacked = torch.stack([self.transform(open_picture(p)) for p in part])
            return self.clip.encode_image(stacked.to(self.device), normalize=True)

        return self._remembered("image", pictures, encode, batch)

    def texts(self, texts: list[str], batch: int = 256) -> Tensor:
        """Texts → unit vectors (K, d)."""

        def encode(part: list[str]) -> Tensor:
            return self.clip.encode_text(self.tokenizer(part).to(self.device), normalize=True)

        return self._remembered("text", texts, encode, batch)

    @torch.no_grad()
    def layers(self, pictures: list[Picture], batch: int = 64) -> list[Tensor]:
        """Mean token of the image tower after each block, one (K, D) a layer."""
        visual = self.clip.visual
        found: list[list[Tensor]] = []
        towers = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks

        def keep(layer: int):
            def hook(module, inputs, output):
                found[layer].append(output.mean(1).float().cpu())

            return hook

        found = [[] for _ in towers]
        hooks = [b.register_forward_hook(keep(i)) for i, b in enumerate(towers)]
        try:
            for start in range(0, len(pictures), batch):
                part = [self.transform(open_picture(p)) for p in pictures[start : start + batch]]
                self.clip.encode_image(torch.stack(part).to(self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(parts) for parts in found]

    @torch.no_grad()
    def _remembered(self, kind: str, inputs: list, encode, batch: int) -> Tensor:
        file = self.cache and self.cache / f"{kind}-{self._digest(kind, inputs)}.safetensors"
        if file and file.is_file():
            try:
                return load_file(file)["features"]
            except Exception:  # a damaged cache is no cache
                file.unlink()
        parts = []
        starts = range(0, len(inputs), batch)
        for start in tqdm(
            starts, f"{self.name}: {kind}s", leave=False, disable=len(starts) < 4, unit="batch"
        ):
            parts.append(encode(inputs[start : start + batch]).float().cpu())
        features = torch.cat(parts)
        if file:
            save_tensors({"features": features}, file)
        return features

    def _digest(self, kind: str, inputs: list) -> str:
        """What the features depend on, as 24 letters."""
        self._weights = self._weights or fingerprint(self.clip)
        about = repr((self.info.open_clip_config(), torch.__version__, self.device.type))
        digest = hashlib.sha256(f"{kind} {self._weights} {about}".encode())
        for item in inputs:
            if kind == "text":
                digest.update(item.encode() + b"\0")
            elif isinstance(item, np.ndarray):
                digest.update(repr(item.shape).encode() + item.tobytes())
            else:
                status = os.stat(item)
                digest.update(f"{item} {status.st_size} {status.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:24]


def open_picture(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    try:
        with Image.open(picture) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"picture {picture} cannot be read ({error})") from None


def find_tokenizer(info: ClipInfo):
    """The tokenizer that a text tower was trained with."""
    # The toy world's tokenizer is recognised by the size of its vocabulary: CLIPs have tens of
    # thousands of tokens, the toy a few dozen.
    text, toy = info.model_cfg["text_cfg"], toyworld.ToyTokenizer()
    if text.get("vocab_size") == toy.vocab_size:
        return toy
    if name := text.get("hf_tokenizer_name"):
        try:
            return open_clip.tokenizer.HFTokenizer(
                name,
                context_length=text.get("context_length", 77),
                **text.get("tokenizer_kwargs", {}),
            )
        except Exception as error:  # not installed, or no network: many kinds
            raise ValueError(
                f"model {info.name}: its tokenizer {name} could not be loaded; it needs "
                f"`pip install transformers sentencepiece` and its files "
                f"({str(error).splitlines()[0]})"
            ) from None
    return open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))


# ------------------------------------------------------------------------------------------------
# Models by any spelling
# ------------------------------------------------------------------------------------------------
def load_judges(models: list[str], device: torch.device, cache: Path | None) -> list[Judge]:
    """One judge a model, with names that tell them apart.

    Args: models: spellings of `backbones.load_clip`, or folders in transformers' layout.
    Raises: ValueError or FileNotFoundError naming the model.
    """
    if len(set(models)) < len(models):
        raise ValueError("--model: the same model is named twice")
    names = [short_name(model) for model in models]
    if len(set(names)) < len(names):
        names = models
    return [Judge(n, *_load(m), device, cache) for n, m in zip(names, models, strict=True)]


def _load(model: str) -> tuple[torch.nn.Module, ClipInfo]:
    folder = Path(model)
    if (folder / "open_clip_config.json").is_file() or not (folder / "config.json").is_file():
        return load_clip(model)
    about, state, notes = export_hf.read_transformers(folder)
    for note in notes:
        print(note)
    preprocess = about["preprocess_cfg"]
    info = ClipInfo(
        model,
        about["model_cfg"],
        tuple(preprocess["mean"]),
        tuple(preprocess["std"]),
        preprocess.get("resize_mode", "shortest"),
    )
    clip = build_clip(info)
    clip.load_state_dict(state)
    return clip.eval(), info


def short_name(model: str) -> str:
    """What a table calls a model: runs/demo/enhanced → demo/enhanced, the toy CLIP → original."""
    path = Path(model)
    if path.resolve() == toyworld.TOY_DIR / "clip.safetensors":
        return "original"
    if path.is_dir():
        return "/".join(path.resolve().parts[-2:])
    return path.stem if path.suffix == ".safetensors" and ":" not in model else model


def default_models(runs: Path) -> list[str]:
    """The toy CLIP and the enhanced model written last. Raises: FileNotFoundError where there is
    none."""
    found = sorted(
        runs.glob("*/enhanced/open_clip_model.safetensors"), key=lambda p: p.stat().st_mtime
    )
    if not found:
        raise FileNotFoundError(
            f"no enhanced model in {runs}/*/enhanced: run python train.py first, or name --model"
        )
    return [str(toyworld.TOY_DIR / "clip.safetensors"), str(found[-1].parent)]


def ridge_probe(features: Tensor, labels: Tensor, test: Tensor, strength: float = 1e-2) -> Tensor:
    """A linear probe in closed form: which class does ridge regression on frozen features see?

    It tells whether the information is there, whatever the text tower makes of it.

    Args: features (K, d) and labels (K,) to fit; test (T, d). Returns: classes (T,).
    """
    train, classes = features.double(), int(labels.max()) + 1
    center, target = train.mean(0), F.one_hot(labels, classes).double()
    train = train - center
    # weights = (XᵀX + λI)⁻¹ Xᵀ Y, one column per class
    eye = torch.eye(train.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(
        train.T @ train + strength * eye, train.T @ (target - target.mean(0))
    )  # (d, classes)
    return ((test.double() - center) @ weights + target.mean(0)).argmax(1)
