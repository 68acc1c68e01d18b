"""How fast is a step, against the same step out of diffusers, peft and transformers?

    python benchmarks/vs_libraries.py              9 rounds, one thread → vs_libraries.json, .md
    python benchmarks/vs_libraries.py --quick      one round at toy size, nothing written: a test

Both sides get the same weights, pictures and noise, and before anything is timed their losses must
agree over three steps of training: so what is compared does the same work, backward pass, clipping
and AdamW included. The libraries' side is written as their own training examples are: AutoencoderKL
and FluxTransformer2DModel of diffusers, CLIPVisionModelWithProjection of transformers with peft's
LoRA, torch.optim.AdamW as it comes. Ours is `train_step` of train.py on what `begin` prepares, and
the switches are those that train.py sets.

A shared machine is never quiet, so what is counted is the core's time for this process alone. In a
round every contestant takes one step, in turning order, and only ratios within a round count: time
of the libraries / time of ours, above 1 where ours is faster. Reported is their median.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F
from libraries import (
    copy_adapters,
    image_ids,
    their_denoiser,
    their_tower,
    their_vae,
    velocity_by_diffusers,
)
from report import facts, headline, parser, publish, table
from torch import Tensor, nn

from flow_denoiser import FlowDenoiser, FlowDenoiserConfig
from genhancer import GenHancer
from lora import inject_lora, lora_layers
from paradigms import Continuous
from pretrained.autoencoders import VAE, AutoencoderConfig
from pretrained.backbones import ClipInfo, build_clip
from settings import Settings
from train import train_step
from training.assemble import hold
from training.process import Process, start_process
from training.speed import compile_blocks, tune_tokenizer
from training.stages import begin
from util.cli import run_command

LIBRARIES = "diffusers", "transformers", "peft"
BASE = "libraries"  # the contestant that all others are divided by
TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class Size:
    """What is built: open_clip's vision configuration, the VAE, the denoiser, images a step."""

    vision: dict
    embed: int
    vae: AutoencoderConfig
    denoiser: FlowDenoiserConfig
    batch: int

    @property
    def clip(self) -> ClipInfo:
        config = {"embed_dim": self.embed, "vision_cfg": self.vision, "text_cfg": TEXT}
        config["quick_gelu"] = True
        return ClipInfo("vs_libraries", config, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))

    @property
    def image(self) -> int:
        """Side in pixels."""
        return self.vision["image_size"]

    @property
    def side(self) -> int:
        """Tokens of the denoiser along a side."""
        return self.image // self.vae.downsampling // 2


def denoiser(width: int, heads: int, condition: int, **changes) -> FlowDenoiserConfig:
    """One MM-DiT and two Single-DiT blocks."""
    shape = {"width": width, "heads": heads, "double_blocks": 1, "single_blocks": 2}
    shape |= {"vector_dim": condition, "context_dim": condition, "guidance": False}
    return FlowDenoiserConfig(**shape, **changes)


SIZES = {
    # Preset toy's own shapes and batch, which is what a CPU is asked to train.
    "toy": Size(
        {"image_size": 64, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32},
        64,
        AutoencoderConfig(8, (1, 2, 4, 8), 1, 32, groups=4),
        denoiser(192, 6, 64, latent_channels=32, axes=(8, 12, 12)),
        64,
    ),
    # ViT-B/16 at 224 px, with FLUX's VAE and transformer made thinner so that no part takes more
    # than 60 % of a step; two images, as on each of the paper's GPUs.
    "B/16": Size(
        {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64},
        512,
        AutoencoderConfig(base_channels=64),
        denoiser(640, 5, 512),
        2,
    ),
}
QUICK = Size(
    {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32},
    32,
    AutoencoderConfig(8, (1, 1, 2, 2), 1, 4, groups=4),
    denoiser(64, 2, 32, latent_channels=4),
    2,
)


# ------------------------------------------------------------------------------------------------
# Our side
# ------------------------------------------------------------------------------------------------
def shaken(module: nn.Module, size: float = 0.02) -> nn.Module:
    """No zeros, no ones: every tensor takes part."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def our_model(size: Size) -> tuple[nn.Module, GenHancer]:
    """CLIP and GenHancer; the same numbers whenever it is called."""
    torch.manual_seed(0)
    clip = shaken(build_clip(size.clip).eval(), 0.005)
    vae = shaken(VAE(size.vae).eval().requires_grad_(False))
    paradigm = Continuous(vae, shaken(FlowDenoiser(size.denoiser)), size.image)
    model = GenHancer(clip, size.clip, paradigm)
    tune_tokenizer(model, our_settings(size), Process())
    return clip, model


class Fixed(torch.utils.data.Dataset):
    """A few pictures of noise, in memory: reading files is no part of the comparison."""

    def __init__(self, size: Size):
        generator = torch.Generator().manual_seed(1)
        shape = 2 * size.batch, 3, size.image, size.image
        # As 8 bits a channel hold them: a cache keeps pictures so.
        self.images = torch.randint(256, shape, generator=generator) / 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"image": self.images[key[0]], "name": str(key[0]), "unreadable": []}


def our_settings(size: Size) -> Settings:
    """The rates are large enough that three steps move the loss."""
    rates = {"stage1_lr": 1e-4, "stage2_lr": 1e-4, "schedule": "constant", "warmup": 0}
    return Settings.of("toy", batch=size.batch, micro_batch=size.batch, workers=0, **rates)


class OurStep:
    """`train_step` of a stage; called, it takes one step and returns its loss.

    Args: compiled: `block.compile()` for the blocks of denoiser and tower; cached: latents' moments
        and the original tower's features come from memory.
    """

    def __init__(self, size: Size, stage: int, compiled: bool = False, cached: bool = False):
        (_, model), data = our_model(size), Fixed(size)
        if cached:
            data = hold(data, model, our_settings(size), Process())
        self.module, self.stage = model, begin(stage, model, our_settings(size), Process())
        give_b(model.visual)
        self.batches, self.seen = self.stage.global_batches(data), ()
        model.register_forward_pre_hook(self._remember)
        if compiled:
            compile_blocks(model)

    def _remember(self, model: nn.Module, inputs: tuple) -> None:
        self.seen = inputs[:2]  # images, draws

    def __call__(self) -> float:
        return float(train_step(self.stage, next(self.batches))["loss"])


def give_b(tower: nn.Module) -> None:
    """B is zero at the start, and then A would have no gradient."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in lora_layers(tower):
            for adapter in layer.adapters.values():
                adapter.B.copy_(0.01 * torch.randn(adapter.B.shape, generator=generator))


# ------------------------------------------------------------------------------------------------
# The libraries' side, on the same weights
# ------------------------------------------------------------------------------------------------
class TheirStep:
    """The same training step by the libraries, as one would write it with them.

    Args: ours: whose weights, rates and noise it takes over.
    """

    def __init__(self, size: Size, ours: OurStep):
        clip, model = our_model(size)
        self.number, self.info, self.ours = ours.stage.number, size.clip, ours
        self.vae = their_vae(model.paradigm.tokenizer)
        self.denoiser = their_denoiser(model.paradigm.denoiser)
        self.tower = their_tower(clip, size.clip, adapted=self.number == 2)
        own = model.paradigm.projectors
        self.vector, self.context = own["project_vector"], own["project_context"]
        self.mean, self.std = model.mean, model.std
        for part in (self.denoiser, self.vector, self.context):
            part.train().requires_grad_(self.number == 1)
        learning = [self.denoiser, self.vector, self.context]
        if self.number == 2:
            copy_adapters(ours.stage.model.visual, self.tower.train())
            learning = [self.tower]
        self.learning = [p for m in learning for p in m.parameters() if p.requires_grad]
        self.clip_grad = ours.stage.settings.clip_grad
        decay = ours.stage.settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, weight_decay=decay)
        self.pictures = list(Fixed(size).images[: size.batch])
        self.module, self.ids, self.same_draws = self.tower, image_ids(size.side), False

    def draw(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch and its noise: drawn anew, or what our step has just seen."""
        if self.same_draws:
            return self.ours.seen
        images, shape = torch.stack(self.pictures), self.ours.seen[1]["noise"].shape
        noise = {"noise": torch.randn(shape), "posterior": torch.randn(shape)}
        return images, {"t": torch.sigmoid(torch.randn(len(images))), **noise}

    def __call__(self) -> float:
        images, draws = self.draw()
        with torch.no_grad():
            posterior = self.vae.encode(images * 2 - 1).latent_dist
            raw = posterior.mean + posterior.std * draws["posterior"]
            data = (raw - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        with torch.set_grad_enabled(self.number == 2):
            features = self.tower(pixel_values=(images - self.mean) / self.std).image_embeds
        noise, t = draws["noise"], draws["t"][:, None, None, None]
        predicted = velocity_by_diffusers(
            self.denoiser,
            t * data + (1 - t) * noise,
            draws["t"],
            (self.context(features)[:, None], self.vector(features)),
            self.ids,
        )
        loss = F.mse_loss(predicted, data - noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


# ------------------------------------------------------------------------------------------------
# Single parts
# ------------------------------------------------------------------------------------------------
@dataclass
class Part:
    """A part of the model that works once when called, and returns its loss."""

    module: nn.Module
    loss: Callable[[], Tensor]
    learns: bool = True

    def __call__(self) -> float:
        with torch.set_grad_enabled(self.learns):
            loss = self.loss()
            if self.learns:
                loss.backward()
                self.module.zero_grad(set_to_none=True)
        return loss.item()


def denoisers(size: Size) -> dict[str, Part]:
    """Forward and backward, all parameters learning."""
    mine = our_model(size)[1].paradigm.denoiser.requires_grad_(True)
    theirs, c = their_denoiser(mine), size.denoiser
    torch.manual_seed(3)
    x = torch.randn(size.batch, c.latent_channels, 2 * size.side, 2 * size.side)
    t, context = torch.rand(size.batch), torch.randn(size.batch, 1, c.context_dim)
    vector, ids = torch.randn(size.batch, c.vector_dim), image_ids(size.side)

    def their_loss() -> Tensor:
        return F.mse_loss(velocity_by_diffusers(theirs, x, t, (context, vector), ids), x)

    ours = Part(mine, lambda: F.mse_loss(mine(x, t, context, vector), x))
    return {BASE: Part(theirs, their_loss), "ours": ours}


def towers(size: Size) -> dict[str, Part]:
    """Forward and backward through the adapted tower."""
    clip, _ = our_model(size)
    theirs = their_tower(clip, size.clip, adapted=True).train()
    mine = clip.visual.train()
    inject_lora(mine)
    give_b(mine)
    copy_adapters(mine, theirs)
    images = torch.randn(size.batch, 3, size.image, size.image)
    return {
        BASE: Part(theirs, lambda: theirs(pixel_values=images).image_embeds.square().mean()),
        "ours": Part(mine, lambda: mine(images).square().mean()),
    }


def tokenizers(size: Size) -> dict[str, Part]:
    """Posterior mean and variance of a batch; the sum of both stands in for a loss."""
    mine, images = our_model(size)[1].paradigm.tokenizer, Fixed(size).images[: size.batch] * 2 - 1
    theirs = their_vae(mine)

    def their_sum() -> Tensor:
        posterior = theirs.encode(images).latent_dist
        return posterior.mean.abs().mean() + posterior.logvar.abs().mean()

    def our_sum() -> Tensor:
        mean, log_variance = mine.moments(images)
        return mean.abs().mean() + log_variance.abs().mean()

    return {BASE: Part(theirs, their_sum, False), "ours": Part(mine, our_sum, False)}


def whole_step(size: Size, stage: int, compiling: bool) -> dict[str, OurStep | TheirStep]:
    """The libraries, and ours in every combination of cache and compilation."""
    ours = OurStep(size, stage)
    found = {"ours": ours, BASE: TheirStep(size, ours)}
    found["ours, --cache"] = OurStep(size, stage, cached=True)
    if compiling:
        found["ours, --compile"] = OurStep(size, stage, compiled=True)
        found["ours, --cache --compile"] = OurStep(size, stage, compiled=True, cached=True)
    return found


# ------------------------------------------------------------------------------------------------
# Agreement first, then time
# ------------------------------------------------------------------------------------------------
def switch(name: str, ours: tuple[bool, bool]) -> None:
    """PyTorch's two global switches for attention: as train.py sets them, or as they come."""
    flash, fast = (True, True) if name == BASE else ours
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.mha.set_fastpath_enabled(fast)


def agree(contestants: dict, ours: tuple[bool, bool], what: str) -> list[float]:
    """Three steps of each, without dropout, on the same noise; for compilation also the warm-up.

    Returns: the libraries' losses. Raises: ValueError where another differs by more than 1e-3.
    """
    modules = [m for step in contestants.values() for m in step.module.modules()]
    chances = {m: m.p for m in modules if isinstance(m, nn.Dropout)}
    for module in chances:
        module.p = 0.0
    contestants[BASE].same_draws = True
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(3):
        for name, step in contestants.items():
            switch(name, ours)
            losses[name].append(step())
    for name, found in losses.items():
        pairs = zip(found, losses[BASE], strict=True)
        if not all(abs(mine - other) <= 1e-3 * abs(other) for mine, other in pairs):
            raise ValueError(f"{what}: losses {found} of {name}, {losses[BASE]} of {BASE}")
    for module, chance in chances.items():
        module.p = chance
    contestants[BASE].same_draws = False
    return losses[BASE]


def race(contestants: dict, ours: tuple[bool, bool], rounds: int) -> dict:
    """Seconds per round of each, in turning order, and the median of the paired ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(-1, rounds):  # one to warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            switch(name, ours)
            start = time.process_time()
            contestants[name]()
            seconds[name].append(time.process_time() - start)
    kept = {name: values[1:] for name, values in seconds.items()}
    found = {}
    for name, values in kept.items():
        ratios = [theirs / mine for theirs, mine in zip(kept[BASE], values, strict=True)]
        found[name] = {"seconds": median(values), "ratio": median(ratios), "ratios": ratios}
    return found


def attention_by_length(rounds: int, lengths: tuple[int, ...]) -> list[dict]:
    """PyTorch's fused CPU attention against its plain products, forward and backward, 512 wide."""
    found = []
    for batch, head, tokens in product((2, 16), (32, 64, 128), lengths):
        shape = batch, 512 // head, tokens, head
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        repeats, ratios = max(1, 400_000 // (batch * tokens * (tokens + 64))), []
        for _ in range(rounds + 1):  # one to warm up
            spent = []
            for flash in (False, True):
                torch.backends.cuda.enable_flash_sdp(flash)
                start = time.process_time()
                for _ in range(repeats):
                    F.scaled_dot_product_attention(q, k, v).sum().backward()
                spent.append(time.process_time() - start)
            ratios.append(spent[0] / spent[1])
        about = {"batch": batch, "head": head, "tokens": tokens}
        found.append({**about, "ratio": median(ratios[1:])})
    return found


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------
def measure(size: Size, rounds: int, compiling: bool = True, only: str = "") -> dict:
    """Every comparison by name."""
    start_process("fp32")  # sets the switches as train.py does
    ours = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    comparisons = {
        "denoiser, forward and backward": lambda: denoisers(size),
        "tower with LoRA, forward and backward": lambda: towers(size),
        "VAE, encoding": lambda: tokenizers(size),
        "stage 1, whole step": lambda: whole_step(size, 1, compiling),
        "stage 2, whole step": lambda: whole_step(size, 2, compiling),
    }
    found = {}
    for what, build in comparisons.items():
        if only not in what:
            continue
        torch.compiler.reset()  # what was compiled for another stage or size
        contestants = build()
        losses = agree(contestants, ours, what)
        found[what] = {"losses": losses, "sides": race(contestants, ours, rounds)}
        for name, side in found[what]["sides"].items():
            print(f"{what}: {name} {side['seconds']:.3f} s, {side['ratio']:.2f}", flush=True)
    return found


def report_lines(first: str, found: dict, attention: list[dict]) -> list[str]:
    """The tables: all comparisons, and attention by length."""
    rows = [
        [size, what, name, f"{side['seconds']:.3f}", f"{side['ratio']:.2f}"]
        for size, results in found.items()
        for what, result in results.items()
        for name, side in result["sides"].items()
    ]
    lengths = sorted({row["tokens"] for row in attention})
    shapes = sorted({(row["batch"], row["head"]) for row in attention})
    ratio = {(row["batch"], row["head"], row["tokens"]): row["ratio"] for row in attention}
    grid = [[b, h, *(f"{ratio[b, h, n]:.2f}" for n in lengths)] for b, h in shapes]
    return [
        first,
        "Seconds of one core's time; the ratio is time of the libraries / time of this row, in the "
        "same round. A cache saves the share of VAE and tower, which differs with the size.",
        "",
        *table(["size", "what", "", "seconds", "ratio"], rows),
        "",
        "Attention on the CPU, forward and backward, 512 wide: time of plain products / time of "
        "PyTorch's fused kernel, by number of tokens. Above 1 the fused kernel is faster.",
        "",
        *table(["batch", "head", *lengths], grid),
    ]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--quick", action="store_true")
    flags.add_argument("--only", default="", help="comparisons whose name holds this; no report")
    args = flags.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        measure(QUICK, 1, compiling=False, only=args.only)
        attention_by_length(1, (16,))
        return
    found = {}
    for name, size in SIZES.items():
        print(name)
        found[name] = measure(size, args.rounds, only=args.only)
    if args.only:
        return
    attention = attention_by_length(args.rounds, (8, 17, 33, 50, 65, 129, 197, 257))
    command, about = f"python benchmarks/vs_libraries.py --rounds {args.rounds}", facts()
    about["libraries"] = ", ".join(f"{n} {version(n)}" for n in LIBRARIES)
    details = "medians of paired ratios", "one thread", about["libraries"]
    first = f"{headline(command, about, *details)}."
    sizes = {name: asdict(size) for name, size in SIZES.items()}
    figures = {"sizes": sizes, "comparisons": found, "attention": attention}
    lines = report_lines(first, found, attention)
    publish("vs_libraries", lines, {"command": command, **about, **figures})


if __name__ == "__main__":
    run_command(main)
