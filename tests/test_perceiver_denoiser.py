"""perceiver_denoiser.py: no leak, a set of visible tokens, masks, the loss, parallel decoding."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_PERCEIVER
from test_flow_denoiser import Crossings
from torch._subclasses.fake_tensor import FakeTensorMode

import perceiver_denoiser as pd

LAYERS = [2, 4, 6, 8]


def build(**changes):
    torch.manual_seed(0)
    return pd.PerceiverDenoiser(dataclasses.replace(TINY_PERCEIVER, **changes)).eval()


def example(batch=3, count=10, tokens=16):
    """Codes, indices, a random split and a condition."""
    g = torch.Generator().manual_seed(1)
    indices = torch.randint(24, (batch, tokens), generator=g)
    book = torch.randn(24, 6, generator=g)
    order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(batch)])
    visible, masked = pd.split_positions(order, count)
    condition = torch.randn(batch, 1, 32, generator=g)
    return book, indices, visible, masked, condition


def other_indices(indices, positions):
    """The same indices but for other ones at `positions`."""
    return indices.scatter(1, positions, (indices.gather(1, positions) + 7) % 24)


# -- what the logits may depend on ---------------------------------------------------------------
@pytest.mark.parametrize("learnt", [0, 5])
@pytest.mark.parametrize("layers", LAYERS)
def test_no_masked_index_reaches_any_logit(layers, learnt):
    """Bit-equal, changing all masked indices at once and one at a time."""
    model = build(layers=layers, learnt_latents=learnt)
    book, indices, visible, masked, condition = example()
    before = model(book[indices], visible, masked, condition)
    changed = other_indices(indices, masked)
    assert not torch.equal(changed, indices)
    assert torch.equal(model(book[changed], visible, masked, condition), before)
    for position in masked.T[:, :, None]:
        changed = other_indices(indices, position)
        assert torch.equal(model(book[changed], visible, masked, condition), before)
    # The test could not fail if the codes were not read at all: visible ones are.
    changed = other_indices(indices, visible)
    assert not torch.allclose(model(book[changed], visible, masked, condition), before, atol=1e-5)


@pytest.mark.parametrize("layers", LAYERS)
def test_visible_tokens_are_a_set(layers):
    """Permuted together with their positions they give the same loss; so do masked ones."""
    model = build(layers=layers)
    book, indices, visible, masked, condition = example()

    def loss(visible, masked):
        logits = model(book[indices], visible, masked, condition)
        return pd.masked_cross_entropy(logits, indices, masked)[0]

    before = loss(visible, masked)
    assert (loss(visible.flip(1), masked) - before).abs().max() <= 1e-5
    assert (loss(visible, masked.flip(1)) - before).abs().max() <= 1e-5
    moved = (visible + 1) % 16  # the same codes elsewhere are something else
    assert (loss(moved, masked) - before).abs().max() > 1e-4


@pytest.mark.parametrize("learnt", [0, 5])
@pytest.mark.parametrize("count", [10, 16])
def test_condition_changes_the_logits(count, learnt):
    """Also where nothing is visible: the start token carries it."""
    model = build(learnt_latents=learnt)
    book, indices, visible, masked, condition = example(count=count)
    before = model(book[indices], visible, masked, condition)
    after = model(book[indices], visible, masked, condition.flip(0))
    assert (after - before)[0].abs().max() > 1e-4
    assert torch.equal(after[1], before[1]), "the middle image kept its condition"


def test_positions_tell_masked_tokens_apart():
    model = build()
    book, indices, visible, masked, condition = example()
    logits = model(book[indices], visible, masked, condition)
    assert logits.shape == (3, 10, 24)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-4


# -- masks ---------------------------------------------------------------------------------------
def test_mask_ratio_over_10_000_draws():
    """U(0.5, 0.9): range, mean and spread."""
    g = torch.Generator().manual_seed(0)
    ratios = torch.tensor([pd.draw_masked_count(196, 0.5, 0.9, g) for _ in range(10_000)]) / 196
    assert ratios.min() == 98 / 196 and abs(float(ratios.max()) - 176 / 196) < 1e-6
    assert abs(float(ratios.mean()) - 0.7) <= 0.004  # standard error 0.0012
    assert abs(float(ratios.std()) - 0.4 / math.sqrt(12)) <= 0.003


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9])
def test_fixed_ratios_of_table_s1(ratio):
    counts = {pd.draw_masked_count(196, ratio, ratio) for _ in range(20)}
    assert counts == {round(ratio * 196)}


@pytest.mark.parametrize("low, high", [(0, 0.5), (0.9, 0.5), (0.5, 1.1), (-0.1, 0.5)])
def test_wrong_ranges_are_refused(low, high):
    with pytest.raises(ValueError, match="expected 0 < from"):
        pd.draw_masked_count(196, low, high)


def test_visible_and_masked_are_a_partition():
    for count in (1, 8, 15, 16):
        _, _, visible, masked, _ = example(batch=50, count=count)
        assert masked.shape == (50, count)
        joined = torch.cat([visible, masked], dim=1).sort(dim=1).values
        assert torch.equal(joined, torch.arange(16).expand(50, 16))


# -- the loss ------------------------------------------------------------------------------------
def test_masked_cross_entropy_by_hand():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    indices = torch.tensor([[4, 3, 2, 1], [0, 1, 2, 3]])
    masked = torch.tensor([[2, 0, 3], [1, 2, 0]])
    loss, accuracy = pd.masked_cross_entropy(logits, indices, masked)
    for b in range(2):
        costs, right = [], []
        for m in range(3):
            row = logits[b, m].tolist()
            label = int(indices[b, masked[b, m]])
            costs.append(math.log(sum(math.exp(x) for x in row)) - row[label])
            right.append(row.index(max(row)) == label)
        assert abs(float(loss[b]) - sum(costs) / 3) <= 1e-6
        assert float(accuracy[b]) == pytest.approx(sum(right) / 3)


@pytest.mark.parametrize("codes", [1024, 16384])
def test_untrained_guesses_uniformly(codes):
    model = build(codes=codes, code_width=8)
    g = torch.Generator().manual_seed(1)
    indices = torch.randint(codes, (4, 16), generator=g)
    order = torch.stack([torch.randperm(16, generator=g) for _ in range(4)])
    visible, masked = pd.split_positions(order, 12)
    book = torch.randn(codes, 8, generator=g)
    logits = model(book[indices], visible, masked, torch.randn(4, 1, 32, generator=g))
    loss, accuracy = pd.masked_cross_entropy(logits, indices, masked)
    assert abs(float(loss.detach().mean()) - math.log(codes)) <= 0.1
    assert float(accuracy.mean()) <= 0.1


def test_learns_what_only_the_condition_tells():
    """Two pictures, nothing visible: the loss falls to 0 if and only if the condition is read."""
    model = build().train()
    indices = torch.randint(24, (2, 16), generator=torch.Generator().manual_seed(5))
    condition = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(6))
    visible, masked = pd.split_positions(torch.arange(16).expand(2, 16), 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    codes = torch.randn(24, 6)[indices]
    for _ in range(150):
        logits = model(codes, visible, masked, condition)
        loss = pd.masked_cross_entropy(logits, indices, masked)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    wrong = model(codes, visible, masked, condition.flip(0))
    assert pd.masked_cross_entropy(wrong, indices, masked)[0].mean() > 1


# -- the size ------------------------------------------------------------------------------------
@pytest.mark.parametrize("codes", [1024, 16384])
@pytest.mark.parametrize("layers", LAYERS)
def test_parameter_counts(layers, codes):
    """Counted by hand: a layer is 16·D² weights and 21·D biases and norms."""
    config = pd.PerceiverDenoiserConfig(codes=codes, layers=layers)
    with torch.device("meta"):
        count = sum(p.numel() for p in pd.PerceiverDenoiser(config).parameters())
    d, n, e = 1024, 196, 256
    layer = 16 * d * d + (8 * d) + (5 * d) + (4 * 2 * d)  # weights, attention, MLP, four norms
    conditioner = 4 * d * d + 4 * d + 2 * 2 * d
    rest = e * d + d + n * d + 2 * d + 2 * d + d * codes + codes
    assert count == layers * layer + conditioner + rest


def test_positions_are_distinct_and_two_dimensional():
    table = pd.sincos_positions(24, 64)
    assert table.shape == (576, 64) and len(torch.unique(table, dim=0)) == 576
    grid = table.view(24, 24, 64)
    assert torch.equal(grid[3, :, :32], grid[3, :1, :32].expand(24, -1)), "a row shares its half"
    assert torch.equal(grid[:, 5, 32:], grid[:1, 5, 32:].expand(24, -1)), "and so does a column"


@pytest.mark.parametrize("changes, message", [({"width": 30}, "heads|of 4"), ({"heads": 5}, "5 h")])
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


# -- parallel decoding ---------------------------------------------------------------------------
def oracle(truth, wrong=0.0):
    """Logits that know the answer, with a spread in how sure they are."""

    def logits_of(indices, visible, masked):
        sure = 5 + 10 * torch.rand(masked.shape, generator=torch.Generator().manual_seed(0))
        return F.one_hot(truth.gather(1, masked), 24) * sure[..., None]

    return logits_of


@pytest.mark.parametrize("steps", [1, 3, 8, 40])
def test_decoding_fills_everything_and_touches_nothing_known(steps):
    truth = torch.randint(24, (3, 16), generator=torch.Generator().manual_seed(0))
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[0, :4], known[1, 3:7], known[2, 12:] = True, True, True
    start = torch.where(known, (truth + 1) % 24, -1)  # deliberately wrong: must be left alone
    seen = []

    def spy(indices, visible, masked):
        assert (indices.gather(1, visible) >= 0).all(), "only what is known is shown"
        seen.append(masked.shape[1])
        return 100 * F.one_hot(truth.gather(1, masked), 24).float()

    generator = torch.Generator().manual_seed(0)
    out = pd.parallel_decode(spy, start, known, steps, generator=generator)
    assert torch.equal(out[~known], truth[~known]) and torch.equal(out[known], start[known])
    assert seen[0] == 12 and len(seen) == min(steps, 12) and seen == sorted(seen, reverse=True)


def test_decoding_keeps_the_surest_first():
    """At temperature 0 the tokens shown next are those of the highest probability."""
    rounds = []

    def logits_of(indices, visible, masked):
        """Position j is uniform over j + 1 codes: whichever is drawn, its log p is −ln(j + 1)."""
        rounds.append(set(masked[0].tolist()))
        allowed = torch.arange(24) <= masked[..., None]
        return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

    known = torch.zeros(1, 16, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    pd.parallel_decode(logits_of, torch.zeros(1, 16, dtype=torch.long), known, 4, 0.0, generator)
    assert len(rounds) == 4
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert max(before - after) < min(after), "what stays hidden was less sure"


def test_decoding_is_a_function_of_its_generator():
    model = build()
    book, indices, _, _, condition = example()

    def logits_of(indices, visible, masked):
        return model(book[indices], visible, masked, condition)

    def draw(seed):
        known = torch.zeros_like(indices, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        return pd.parallel_decode(logits_of, indices, known, generator=generator)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_gradients_do_not_depend_on_the_order_of_threads():
    """Bit-equal however often they are computed, with two threads and at a size where indexing a
    parameter is not: there, 199 of 200 repetitions differed."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = pd.PerceiverDenoiserConfig(codes=64, code_width=32, side=8, width=128, heads=4)
        denoiser = pd.PerceiverDenoiser(dataclasses.replace(config, layers=2))
        order = torch.stack([torch.randperm(64) for _ in range(16)])
        visible, masked = pd.split_positions(order, 45)
        codes, condition = torch.randn(16, 64, 32), torch.randn(16, 1, 128)
        seen = set()
        for _ in range(10):
            denoiser.zero_grad()
            denoiser(codes, visible, masked, condition).square().mean().backward()
            seen.add(denoiser.position.grad.numpy().tobytes())
        assert len(seen) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("learnt", [0, 3])
def test_no_copy_between_devices_and_no_wait_in_forward(learnt):
    """On a GPU (of fake tensors): loss included, nothing is asked of the CPU."""
    with FakeTensorMode():
        with torch.device("cuda"):
            denoiser = pd.PerceiverDenoiser(
                dataclasses.replace(TINY_PERCEIVER, learnt_latents=learnt)
            )
            codes, condition = torch.randn(3, 16, 6), torch.randn(3, 1, 32)
            indices = torch.randint(24, (3, 16))
            visible, masked = pd.split_positions(torch.arange(16).expand(3, -1), 10)
        with Crossings() as counter:
            logits = denoiser(codes, visible, masked, condition)
            loss, _ = pd.masked_cross_entropy(logits, indices, masked)
    assert loss.device.type == "cuda" and counter.found == []
