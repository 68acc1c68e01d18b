"""flow_denoiser.py: samplers against their densities, the path, FLUX's names, counts and time."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY_DENOISER
from scipy import integrate, stats
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flow_denoiser as fd

DISTRIBUTIONS = [("logit-normal", s) for s in (0.1, 0.5, 1.0, 5.0, 10.0)] + [("uniform", 1.0)]


# -- timesteps (Eq. 6, Tab. 4, Fig. S1) ----------------------------------------------------------
@pytest.mark.parametrize("distribution, scale", DISTRIBUTIONS)
def test_density_integrates_to_one(distribution, scale):
    """In logit space, where the mass at both ends for large s is spread out: dt = t (1 − t) du."""

    def integrand(u):
        t = torch.sigmoid(torch.tensor(u, dtype=torch.float64))
        return float(fd.timestep_density(t, distribution, scale) * t * (1 - t))

    reach = 30.0  # float64 can tell 1 − 1e-13 from 1
    total = integrate.quad(integrand, -reach, reach, limit=500)[0]
    missing = 2 * stats.norm.sf(reach / scale) if distribution == "logit-normal" else 0.0
    assert total + missing == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("distribution, scale", DISTRIBUTIONS)
def test_sampler_follows_the_density(distribution, scale):
    """Kolmogorov–Smirnov against the integral of the closed-form density."""
    t = fd.sample_timesteps(20_000, distribution, scale, torch.Generator().manual_seed(1)).double()
    grid = torch.linspace(-30, 30, 20_001, dtype=torch.float64)  # again in logit space
    at = torch.sigmoid(grid)
    density = fd.timestep_density(at, distribution, scale) * at * (1 - at)
    below = stats.norm.cdf(-30 / scale) if distribution == "logit-normal" else 0.0
    cdf = below + integrate.cumulative_trapezoid(density.numpy(), grid.numpy(), initial=0)
    # float32 cannot tell sigmoid(u) from 1 beyond u ≈ 16.6, which s = 10 often reaches: that upper
    # end is one step of the distribution, so both sides are compared below it only.
    edge = 14.0
    inside = t.clamp(1e-12, 1 - 1e-12).logit().numpy()
    inside = inside[inside < edge]
    share = np.interp(edge, grid.numpy(), cdf)
    assert len(inside) / len(t) == pytest.approx(share, abs=0.01)
    result = stats.kstest(inside, lambda u: np.interp(u, grid.numpy(), cdf) / share)
    assert result.pvalue > 0.01, result


def test_a_wrong_scale_fails_the_same_test():
    t = (
        fd.sample_timesteps(20_000, "logit-normal", 1.0, torch.Generator().manual_seed(1))
        .logit()
        .numpy()
    )
    assert stats.kstest(t, lambda u: stats.norm.cdf(u / 1.1)).pvalue < 1e-3


@pytest.mark.parametrize("bad", [("gauss", 1.0), ("logit-normal", 0.0), ("uniform", -1.0)])
def test_bad_distribution_is_refused(bad):
    with pytest.raises(ValueError, match="timestep"):
        fd.sample_timesteps(3, *bad)
    with pytest.raises(ValueError, match="timestep"):
        fd.timestep_density(torch.tensor([0.5]), *bad)


# -- path and sampler (Eq. 1) --------------------------------------------------------------------
def test_path_ends_and_velocity():
    data, noise = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 3, 4, dtype=torch.float64),
    )
    at_noise, velocity = fd.straight_path(data, noise, torch.zeros(2, dtype=torch.float64))
    at_data, _ = fd.straight_path(data, noise, torch.ones(2, dtype=torch.float64))
    assert torch.equal(at_noise, noise) and torch.equal(at_data, data)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    x_t, _ = fd.straight_path(data, noise, t)
    step = 1e-3
    ahead, _ = fd.straight_path(data, noise, t + step)
    assert torch.allclose((ahead - x_t) / step, velocity)
    # From x_t and the velocity both ends come back.
    assert torch.allclose(x_t + (1 - t.view(-1, 1, 1)) * velocity, data)
    assert torch.allclose(x_t - t.view(-1, 1, 1) * velocity, noise)


def test_loss_is_per_image_mean_square():
    data, noise = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    _, velocity = fd.straight_path(data, noise, torch.rand(3))
    loss = fd.flow_matching_loss(torch.zeros_like(velocity), velocity)
    by_hand = torch.stack([((data[i] - noise[i]) ** 2).mean() for i in range(3)])
    assert torch.allclose(loss, by_hand)
    assert fd.flow_matching_loss(data - noise, velocity).abs().max() == 0


def test_euler_is_exact_on_a_constant_field():
    noise, field = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for steps in (1, 7, 50):
        assert torch.allclose(
            fd.euler_sample(lambda x, t: field, noise, steps), noise + field, atol=1e-12
        )


def test_euler_has_order_one_on_a_linear_field():
    """dx/dt = −x: halving the step must halve the error."""
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [
        abs(float(fd.euler_sample(lambda x, t: -x, start, n)) - math.exp(-1))
        for n in (64, 128, 256)
    ]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(0.97 < o < 1.03 for o in orders), orders


def test_euler_passes_rising_times_from_zero():
    seen = []
    fd.euler_sample(
        lambda x, t: seen.append(float(t[0])) or torch.zeros_like(x), torch.zeros(1, 1), 4
    )
    assert seen == [0.0, 0.25, 0.5, 0.75]


# -- the network ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "double, single, billions",
    [(1, 2, 0.687), (2, 4, 1.310), (3, 6, 1.933), (4, 8, 2.556), (19, 38, 11.901)],
)
def test_parameter_counts(double, single, billions):
    """Tab. 7: 1.31 B and 11.90 B; guidance embedding included."""
    with torch.device("meta"):
        denoiser = fd.FlowDenoiser(
            fd.FlowDenoiserConfig(double_blocks=double, single_blocks=single)
        )
    assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_flux_names_and_shapes():
    """A sample of FLUX.1's published state dict, with its shapes, and the total of 780 tensors."""
    with torch.device("meta"):
        state = fd.FlowDenoiser(
            fd.FlowDenoiserConfig(double_blocks=19, single_blocks=38)
        ).state_dict()
    published = {
        "img_in.weight": (3072, 64),
        "txt_in.weight": (3072, 4096),
        "time_in.in_layer.weight": (3072, 256),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.out_layer.bias": (3072,),
        "double_blocks.18.img_mod.lin.weight": (18432, 3072),
        "double_blocks.0.txt_attn.qkv.bias": (9216,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
        "double_blocks.3.txt_attn.norm.key_norm.scale": (128,),
        "double_blocks.0.img_attn.proj.weight": (3072, 3072),
        "double_blocks.0.img_mlp.0.weight": (12288, 3072),
        "double_blocks.0.txt_mlp.2.weight": (3072, 12288),
        "single_blocks.37.linear1.weight": (21504, 3072),
        "single_blocks.0.linear2.weight": (3072, 15360),
        "single_blocks.0.modulation.lin.weight": (9216, 3072),
        "single_blocks.0.norm.key_norm.scale": (128,),
        "final_layer.linear.weight": (64, 3072),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    }
    assert {k: tuple(state[k].shape) for k in published} == published
    assert len(state) == 780


def inputs(denoiser, dtype=torch.float32, tokens=1):
    c = denoiser.config
    x = torch.randn(3, c.latent_channels, 8, 6, dtype=dtype)
    return (
        x,
        torch.rand(3, dtype=dtype),
        torch.randn(3, tokens, c.context_dim, dtype=dtype),
        torch.randn(3, c.vector_dim, dtype=dtype),
    )


def test_shapes_and_dependence(tiny_denoiser):
    x, t, context, vector = inputs(tiny_denoiser, tokens=5)
    out = tiny_denoiser(x, t, context, vector)
    assert out.shape == x.shape
    for changed in (
        (x + 1, t, context, vector),
        (x, 1 - t, context, vector),
        (x, t, context + 1, vector),
        (x, t, context, vector + 1),
    ):
        assert not torch.allclose(tiny_denoiser(*changed), out)


def test_images_of_a_batch_do_not_mix(tiny_denoiser):
    x, t, context, vector = inputs(tiny_denoiser)
    whole = tiny_denoiser(x, t, context, vector)
    alone = tiny_denoiser(x[1:2], t[1:2], context[1:2], vector[1:2])
    assert torch.allclose(whole[1:2], alone, atol=1e-5)


def test_flux_time_convention():
    """The same function seen from both ends of time, in float64.

    FLUX's own network f(x, t') is trained on x = (1 − t') data + t' noise with target noise − data.
    With flux_time the module must return −f(x, 1 − t), and its loss in the paper's convention must
    be f's loss in FLUX's.
    """
    torch.manual_seed(0)
    native = fd.FlowDenoiser(TINY_DENOISER).double()
    torch.manual_seed(0)
    ours = fd.FlowDenoiser(dataclasses.replace(TINY_DENOISER, flux_time=True)).double()
    x, t, context, vector = inputs(native, torch.float64)
    assert (ours(x, t, context, vector) + native(x, 1 - t, context, vector)).abs().max() <= 1e-6

    data, noise = torch.randn_like(x), torch.randn_like(x)
    x_t, velocity = fd.straight_path(data, noise, t)
    paper = fd.flow_matching_loss(ours(x_t, t, context, vector), velocity)
    flux_t = (1 - t).view(-1, 1, 1, 1)
    flux_x = (1 - flux_t) * data + flux_t * noise
    flux = (native(flux_x, 1 - t, context, vector) - (noise - data)).square().flatten(1).mean(1)
    assert (paper - flux.float()).abs().max() <= 1e-6


def test_flux_time_is_a_negated_final_layer_and_a_flipped_clock():
    """Negate the final linear layer, feed 1 − t."""
    torch.manual_seed(0)
    ours = fd.FlowDenoiser(dataclasses.replace(TINY_DENOISER, flux_time=True)).double()
    torch.manual_seed(0)
    negated = fd.FlowDenoiser(TINY_DENOISER).double()
    with torch.no_grad():
        negated.final_layer.linear.weight.neg_()
        negated.final_layer.linear.bias.neg_()
    x, t, context, vector = inputs(ours, torch.float64)
    assert (ours(x, t, context, vector) - negated(x, 1 - t, context, vector)).abs().max() <= 1e-6


def test_rope_depends_on_relative_position_only():
    """⟨R(p) q, R(p + d) k⟩ is the same for every p."""
    axes, theta = (4, 6, 6), 10_000.0
    q, k = (
        torch.randn(1, 1, 1, 16, dtype=torch.float64),
        torch.randn(1, 1, 1, 16, dtype=torch.float64),
    )

    def product(p, p2):
        turned = []
        for x, position in ((q, p), (k, p2)):
            angles = fd.rope_angles(torch.tensor([position]), axes, theta)
            turned.append(fd.rotate(x, torch.polar(torch.ones_like(angles), angles)))
        return float((turned[0] * turned[1]).sum())

    assert product((0, 1, 2), (0, 3, 7)) == pytest.approx(product((0, 5, 0), (0, 7, 5)), abs=1e-12)
    assert product((0, 1, 2), (0, 3, 7)) != pytest.approx(product((0, 1, 2), (0, 3, 6)), abs=1e-6)


def test_time_embedding_is_cos_then_sin():
    e = fd.time_embedding(torch.tensor([0.25], dtype=torch.float64), 256)[0]
    assert e[0] == pytest.approx(math.cos(250)) and e[128] == pytest.approx(math.sin(250))
    slowest = 10_000 ** (-127 / 128)
    assert e[127] == pytest.approx(math.cos(250 * slowest)) and len(e) == 256


def test_adaln_zero_starts_at_zero_and_default_does_not(tiny_denoiser):
    zero = fd.FlowDenoiser(dataclasses.replace(TINY_DENOISER, initialisation="adaln-zero"))
    args = inputs(zero)
    assert zero(*args).abs().max() == 0
    assert tiny_denoiser(*args).abs().max() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3}, "width"),
        ({"axes": (8, 8)}, "three even"),
        ({"axes": (5, 5, 6)}, "three even"),
        ({"initialisation": "ones"}, "initialisation"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        fd.FlowDenoiser(dataclasses.replace(TINY_DENOISER, **change))


# -- the turns of RoPE: made once, for whoever asks ----------------------------------------------
class Crossings(TorchDispatchMode):
    """Counts what makes a step wait: tensors from one device to another, and numbers for Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "lift_fresh"):
            devices = {x.device for x in (*args, out) if isinstance(x, torch.Tensor)}
            if len(devices) > 1 or name == "lift_fresh":
                self.found.append(name)
        elif name in ("_local_scalar_dense", "item", "nonzero"):
            self.found.append(name)
        return out


def test_the_counter_of_crossings_counts():
    with FakeTensorMode(), Crossings() as counter:
        torch.arange(3).to("cuda")
        torch.tensor([1.0])
    assert counter.found == ["_to_copy", "lift_fresh"]
    with Crossings() as counter:
        torch.ones(()).item()
    assert counter.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("guidance", [True, False])
def test_no_copy_between_devices_and_no_wait_in_forward(guidance):
    """On a GPU (of fake tensors), from the first call on."""
    with FakeTensorMode():
        with torch.device("cuda"):
            denoiser = fd.FlowDenoiser(dataclasses.replace(TINY_DENOISER, guidance=guidance))
            args = inputs(denoiser)
        with Crossings() as counter:
            assert denoiser(*args).device.type == "cuda"
    assert counter.found == []


def test_turns_are_made_once_and_belong_to_no_module(tiny_denoiser):
    args, before = inputs(tiny_denoiser), set(tiny_denoiser.state_dict())
    fd.rope_turns.cache_clear()
    for _ in range(3):
        tiny_denoiser(*args)
    assert fd.rope_turns.cache_info().misses == 1
    assert set(tiny_denoiser.state_dict()) == before
    twin = pickle.loads(pickle.dumps(copy.deepcopy(tiny_denoiser)))
    assert torch.equal(twin(*args), tiny_denoiser(*args))
    assert twin.double()(*inputs(twin, torch.float64)).dtype == torch.float64
    assert fd.rope_turns.cache_info().misses == 2, "another for another precision"


def test_turns_of_one_world_do_not_leak_into_another(tiny_denoiser):
    """Real, fake and meta tensors of one size, in any order; inference before training."""
    fd.rope_turns.cache_clear()
    args = inputs(tiny_denoiser)
    with torch.inference_mode():
        tiny_denoiser(*args)
    tiny_denoiser(*args).sum().backward()
    for _ in range(2):
        with FakeTensorMode():
            fake = fd.FlowDenoiser(TINY_DENOISER)
            assert fake(*inputs(fake)).shape == args[0].shape
        assert torch.isfinite(tiny_denoiser(*args)).all()
    on_meta = copy.deepcopy(tiny_denoiser).to("meta")
    assert on_meta(*(x.to("meta") for x in args)).device.type == "meta"
    for turns in (tiny_denoiser, on_meta):
        turns(*(x.to(turns.img_in.weight.device) for x in args))
    assert fd.rope_turns.cache_info().misses == 2, "the real one and the meta one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_and_norm_as_they_are_written_down(dtype):
    """Pairs through a matrix; the root mean square by hand, in float64."""
    x, angles = torch.randn(2, 3, 5, 16).to(dtype), torch.rand(5, 8, dtype=torch.float64)
    turned = fd.rotate(x, torch.polar(torch.ones_like(angles), angles).to(torch.complex64))
    even, odd, (cos, sin) = (
        x[..., 0::2].double(),
        x[..., 1::2].double(),
        (angles.cos(), angles.sin()),
    )
    expected = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0, "rtol": 2**-8}
    assert turned.dtype == dtype and torch.allclose(turned.double(), expected, **close)
    norm = fd.RMSNorm(16)
    torch.nn.init.uniform_(norm.scale, 0.5, 1.5)
    by_hand = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close["rtol"] = max(close["rtol"], 2 * close["rtol"])
    assert norm(x).dtype == dtype
    assert torch.allclose(norm(x).double(), by_hand * norm.scale.double(), **close)
