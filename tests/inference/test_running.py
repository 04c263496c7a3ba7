"""Optimised modules with threads, undefined memory, and gradients of the input."""
import pytest
import torch
from in_threads import run_in_threads
from optimised import error, optimised_with, outputs, randomise
from torch import Tensor, nn

from kw_mm import KWConv2d
from kw_mm.ops import cell_gradients, cpu, memory


@pytest.fixture(params=['bases', 'cells'])
def kind(request):
    return request.param


def make_model():
    return randomise(nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),
        KWConv2d(16, 32, 3, padding=1, kw_cfg=dict(cell_num_ratio=2)), nn.BatchNorm2d(32),
        nn.ReLU(), KWConv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        KWConv2d(16, 16, 3, groups=4), KWConv2d(16, 16, 3, 2, 1, groups=16))).double()


def images(*batches, size=15):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, size, size, generator=generator).double() for batch in batches]


def test_two_threads_have_kernels_of_their_own(kind):
    model = make_model()
    twin, _ = optimised_with(kind, model)
    inputs = images(3, 2, 3)
    expected = [outputs(model, x) for x in inputs]
    for i, found in enumerate(run_in_threads(
            lambda i: [outputs(twin, inputs[i]) for _ in range(30)], num_threads=3)):
        for result in found:
            assert error(result, expected[i]) < 1e-10


def test_a_traced_module_in_threads(kind):
    # A traced graph kept the memory of kernels as a constant for all threads: relative error 1.9.
    # The kernels here are large enough for memory to be kept.
    model = randomise(nn.Sequential(KWConv2d(64, 128, 3), nn.ReLU(), KWConv2d(128, 256, 3)))
    twin, _ = optimised_with(kind, model)
    assert twin[2].kernel(torch.zeros(1, 128, 4, 4)).nbytes >= memory.MIN_KEPT
    inputs = [torch.randn(batch, 64, 9, 9) for batch in (1, 2, 1, 3)]
    expected = [outputs(model, x) for x in inputs]
    with torch.no_grad():
        traced = torch.jit.trace(twin, inputs[1])
    for i, found in enumerate(run_in_threads(
            lambda i: [outputs(traced, inputs[i]) for _ in range(10)], num_threads=4)):
        for result in found:
            assert error(result, expected[i]) < 1e-4


def test_results_outlive_the_next_image(kind):
    # They do not share the memory of kernels.
    twin, _ = optimised_with(kind, make_model())
    first, second = images(3, 3)
    found = outputs(twin, first)
    before = [y.clone() for y in found]
    outputs(twin, second)
    assert all(map(torch.equal, found, before))


def poison(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.fill_(float('nan')) if tensor.is_floating_point() else tensor


@pytest.fixture
def nothing_is_zero(monkeypatch):
    """Fills undefined memory with NaN; returns the shapes that were asked for."""
    calls = []

    def poisoned(original):
        def function(*args, **kwargs):
            tensor = original(*args, **kwargs)
            if tensor is not None:
                calls.append(tuple(poison(tensor).shape))
            return tensor

        return function

    for owner, name in ((torch, 'empty'), (torch, 'empty_like'), (Tensor, 'new_empty'),
                        (cpu, 'reused_empty'), (cpu, 'large_empty'),
                        (cell_gradients, 'large_empty')):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    return calls


@pytest.mark.parametrize('sizes', [(1, 3, 1), (3, 2, 0, 3)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_memory_is_written_before_it_is_read(kind, sizes, memory_format, nothing_is_zero):
    # In single precision, where products write into our memory.
    model = make_model().float()
    twin, _ = optimised_with(kind, model)
    for x in images(*sizes):
        x = x.float().contiguous(memory_format=memory_format)
        assert error(outputs(twin, x), outputs(model, x)) < 1e-5
    assert len(nothing_is_zero) > 4  # at least memory for kernels


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_training_writes_memory_before_it_reads_it(dtype, nothing_is_zero):
    # The factors of the cells' gradients are gathered in such memory.
    model = make_model().train().to(dtype)
    x, = images(3)
    grads = torch.autograd.grad(model(x.to(dtype)).square().sum(), list(model.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert nothing_is_zero


@pytest.mark.parametrize('batch', [1, 3])
def test_the_gradient_of_the_input(kind, batch):
    model = make_model()
    twin, _ = optimised_with(kind, model)
    x, = images(batch)
    grads = []
    for net in (model, twin):
        image = x.clone().requires_grad_()
        net(image).square().sum().backward()
        grads.append(image.grad)
    assert error((grads[1],), (grads[0],)) < 1e-10
    assert grads[0].abs().sum() > 0


def test_a_graph_keeps_its_kernels(kind):
    # In shared memory the second image's kernels would have replaced them before the backward pass.
    model = make_model()
    twin, _ = optimised_with(kind, model)
    first, second = (x.requires_grad_() for x in images(3, 3))
    (twin(first).square().sum() + twin(second).sum()).backward()
    expected = torch.autograd.grad(model(first).square().sum(), first)
    assert error((first.grad,), expected) < 1e-10


@pytest.mark.skipif(torch.__version__ < (2, 4), reason='is_contiguous breaks graphs of this torch')
@pytest.mark.parametrize('batch', [1, 3])
def test_compiled_without_graph_breaks(kind, batch):
    model = randomise(nn.Sequential(KWConv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    twin, _ = optimised_with(kind, model)
    compiled = torch.compile(twin, backend='aot_eager', fullgraph=True)
    x, = images(batch)
    assert error(outputs(compiled, x), outputs(model, x)) < 1e-10
