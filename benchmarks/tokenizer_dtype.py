"""What do a VAE and a VQ-GAN lose in bf16, and do they gain by channels-last memory on a CPU?

    python benchmarks/tokenizer_dtype.py --photos DIR      a folder of pictures → tokenizer_dtype.md

A latent is drawn from a posterior N(mean, std²) anyway. An error of the mean that is small beside
that std is lost in the noise that training adds itself, so the std is the measure: a default of
bf16 would have to stay under a tenth of it. For indices it is the share that changes.

Published weights are not needed, and not replaced either: the toy's tokenizers are trained but
small, FLUX's has its full depth but random weights. Random weights show how rounding adds up along
31 convolutions; the posterior's std is what training made of it, and they know nothing of it.
"""

import copy
import statistics
import time

import torch
from report import ROOT, facts, headline, parser, publish, table

from data import FileList, Pictures, find_images
from pretrained.autoencoders import VAE, VQGAN, load_vae, load_vqgan
from toy.world import ToyScenes
from util.cli import run_command

BAR = 0.10  # of the posterior's std
CHANNELS_LAST = torch.channels_last


# ------------------------------------------------------------------------------------------------
# What is measured
# ------------------------------------------------------------------------------------------------
def halves(module: torch.nn.Module, how: str) -> torch.nn.Module:
    """The module as a bf16 run would have it. "weights": weights and activations in bf16, a norm
    and a softmax adding up in float32 inside; "autocast": float32 weights under autocast."""
    return copy.deepcopy(module).to(torch.bfloat16) if how == "weights" else module


@torch.no_grad()
def in_bf16(module: torch.nn.Module, method: str, images: torch.Tensor, how: str):
    """What `method` says in bf16."""
    call = getattr(halves(module, how), method)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        return call(images)


@torch.no_grad()
def vae_errors(vae: VAE, images: torch.Tensor, how: str) -> dict[str, float]:
    """Errors of the posterior's mean in units of its std, and of the latents' own spread."""
    mean, log_variance = vae.moments(images)
    other, other_log_variance = in_bf16(vae, "moments", images, how)
    error, std = (other - mean).abs(), torch.exp(0.5 * log_variance)
    ratio = error / std
    changed = torch.exp(0.5 * (other_log_variance - log_variance)) - 1
    return {
        "rms": ratio.square().mean().sqrt().item(),
        "median": ratio.median().item(),
        "p99": ratio.flatten().kthvalue(int(0.99 * ratio.numel())).values.item(),
        "of_spread": (error.square().mean().sqrt() / mean.std()).item(),
        "std_changes_by": changed.abs().mean().item(),
        "std_of_spread": (std.square().mean().sqrt() / mean.std()).item(),
    }


@torch.no_grad()
def index_errors(vqgan: VQGAN, images: torch.Tensor, how: str) -> dict[str, float]:
    """Share of the indices that change, with the codebook in bf16 too and kept in float32; and how
    much farther the new code is from the vector than the nearest one."""
    right = vqgan.indices(images)
    changed = (in_bf16(vqgan, "indices", images, how) != right).float().mean().item()
    kept = halves(vqgan, how)
    kept.quantize = vqgan.quantize
    found = in_bf16(kept, "indices", images, "autocast") if how == "autocast" else None
    found = kept.indices(images) if found is None else found
    vectors = vqgan.quant_conv(vqgan.encoder(images)).flatten(2).mT  # (B, N, E)
    far, near = ((vectors - vqgan.codebook[i]).norm(dim=-1) for i in (found, right))  # (B, N) each
    moved = found != right
    farther = (far / near)[moved].median().item() - 1 if moved.any() else 0.0
    return {"all": changed, "codebook_float32": moved.float().mean().item(), "farther": farther}


@torch.no_grad()
def compare_memory(module: torch.nn.Module, method: str, pixels: int, repeats: int) -> dict:
    """Time with channels innermost over time as it is, pairs interleaved; and whether the results
    have the same bits."""
    other = copy.deepcopy(module).to(memory_format=CHANNELS_LAST)
    images = torch.rand(2, 3, pixels, pixels) * 2 - 1
    inputs = {module: images, other: images.contiguous(memory_format=CHANNELS_LAST)}
    spent = {module: [], other: []}
    for turn in range(repeats + 1):  # the first pair warms up
        for candidate in (module, other) if turn % 2 else (other, module):
            start = time.perf_counter()
            getattr(candidate, method)(inputs[candidate])
            spent[candidate].append(time.perf_counter() - start)
    pairs = list(zip(spent[module][1:], spent[other][1:], strict=True))
    plain, last = (getattr(m, method)(inputs[m]) for m in (module, other))
    plain, last = (torch.cat(x) if isinstance(x, tuple) else x for x in (plain, last))
    return {
        "ratio": statistics.median(b / a for a, b in pairs),
        "pairs": len(pairs),
        "difference": (plain - last).abs().max().item(),
        "same_bits": torch.equal(plain, last),
    }


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------
def pictures(photos: str, pixels: int, count: int) -> dict[str, torch.Tensor]:
    """Toy scenes and photographs in [-1, 1], (count, 3, pixels, pixels) each."""
    sources = {"toy scenes": ToyScenes(count, seed=0)} if pixels == 64 else {}
    if photos:
        sources["photographs"] = Pictures(FileList(find_images(photos)), pixels)
    found = {}
    for name, source in sources.items():
        items = [source[(i, 0)]["image"] for i in range(min(count, len(source)))]
        found[name] = torch.stack(items) * 2 - 1
    return found


def random_weights(make: type) -> torch.nn.Module:
    """A tokenizer of published size as PyTorch initialises it."""
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------
def verdict(rows: list[dict]) -> str:
    """May bf16 be a default?"""
    by = {row["pictures"]: row for row in rows if row["trained"] and row["how"] == "weights"}
    toy = " and ".join(f"{100 * row['rms']:.0f} % ({name})" for name, row in by.items())
    may = all(row["rms"] <= BAR for row in by.values())
    deep = max((row["of_spread"] for row in rows if not row["trained"]), default=0.0)
    return (
        f"**Verdict**: bf16 {'may' if may else 'must not'} become the default: the bar is "
        f"{100 * BAR:.0f} % of the posterior's std, and the toy VAE errs by {toy} of it. FLUX's "
        f"VAE was not measured: at its depth rounding costs {100 * deep:.1f} % of the latents' "
        "spread with random weights, so it would pass only if its posterior's std were at least "
        f"{100 * deep / BAR:.0f} % of that spread; run this on the published weights before "
        "trusting it there."
    )


def measure(args) -> dict[str, list[dict]]:
    """All figures, as rows of the three tables."""
    vae, vqgan = (load(ROOT / "toy" / f) for load, f in (
        (load_vae, "vae.safetensors"), (load_vqgan, "vqgan.safetensors"),
    ))  # fmt: skip
    flux, taming = random_weights(VAE), random_weights(VQGAN)
    if args.vae:
        flux = load_vae(args.vae)
    shape = "FLUX's shape, " + ("published weights" if args.vae else "random weights")
    latents, indices = [], []
    for how in ("weights", "autocast"):
        for name, images in pictures(args.photos, 64, 83).items():
            about = {"how": how, "pictures": name, "images": len(images)}
            row = {"tokenizer": "toy VAE", "trained": True, **about}
            latents.append(row | vae_errors(vae, images, how))
            row = {"tokenizer": "toy VQ-GAN", **about}
            indices.append(row | index_errors(vqgan, images, how))
        for name, images in pictures(args.photos, args.pixels, 4).items():
            about = {"how": how, "pictures": name, "images": len(images)}
            row = {"tokenizer": shape, "trained": bool(args.vae), **about}
            latents.append(row | vae_errors(flux, images, how))
            row = {"tokenizer": "taming's shape, random weights", **about}
            indices.append(row | index_errors(taming, images, how))
    memory = []
    for name, module, method, pixels, repeats in (
        ("toy VAE", vae, "moments", 64, 41),
        ("toy VQ-GAN", vqgan, "encoder", 64, 41),
        ("FLUX's shape", flux, "moments", 128, args.repeats),
        ("FLUX's shape", flux, "moments", 224, args.repeats),
        ("taming's shape", taming, "encoder", 128, args.repeats),
        ("taming's shape", taming, "encoder", 224, args.repeats),
    ):
        row = {"tokenizer": name, "pixels": pixels}
        memory.append(row | compare_memory(module, method, pixels, repeats))
    return {"latents": latents, "indices": indices, "channels_last": memory}


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def main(args) -> None:
    torch.set_num_threads(1)
    rows, about = measure(args), facts()
    command = "python benchmarks/tokenizer_dtype.py --photos DIR"
    lines = [f"{headline(command, about, 'one thread')}.", ""]
    lines += ["**bf16: the error of the posterior's mean, in units of its std**", ""]
    head = ["tokenizer", "bf16", "pictures", "rms", "median", "99th percentile"]
    head += ["rms error / spread of latents", "posterior's std / spread", "change of std"]
    keys = ("rms", "median", "p99", "of_spread", "std_of_spread", "std_changes_by")
    lines += table(head, (
        [r["tokenizer"], r["how"], f"{r['images']} {r['pictures']}", *(percent(r[k]) for k in keys)]
        for r in rows["latents"]
    ))  # fmt: skip
    lines += ["", "**bf16: indices that change**", ""]
    head = ["tokenizer", "bf16", "pictures", "all in bf16", "codebook in float32"]
    keys = ("all", "codebook_float32", "farther")
    lines += table([*head, "distance of a changed code, more by"], (
        [r["tokenizer"], r["how"], f"{r['images']} {r['pictures']}", *(percent(r[k]) for k in keys)]
        for r in rows["indices"]
    ))  # fmt: skip
    lines += ["", verdict(rows["latents"]), ""]
    lines += ["**channels last on one CPU core** (2 images, float32, encoder under no_grad)", ""]
    lines += table(["tokenizer", "pixels", "time / as it is", "pairs", "largest difference"], (
        [r["tokenizer"], r["pixels"], f"{r['ratio']:.2f}", r["pairs"],
         "none" if r["same_bits"] else f"{r['difference']:.0e}"]
        for r in rows["channels_last"]
    ))  # fmt: skip
    publish("tokenizer_dtype", lines, {"command": command, **about, **rows})


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--photos", default="", help="folder of pictures; none: toy scenes alone")
    flags.add_argument("--vae", default="", help="FLUX.1's ae.safetensors; none: random weights")
    flags.add_argument("--pixels", type=int, default=128, help="size for the full-size shapes")
    flags.add_argument("--repeats", type=int, default=9, help="pairs timed at full size")
    arguments = flags.parse_args()
    run_command(lambda: main(arguments))
