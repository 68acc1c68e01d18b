"""The heavy denoiser: FLUX.1's published transformer in the light one's place (Tab. 7, Fig. 1 iv).

The paper asks whether a strong pretrained generator teaches CLIP better than a light one from
scratch. Hardly: 11.90 B parameters cost nearly ten times the time, for 0.7 points on OpenAI's L/14
and none on MetaCLIP's H/14. To repeat that, FLUX.1's own weights must run as g_φ. `FlowDenoiser`
has FLUX's module names and, at depth 19 + 38, its shapes, so this file only reads the weights,
tells the size from them, and converts the one convention that differs: FLUX's time is 1 at the
noise, ours at the data (`flux_time`).

11.90 B parameters are read as bf16 where the device computes in it (23.8 GB), and stay frozen:
stage 1 then trains the projectors alone. (AdamW on all of them would need 190 GB.)

Beside this file, copy flow_denoiser.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flow_denoiser import FlowDenoiser, FlowDenoiserConfig

FLUX_TRANSFORMER = FlowDenoiserConfig(double_blocks=19, single_blocks=38, flux_time=True)
"""flux1-dev.safetensors: 780 tensors. (schnell has no guidance embedding: 776.)"""


def load_flux(path: str | Path, dtype: torch.dtype = torch.float32) -> FlowDenoiser:
    """Tab. 7's heavy denoiser: FLUX.1's transformer in its published layout, frozen, in eval mode.

    Depth, width and guidance are read off the tensors; heads are 128 wide, as in FLUX.1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, or not FLUX's tensors; the first mismatch is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"FLUX weights: no file {path}; flux1-dev.safetensors or flux1-schnell.safetensors"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"FLUX weights: {path} is not a whole safetensors file ({error}); download it again"
        ) from None
    config = config_of({name: tuple(tensor.shape) for name, tensor in state.items()})
    for name, tensor in state.items():  # one after the other: all of them fill the memory
        if not torch.isfinite(tensor.to(dtype)).all():
            raise ValueError(f"FLUX weights: {path}: tensor {name} is not finite")
    with torch.device("meta"):
        denoiser = FlowDenoiser(config)
    try:  # assign=True puts the file's tensors in the meta ones' place
        denoiser.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
    except RuntimeError as error:  # it names what is missing, left over and of another shape
        first = " ".join(str(error).partition("\n")[2].split())[:300]
        depth = f"{config.double_blocks} + {config.single_blocks}"
        raise ValueError(
            f"FLUX weights: {path} does not fit a transformer of depth {depth}: {first} …"
        ) from None
    return denoiser.eval().requires_grad_(False)


def config_of(shapes: dict[str, tuple[int, ...]]) -> FlowDenoiserConfig:
    """The size of a transformer from its tensors' shapes; FLUX.1-dev's where they do not say, and
    where they say nonsense: then a tensor does not fit, and is named."""

    def blocks(kind: str) -> int:
        # Counted, not read off the names: a false number would build blocks without end.
        names = {name.split(".")[1] for name in shapes if name.startswith(f"{kind}_blocks.")}
        return min(len(names), 1000)

    def matrix(name: str, otherwise: tuple[int, int]) -> tuple[int, int]:
        found = shapes.get(name, otherwise)
        return found if len(found) == 2 else otherwise

    head = sum(FLUX_TRANSFORMER.axes)
    width, token = matrix("img_in.weight", (FLUX_TRANSFORMER.width, 64))
    width = max(width, head)
    return replace(
        FLUX_TRANSFORMER,
        latent_channels=token // 4,
        width=width // head * head,
        heads=width // head,
        double_blocks=blocks("double") or FLUX_TRANSFORMER.double_blocks,
        single_blocks=blocks("single") or FLUX_TRANSFORMER.single_blocks,
        vector_dim=matrix("vector_in.in_layer.weight", (0, FLUX_TRANSFORMER.vector_dim))[1],
        context_dim=matrix("txt_in.weight", (0, FLUX_TRANSFORMER.context_dim))[1],
        guidance="guidance_in.in_layer.weight" in shapes,
    )
