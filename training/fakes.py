"""A GPU, its ranks and their memory, where there are none: what plan.py counts with.

Fake tensors have shape, dtype and device, and no memory: a model of them can take a whole step, and
every kernel says what it would return. What this file adds: they do as a GPU's do, ranks are
imagined around them, and a watcher sees them come and go.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

# ------------------------------------------------------------------------------------------------
# A GPU that is not there
# ------------------------------------------------------------------------------------------------
# PyTorch refuses a backward pass on a GPU's fake tensors where there is no GPU. So all fake tensors
# are the CPU's, and where the two devices differ they are told to do as a GPU does.
AS_FLOAT32 = {
    F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss,
    F.cosine_similarity, torch.softmax, torch.log_softmax, torch.rms_norm, torch.rsqrt, torch.exp,
    torch.pow, torch.sum, torch.norm, torch.cosine_similarity, torch.Tensor.softmax,
    torch.Tensor.log_softmax, torch.Tensor.rsqrt, torch.Tensor.exp, torch.Tensor.pow,
    torch.Tensor.sum, torch.Tensor.norm,
}  # fmt: skip


class AsOnGPU(TorchFunctionMode):
    """Autocast's list of what stays in float32 is longer on a GPU, dropout keeps one byte of each
    number, and RMSNorm is one kernel (for which LayerNorm's stands, with a mean more)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in AS_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [in_float32(x) for x in args]
            kwargs = {name: in_float32(x) for name, x in kwargs.items()}
        if func is F.rms_norm and args[0].device.type == "cpu":
            return F.layer_norm(*args, **kwargs)
        if func is F.dropout and kwargs.get("training", True):
            chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return torch.native_dropout(args[0], chance, True)[0]
        return func(*args, **kwargs)


def in_float32(x):
    half = isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16
    return x.float() if half else x


@contextmanager
def flash_attention():
    """On a GPU, attention keeps q, k, v and its result, never the matrix of all pairs. A fake
    tensor cannot say which kernel a GPU would choose, so it is called by name."""
    usual = F.scaled_dot_product_attention

    def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        result = torch.bfloat16 if autocast else q.dtype
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(q, k, v, dropout_p, is_causal, False, scale=scale)[0].to(result)

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


@contextmanager
def matrix_attention():
    """Attention as two products, which small CPU runs use; neither flash nor the fast path."""
    flash = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(flash[0])
        torch.backends.mha.set_fastpath_enabled(flash[1])


@contextmanager
def without_memory(device: str) -> Iterator[None]:
    """Fake tensors that behave as those of `device`, "cuda" or "cpu"."""
    with ExitStack() as stack:
        stack.enter_context(matrix_attention())  # no fast path on either
        stack.enter_context(FakeTensorMode())
        if device == "cuda":
            stack.enter_context(flash_attention())
            stack.enter_context(AsOnGPU())
        yield


@contextmanager
def imagined_ranks(count: int) -> Iterator[object]:
    """A process group of `count` ranks that exchange nothing, and its mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# What is alive
# ------------------------------------------------------------------------------------------------
class Watch(TorchDispatchMode):
    """Sees every tensor that is made, fake or real: how many bytes are alive, and the most at once
    in each part of a step. And adds up the operations of matrix products, convolutions and
    attentions, a product counted as two."""

    def __init__(self, tensors=()):
        super().__init__()
        self.now = self.flops = 0
        self.part = "forward pass"
        self.peaks: dict[str, int] = {}
        self.sizes: dict[int, int] = {}  # of storages, by their numbers
        self.watching: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self.hold(tensor)

    def hold(self, tensor: torch.Tensor) -> None:
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.watching[key] = weakref.ref(storage, lambda _: self.let_go(key))
            self.resize(key, storage.nbytes())

    def let_go(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
        del self.watching[key]

    def resize(self, key: int, size: int) -> None:
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peaks[self.part] = max(self.peaks.get(self.part, 0), self.now)

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What comes now belongs to `part`."""
        before, self.part = self.part, part
        self.peaks[part] = max(self.peaks.get(part, 0), self.now)
        yield
        self.part = before

    def __enter__(self):
        # FSDP empties the storage of a collected weight and fills it again: no tensor comes or goes
        usual = self.usual = torch.UntypedStorage.resize_

        def resize_(storage, size):
            result = usual(storage, size)
            if storage._cdata in self.sizes:
                self.resize(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.usual
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is shared out; another as it is."""
    return getattr(tensor, "_local_tensor", tensor)
