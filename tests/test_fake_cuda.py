"""The step's forward pass and losses on CUDA tensors that hold no numbers: no GPU is needed to see that nothing waits for one,
that no two devices meet and in which precision each product runs."""

import copy
import itertools
import sys
from collections import Counter
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from dense_fixture import DENSE, GRAM, TIED, write_start
from photos import TINY, last, write_photos
from test_mae import TINY as MAE
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import load_config
from pretrain.data.loader import build_dataset, build_loader
from pretrain.methods import find_method
from pretrain.methods.method import Progress
from pretrain.trainer import choose_precision

CUDA = torch.device("cuda", 0)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")
METHODS = {
    "intertwined": (TINY, []),
    "on the device": (TINY, ["data.path=device"]),
    "DINOv2, Sinkhorn-Knopp": (
        TINY,
        ["positions.encoding=standard", "positions.grid=4", "masks.position_share=0", "losses.position=0"]
        + ["masks.content_share=0.5", "positions.augment=false", "losses.centering=sinkhorn_knopp"],
    ),
    "rotary": (TINY, ["positions.encoding=rotary"]),
    "several parts": (TINY, ["step.accumulate=3"]),
    "checkpointed": (TINY, ["step.checkpointing=full", "backbone.drop_path=0.3"]),
    "PaKA": (DENSE, []),
    "PaKA, tied, Gaussian kernel": (DENSE, [*TIED, "alignment.kernel=rbf"]),
    "Gram": (DENSE, GRAM),
    "MAE": (MAE, []),
}


class Recorder(TorchDispatchMode):
    """Counts {(operator, dtype): calls} of the products, and sees that all tensors of one call are on one device."""

    def __init__(self):
        super().__init__()
        self.products = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith(PRODUCTS):
            self.products[name, args[0].dtype] += 1
        return out


def fake(mode, value):
    """The same structure, each tensor one of no memory where it was."""
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: fake(mode, getattr(value, f.name)) for f in fields(value)})
    return [fake(mode, item) for item in value] if isinstance(value, list) else value


def on_cuda(mode, method):
    """A copy whose parameters and buffers are CUDA tensors of no memory."""
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    with mode:
        for module in method.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    empty = torch.empty(old.shape, dtype=old.dtype, device=CUDA)
                    module._parameters[name] = torch.nn.Parameter(empty, old.requires_grad)
            for name, old in module._buffers.items():
                if old is not None:
                    module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=CUDA)
    return method


def method_and_batches(folder, base, words):
    """A method on the CPU, and its first batch in micro-batches."""
    photos = write_photos(folder / "photos")
    start = [f"backbone.weights={write_start(folder / 'start.safetensors')}"] if base is DENSE else []
    settings = load_config(None, last([*base, f"data.root={photos}", *start, *words]))
    parts = settings.step.accumulate
    loader = build_loader(settings, build_dataset(settings), 0, parts)
    return find_method(settings.method)(settings), [batch for batch, _ in itertools.islice(loader, parts)]


def run(method, batches, mode):
    """Forward pass, losses and diagnostics as in a step; the losses' terms, the signs and the products."""
    progress = Progress(iteration=5, total_iters=9, epoch_iters=3, seed=0)
    dtype, autocast = choose_precision("auto", CUDA)
    with mode, Recorder() as recorder, autocast:
        here = [fake(mode, batch).to(CUDA, dtype) for batch in batches]
        prepared = method.prepare(here, progress)
        losses = [method(batch, prepared, i) for i, batch in enumerate(here)]
        signs = method.diagnostics(here, prepared)
    return losses, signs, recorder.products


@pytest.fixture(autouse=True)
def no_cached_tensors():
    """Tables that are kept for a device are made of the tensors at hand: each test has its own."""
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("pretrain."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.mark.parametrize("base, words", METHODS.values(), ids=METHODS)
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, base, words):
    """A number that the host would read, and two devices in one operator, are errors of fake tensors."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: True)
    method, batches = method_and_batches(tmp_path, base, words)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    losses, signs, products = run(on_cuda(mode, method), batches, mode)
    scalars = [loss for terms in losses for loss in (terms.total, *terms.terms.values())]
    for scalar in (*scalars, *signs.values()):
        assert (scalar.device, scalar.shape) == (CUDA, ())
    assert {scalar.dtype for scalar in scalars} == {torch.float32}
    # The ViT and the MLPs run in bfloat16, logits in float16 (METHOD.md), positions, centers and attention's own sums in float32.
    assert {dtype for name, dtype in products if name == "addmm"} == {torch.bfloat16}
    assert (("mm", torch.float16) in products) == (base is TINY)


def test_what_waits_is_found(tmp_path):
    """The check itself: a method that reads its loss on the host."""
    method, batches = method_and_batches(tmp_path, TINY, [])
    plain = type(method).loss

    class Waits(type(method)):
        def loss(self, *args):
            terms = plain(self, *args)
            return terms._replace(total=terms.total * float(terms.total))

    method.__class__ = Waits
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with pytest.raises(DataDependentOutputException):
        run(on_cuda(mode, method), batches, mode)
