"""Tab. 7's question on the toy: a denoiser several times as heavy, pretrained on text, then frozen.

    python benchmarks/heavy_denoiser.py        → runs/heavy_denoiser/denoiser.safetensors

FLUX.1 was pretrained to draw what a text says; GenHancer's stage 1 then teaches projectors alone to
speak its language. Here the text is what this world's captions may say of a scene, two or three
statements: the attributes that they mention for its subject and no others, or the denoiser would
have been taught the benchmark's own sentences. (The toy's text tower reads no more than 14 words at
once.) The mean of their features is both of the denoiser's conditions. The file has FLUX's tensor
names, so ``train.py --flux FILE`` reads it as it reads FLUX's own. There is one, as there is one
FLUX: what another pretraining would teach is not in the spread over seeds.

Writes benchmarks/heavy_denoiser.json and heavy_denoiser.md: size, steps, loss on scenes never seen.
With other numbers than the defaults it writes trial.safetensors and nothing else, so that no trial
is taken for the one that ablations.py uses.
"""

import math
import time

import torch
from report import CPU, ROOT, facts, headline, parser, publish, table
from tqdm import trange

from evaluation.encoder import Encoder, load_encoders
from flow_denoiser import (
    FlowDenoiser,
    FlowDenoiserConfig,
    flow_matching_loss,
    sample_timesteps,
    straight_path,
)
from pretrained.autoencoders import VAE, load_vae
from toy.benchmark import TEMPLATE
from toy.world import PATTERNS, TOY_DIR, ToyScenes, mentioned_subjects, phrase, to_tensor
from util.cli import run_command
from util.files import save_tensors

STEPS, BATCH, LR = 1600, 64, 1e-3
# Heads of 128 as in FLUX.1: train.py reads the size off the tensors.
CONFIG = FlowDenoiserConfig(
    latent_channels=32,
    width=256,
    heads=2,
    double_blocks=2,
    single_blocks=4,
    vector_dim=64,
    context_dim=64,
    guidance=False,
    flux_time=True,
    initialisation="adaln-zero",
)


@torch.no_grad()
def look(vae: VAE, encoder: Encoder, scenes: ToyScenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, C, h, w) of all scenes, and the mean features (N, d) of what captions may say."""
    latents, said = [], []
    for start in range(0, len(scenes), 256):
        drawn = [scenes.scene(i) for i in range(start, min(start + 256, len(scenes)))]
        images = torch.stack([to_tensor(pixels) for _, pixels in drawn])
        latents.append(vae.latents(*vae.moments(images * 2 - 1), None))
        for scene, _ in drawn:
            mentioned = [p for p in PATTERNS if scene.subject in mentioned_subjects(p)]
            said.append([TEMPLATE.format(phrase(scene, [p])) for p in mentioned])
    different = sorted({text for texts in said for text in texts})  # 48: each is read once
    feature = dict(zip(different, encoder.texts(different), strict=True))
    means = torch.stack([torch.stack([feature[text] for text in texts]).mean(0) for texts in said])
    return torch.cat(latents), means


def loss_of(denoiser: FlowDenoiser, data: torch.Tensor, text: torch.Tensor, dice) -> torch.Tensor:
    """Eq. (3) of a batch, told its text. data (B, C, h, w), text (B, d)."""
    t = sample_timesteps(len(data), "logit-normal", 1.0, dice)
    x_t, velocity = straight_path(data, torch.randn(data.shape, generator=dice), t)
    told = text * math.sqrt(text.shape[1])  # numbers of about size 1
    return flow_matching_loss(denoiser(x_t, t, told[:, None], told), velocity).mean()


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=STEPS)
    flags.add_argument("--batch", type=int, default=BATCH)
    flags.add_argument("--lr", type=float, default=LR)
    args = flags.parse_args()
    torch.manual_seed(0)
    start, dice = time.time(), torch.Generator().manual_seed(0)
    vae = load_vae(TOY_DIR / "vae.safetensors")
    [encoder] = load_encoders([str(TOY_DIR / "clip.safetensors")], CPU)
    data, text = look(vae, encoder, ToyScenes(12_288, seed=987_654))
    unseen, their_text = look(vae, encoder, ToyScenes(1024, seed=2_718_281))
    denoiser = FlowDenoiser(CONFIG)
    optimizer = torch.optim.AdamW(denoiser.parameters(), weight_decay=0.01, fused=True)
    for step in (bar := trange(args.steps, desc="heavy denoiser")):
        warm, cosine = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * warm * cosine
        chosen = torch.randint(len(data), (args.batch,), generator=dice)
        loss = loss_of(denoiser, data[chosen], text[chosen], dice)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        dice = torch.Generator().manual_seed(1)
        held_out = float(loss_of(denoiser, unseen, their_text, dice))
        dice = torch.Generator().manual_seed(1)
        other = float(loss_of(denoiser, unseen, their_text.roll(1, 0), dice))
    trial = (args.steps, args.batch, args.lr) != (STEPS, BATCH, LR)
    file = ROOT / "runs" / "heavy_denoiser" / f"{'trial' if trial else 'denoiser'}.safetensors"
    save_tensors(denoiser.state_dict(), file)
    found = {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "steps": args.steps,
        "minutes": round((time.time() - start) / 60, 1),
        "loss": held_out,
        "loss told another scene's text": other,
    }
    command = f"python benchmarks/heavy_denoiser.py --steps {args.steps}"
    rows = [
        ["parameters, M", f"{found['parameters'] / 1e6:.2f}"],
        ["minutes, one thread", found["minutes"]],
        ["loss on 1024 scenes never seen, told their text", f"{held_out:.3f}"],
        ["the same, told another scene's text", f"{other:.3f}"],
    ]
    lines = [headline(command, facts()) + ".", "", *table(["", "measured"], rows)]
    if trial:
        print("\n".join(lines))
        return
    publish("heavy_denoiser", lines, {"command": command, **facts(), **found})


if __name__ == "__main__":
    run_command(main)
