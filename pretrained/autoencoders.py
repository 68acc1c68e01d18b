"""The frozen tokenizers: where the denoiser's targets come from.

GenHancer never reconstructs pixels. The continuous denoiser works on the latents of a pretrained
VAE (Alg. 1, line 3: ``x̃_1 = v_ae(x)``), the discrete one on the codebook indices of a pretrained
VQ-GAN (Alg. 2, line 3: ``x̃, s = vq-gan(x)``). Nothing is trained here: these are two architectures
under their *published* module names, so that FLUX.1's ``ae.safetensors`` (244 tensors, 83.8 M
parameters) and taming-transformers' f16 VQ-GANs load with nothing missing and nothing left over.

Both share one convolutional encoder and decoder, of the LDM / VQ-GAN family; where its members
differ, an argument says so. Other architectures are plugged in by `register`.

    encoder:  conv_in → down.0 … down.(n-1) → mid (block, attention, block) → norm, swish, conv_out
    decoder:  conv_in → mid → up.(n-1) … up.0 → norm, swish, conv_out
    VAE:      encoder → (mean, log-variance) → sample → decoder
    VQ-GAN:   encoder → quant_conv → nearest row of the codebook → post_quant_conv → decoder

Conventions, stated once: images enter in **[-1, 1]**. VAE latents leave *normalised*,
``z = (latent − shift) · scale``, near zero mean and unit variance, because rectified flow mixes
them with unit Gaussian noise (Eq. 1) and its timestep schedule presumes comparable sizes.

Letters: B batch, H W image height and width, C latent channels, h w latent height and width
(H/f, W/f for a downsampling factor f), N = h·w tokens, K codes, E width of a code, R rows of any
kind. This module imports nothing of this project: copy it freely.
"""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an encoder/decoder pair. The defaults are FLUX.1's VAE."""

    base_channels: int = 128
    """channels at full resolution ("ch")"""
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """channels per level, in units of base_channels; n levels downsample by 2^(n-1)"""
    blocks_per_level: int = 2
    """residual blocks per level (the decoder has one more)"""
    latent_channels: int = 16
    """C"""
    groups: int = 32
    """groups of every GroupNorm"""
    attention_levels: tuple[int, ...] = ()
    """levels with an attention after each block (none in FLUX's VAE, the last in taming's f16)"""
    shift: float = 0.1159
    """VAE: mean of raw latents over the training images, subtracted"""
    scale: float = 0.3611
    """VAE: one over their standard deviation, multiplied"""

    def __post_init__(self):
        """Such a description may come from a stranger's file: one of 10¹² blocks would hang."""
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            numbers, least = (value, 0) if kind is tuple else ((value,), 1 if kind is int else -1e6)
            if not all(type(n) in (int, kind) and least <= n <= 1e6 for n in numbers):  # nan, too
                raise ValueError(f"autoencoder: {field.name} {value!r:.60} cannot be")
        if not 0 < self.blocks_per_level * len(self.channel_multipliers) <= 1000:
            raise ValueError("autoencoder: no levels, or more than a thousand blocks")
        for times in self.channel_multipliers:
            if self.base_channels * times % self.groups:
                width = f"{self.base_channels} base_channels × {times}"
                raise ValueError(f"autoencoder: {width} do not split into {self.groups} groups")

    @property
    def downsampling(self) -> int:
        """f: pixels per latent cell along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class VQGANConfig(AutoencoderConfig):
    """The same with a codebook. The defaults are taming's f16, trained on ImageNet at 256 px.

    Its attention sits "at resolution 16", counted from the nominal 256 px: the last of five levels.
    """

    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    latent_channels: int = 256
    attention_levels: tuple[int, ...] = (4,)
    codes: int = 1024
    """K: 1024 or 16384 were published"""
    code_width: int = 256
    """E"""


FLUX_VAE = AutoencoderConfig()
TAMING_VQGAN = VQGANConfig()


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------
class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))). (B, c_in, h, w) → (B, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # The name exists in published weights only where the width changes: no identity layer here.
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, h, w)
        hidden = self.conv2(F.silu(self.norm2(hidden)))  # (B, c_out, h, w)
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all cells: the only place where far apart cells meet."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # 1×1 convolutions rather than Linear layers: that is how the weights were published.
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h·w, c)
        mixed = rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halve the resolution. The family pads right and below only; weights expect it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, c, h, w) → (B, c, h/2, w/2)


class Upsample(nn.Module):
    """Double the resolution: repeat each cell, then smooth."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, c, 2h, 2w)


class Level(nn.Module):
    """One resolution: residual blocks, optional attentions, optional change of resolution."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, attention: bool):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, c_out, groups) for a in widths[:-1])
        self.attn = nn.ModuleList(
            AttentionBlock(c_out, groups) for _ in range(blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] → feature maps (B, out_channels, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig, out_channels: int):
        super().__init__()
        base, groups = config.base_channels, config.groups
        widths = [base * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([base] + widths[:-1], widths, strict=True)):
            attention = i in config.attention_levels
            level = Level(c_in, c_out, config.blocks_per_level, groups, attention)
            if i < len(widths) - 1:
                level.downsample = Downsample(c_out)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.to(self.conv_in.weight.dtype))  # (B, base, H, W)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)  # halves h and w
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # (B, out, H/f, W/f)


class Decoder(nn.Module):
    """Latents (B, C, h, w) → images (B, 3, f·h, f·w), about [-1, 1]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        base, groups = config.base_channels, config.groups
        widths = [base * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        # `up` is indexed by resolution, not by order of use: up.0 is full size and comes last.
        levels = []
        for i, c_out in enumerate(widths):
            c_in = widths[min(i + 1, len(widths) - 1)]
            attention = i in config.attention_levels
            level = Level(c_in, c_out, config.blocks_per_level + 1, groups, attention)
            if i > 0:
                level.upsample = Upsample(c_out)
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, base * config.channel_multipliers[0], eps=1e-6)
        self.conv_out = nn.Conv2d(base * config.channel_multipliers[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z.to(self.conv_in.weight.dtype)))  # (B, c, h, w)
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)  # doubles h and w
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


# ------------------------------------------------------------------------------------------------
# The VAE
# ------------------------------------------------------------------------------------------------
class VAE(nn.Module):
    """The continuous tokenizer v_ae of Alg. 1, line 3."""

    def __init__(self, config: AutoencoderConfig = FLUX_VAE):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.latent_channels)  # a mean and a log-variance each
        self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] → raw posterior mean and log-variance, (B, C, h, w) each;
        float32 also where the weights are halves, since an exponential follows."""
        found = self.encoder(images)  # (B, 2·C, h, w)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        mean, log_variance = found.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → normalised latents (B, C, h, w); see `latents`."""
        return self.latents(*self.moments(images), noise)

    def latents(self, mean: Tensor, log_variance: Tensor, noise: Tensor | None = None) -> Tensor:
        """Raw moments → normalised latents; apart from `encode` so that moments can be cached. With
        unit Gaussian `noise` (B, C, h, w) the posterior is sampled, as the official code does."""
        raw = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return (raw - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) → images (B, 3, f·h, f·w), about [-1, 1]."""
        return self.decoder(latents / self.config.scale + self.config.shift)


# ------------------------------------------------------------------------------------------------
# The VQ-GAN
# ------------------------------------------------------------------------------------------------
def nearest_codes(vectors: Tensor, codebook: Tensor, rows: int = 1024) -> Tensor:
    """Index of the codebook row nearest to each vector. (R, E), (K, E) → (R,).

    |z − e|² = |z|² − 2 z·e + |e|², and |z|² is the same for all e: one matrix product decides. It
    is made `rows` at a time: for 16 images of 384 px and K = 16384 all would need 604 MB.
    """
    # TF32 and bf16 do not tell near codes apart. (The meta device of a plan knows no autocast.)
    kind, allowed = vectors.device.type, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext()
    with exact:
        half_squares = 0.5 * codebook.square().sum(1)  # (K,)
        products = (torch.addmm(half_squares, x, codebook.T, alpha=-1) for x in vectors.split(rows))
        pieces = [product.argmin(1) for product in products]  # (rows,) each
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return torch.cat(pieces)


class VQGAN(nn.Module):
    """The discrete tokenizer vq-gan of Alg. 2, line 3: an image becomes N integers."""

    def __init__(self, config: VQGANConfig = TAMING_VQGAN):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.latent_channels)
        self.decoder = Decoder(config)
        # K code vectors, under the name that taming gave them: ``quantize.embedding.weight``
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codes, config.code_width)})
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """(K, E)"""
        return self.quantize["embedding"].weight

    def indices(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → codebook indices (B, N), row by row from top left."""
        continuous = self.quant_conv(self.encoder(images))  # (B, E, h, w)
        vectors = rearrange(continuous, "b e h w -> (b h w) e")  # (B·N, E)
        return nearest_codes(vectors.float(), self.codebook.float()).view(len(images), -1)  # (B, N)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, N) of a square grid → images (B, 3, f·h, f·w), about [-1, 1]."""
        codes = self.codebook[indices]  # (B, N, E)
        grid = rearrange(codes, "b (h w) e -> b e h w", h=math.isqrt(indices.shape[1]))
        return self.decoder(self.post_quant_conv(grid))


# ------------------------------------------------------------------------------------------------
# Loading. Files of this project carry their configuration in the header; published ones do not.
# ------------------------------------------------------------------------------------------------
_REGISTERED: dict[str, Callable[[str], nn.Module]] = {}


def register(ending: str, load: Callable[[str], nn.Module]) -> None:
    """Teach `load_vae`, `load_vqgan` and --plan another architecture. Stable Diffusion's VAE, for
    example, takes these lines in a script of one's own that ends as train.py does::

        class StableDiffusionVAE(VAE):  # `latents` and `encode` are inherited
            def __init__(self, path):
                torch.nn.Module.__init__(self)
                self.config = AutoencoderConfig(latent_channels=4, shift=0.0, scale=0.18215)
                self.model = diffusers.AutoencoderKL.from_pretrained(Path(path).parent)
            def moments(self, images):
                posterior = self.model.encode(images).latent_dist
                return posterior.mean, posterior.logvar
            def decode(self, latents):
                return self.model.decode(latents / self.config.scale).sample
        register("diffusion_pytorch_model.safetensors", StableDiffusionVAE)

    Args: ending: of the paths that `load` is for, such as a file's name;
        load: path → module with a dataclass `config` (latent_channels, downsampling), `moments`,
            `latents` and `decode` as in `VAE`; or (codes, code_width, downsampling), `indices`,
            `codebook` and `decode` as in `VQGAN`. It is frozen and set to eval mode here.
    """
    _REGISTERED[ending] = load


def registered(path: str | Path, *needs: str) -> nn.Module | None:
    """The frozen tokenizer of a file that `register` is for, else None; `needs`: its attributes."""
    load = next((load for end, load in _REGISTERED.items() if str(path).endswith(end)), None)
    if load is None or not Path(path).is_file():
        return None
    with torch.device("cpu"):  # a plan is made on another
        module = load(str(path))
    if lacks := [name for name in needs if not hasattr(module, name)]:
        raise ValueError(f"{path}: the tokenizer registered for it has no {', no '.join(lacks)}")
    return module.eval().requires_grad_(False)


def load_vae(path: str | Path, config: AutoencoderConfig = FLUX_VAE) -> VAE:
    """A frozen VAE in eval mode from a safetensors file. Raises: FileNotFoundError, ValueError."""
    if module := registered(path, "config", "moments", "latents", "decode"):
        return module
    state, text = _read("VAE", path, "FLUX.1's is ae.safetensors of its repository")
    if text:
        config = config_from_text(text, AutoencoderConfig, path)
    return _fit(VAE, config, state, path)


def load_vqgan(path: str | Path, config: VQGANConfig = TAMING_VQGAN) -> VQGAN:
    """A frozen VQ-GAN in eval mode: safetensors, or taming's own ``last.ckpt``.

    K is read off the file. What trained the VQ-GAN and is no part of it (``loss.*``) is dropped.
    Raises: as `load_vae`; for a ckpt that holds other objects, with the one-time conversion."""
    if module := registered(path, "config", "indices", "codebook", "decode"):
        return module
    state, text = _read("VQ-GAN", path, "taming-transformers publishes f16 ones, K 1024 and 16384")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    if text:
        config = config_from_text(text, VQGANConfig, path)
    elif (codebook := state.get("quantize.embedding.weight")) is not None:
        config = replace(config, codes=[*codebook.shape, 0][0])
    return _fit(VQGAN, config, state, path)


def published_config(path: str | Path, config: AutoencoderConfig) -> AutoencoderConfig:
    """The configuration of a weights file, from its header alone; `config` where the file is absent
    or published (a VQ-GAN's K is then read off the shape of its codebook)."""
    if module := registered(path, "config"):
        return module.config
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return config
    with _whole("autoencoder", path), safe_open(path, "pt") as file:
        if text := (file.metadata() or {}).get("autoencoder"):
            return config_from_text(text, type(config), path)
        codebook, names = "quantize.embedding.weight", set(file.keys())
        if isinstance(config, VQGANConfig) and codebook in names:
            return replace(config, codes=[*file.get_slice(codebook).get_shape(), 0][0])
    return config


@contextmanager
def _whole(what: str, path: str | Path):
    """Says in a line that a safetensors file is damaged."""
    try:
        yield
    except SafetensorError as error:
        what = f"{what} weights: {path} is not a whole safetensors file ({error})"
        raise ValueError(f"{what}; download it again") from None


def _read(what: str, path: str | Path, hint: str) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file, and the configuration in its header ("" if there is none)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} weights: no file {path}; {hint}")
    if path.suffix in (".ckpt", ".pt", ".pth"):
        return _read_pickle(what, path), ""
    with _whole(what, path), safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("autoencoder", "")
        return {name: file.get_tensor(name) for name in file.keys()}, text  # noqa: SIM118


def _read_pickle(what: str, path: Path) -> dict[str, Tensor]:
    """Tensors of a torch file. Unpickling can run any code: only tensors and plain values pass."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; none of them may end in unpickling
        once = (
            "import torch, safetensors.torch as s; "
            f"d = torch.load('{path.name}', map_location='cpu', weights_only=False)['state_dict']; "
            "s.save_file({k: v.contiguous() for k, v in d.items() if not k.startswith('loss.')}, "
            "'vqgan.safetensors')"
        )
        raise ValueError(
            f"{what} weights: {path} cannot be read as tensors alone ({type(error).__name__}: it "
            "is damaged, or holds other objects, as lightning checkpoints do). If you trust its "
            f'source, convert it once, somewhere without secrets: python -c "{once}"'
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    pairs = state.items() if isinstance(state, dict) else ()
    state = {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise ValueError(f"{what} weights: {path} holds no tensors by name")
    return state


def _fit(make: type, config: AutoencoderConfig, state: dict[str, Tensor], path: str | Path):
    """`make(config)` with the file's tensors, strictly; frozen, in eval mode, float32."""
    with torch.device("meta"):
        module = make(config)
    try:  # assign=True puts the file's tensors in the meta ones' place
        module.load_state_dict({k: v.float() for k, v in state.items()}, strict=True, assign=True)
    except RuntimeError as error:  # it names what is missing, left over and of another shape
        first = " ".join(str(error).partition("\n")[2].split())[:300]
        raise ValueError(f"{make.__name__} weights: {path} does not fit: {first} …") from None
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():  # else every loss would be NaN, and nobody knew why
            raise ValueError(f"{make.__name__} weights: {path}: tensor {name} is not finite")
    return module.eval().requires_grad_(False)


def config_to_text(config: AutoencoderConfig) -> str:
    """One line of JSON for a safetensors header."""
    return json.dumps(asdict(config))


def config_from_text(text: str, kind: type, path: str | Path = "text") -> AutoencoderConfig:
    """The reverse; JSON has no tuples, so lists are turned back. Raises: ValueError where the text
    describes another kind of model, or none; `path` is where it stood."""
    try:
        content = json.loads(text).items()
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in content})
    except (TypeError, AttributeError, RecursionError, ValueError) as error:
        what = f"weights: {path} is of another kind, no {kind.__name__}"
        raise ValueError(f"{what} ({error})") from None
