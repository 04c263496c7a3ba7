"""Collected gradients of cells equal ordinary ones in every situation."""
import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_threads import run_in_threads
from torch import nn
from torch.utils.checkpoint import checkpoint

from kw_mm import ConvSpec, KWConv2d, plan_warehouses
from kw_mm.layers import WarehouseManager
from kw_mm.ops import assemble_kernel, collect_gradients, reference

# Grids of three layers that share cells of 2x3, with their kernel sizes.
USES = (((9, 1, 2), (3, 3)), ((1, 2, 1), (1, 1)), ((2, 1, 1), (2, 1)))


def make_cells(dtype=torch.float64):
    return nn.Parameter(torch.randn(5, 2, 3, 1, 1, dtype=dtype))


def make_alphas(batch=3, dtype=torch.float64):
    return [torch.randn(batch, grid[0] * grid[1] * grid[2], 5, dtype=dtype, requires_grad=True)
            for grid, _ in USES]


def collected(alpha, cells, *use):
    return assemble_kernel(alpha, collect_gradients(cells), *use)


def loss(cells, alphas, assemble=collected):
    """Not linear in the kernels, so that any confusion changes the result."""
    return sum(assemble(alpha, cells, *use).sin().pow(2).sum()
               for alpha, use in zip(alphas, USES))


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(0, 4), uses=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=6),
       rows_first=st.booleans(), width=st.sampled_from([3, 256]))
def test_the_gradient_of_shared_cells_is_the_sum(batch, uses, rows_first, width):
    cells = nn.Parameter(torch.randn(5, 2, width, 1, 1, dtype=torch.float64))
    if rows_first:  # as inference stores them
        cells.data = cells.data.transpose(0, 1).contiguous().transpose(0, 1)
    alphas = [torch.randn(batch, *make_alphas()[use].shape[1:], dtype=torch.float64,
                          requires_grad=True) for use in uses]
    actual, expected = (
        torch.autograd.grad(sum(f(alpha, cells, *USES[use]).sin().sum()
                                for alpha, use in zip(alphas, uses)) + 0 * cells.sum(),
                            [cells, *alphas], materialize_grads=True)
        for f in (collected, reference.assemble_kernel))
    check(actual, expected)


@pytest.mark.parametrize('shape', [(2, 2, 256, 1, 1), (2, 128, 128, 1, 1)])
def test_an_empty_batch_of_large_cells(shape):
    # Summing in parts failed where there are no numbers.
    cells = nn.Parameter(torch.randn(*shape))
    alpha = torch.randn(0, 1, 2, requires_grad=True)
    collected(alpha, cells, (1, 1, 1), (1, 1)).sum().backward()
    assert alpha.grad.shape == alpha.shape
    assert cells.grad.abs().sum() == 0


def test_backward_accumulates_into_the_parameter():
    cells, alphas = make_cells(), make_alphas()
    expected, = torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells)
    for _ in range(2):
        loss(cells, alphas).backward()
    check(cells.grad, 2 * expected)
    check(alphas[1].grad, 2 * torch.autograd.grad(loss(cells, alphas), alphas[1])[0])


def test_a_pass_for_other_gradients_leaves_nothing_behind():
    # Factors of the first pass would have been counted again in the second.
    cells, alphas = make_cells(), make_alphas()
    x = torch.randn(3, requires_grad=True, dtype=torch.float64)
    total = loss(cells, [alpha * x.view(3, 1, 1) for alpha in alphas])
    twin = loss(cells, [alpha * x.view(3, 1, 1) for alpha in alphas], assemble_kernel)
    check(torch.autograd.grad(total, x, retain_graph=True), torch.autograd.grad(
        twin, x, retain_graph=True))
    total.backward()
    check(cells.grad, torch.autograd.grad(twin, cells)[0])


def num_tensors():
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def test_a_pass_for_other_gradients_keeps_no_memory():
    # Its factors are never fetched, and would have accumulated while the graph exists.
    cells, alphas = make_cells(), make_alphas()
    total = loss(cells, alphas)
    counts = []
    for _ in range(3):
        torch.autograd.grad(total, alphas, retain_graph=True)
        counts.append(num_tensors())
    assert counts[0] == counts[-1]


def test_two_passes_over_one_graph():
    cells, alphas = make_cells(), make_alphas()
    total = loss(cells, alphas)
    first, = torch.autograd.grad(total, cells, retain_graph=True)
    second, = torch.autograd.grad(2 * total, cells)
    check(first, torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells)[0])
    check(second, 2 * first)


def test_parts_of_a_graph_have_passes_of_their_own():
    # A collector that waited for all uses would return nothing in the first pass.
    cells, alphas = make_cells(), make_alphas()
    kernels = [collected(alpha, cells, *use) for alpha, use in zip(alphas, USES)]
    parts = [torch.autograd.grad(kernel.sin().sum(), cells)[0] for kernel in kernels]
    for part, alpha, use in zip(parts, alphas, USES):
        check(part, torch.autograd.grad(assemble_kernel(alpha, cells, *use).sin().sum(), cells)[0])


def test_second_derivatives():
    def second(assemble):
        first = torch.autograd.grad(loss(cells, alphas, assemble), [cells, *alphas],
                                    create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in first), [cells, *alphas])

    cells, alphas = make_cells(), make_alphas()
    for actual, expected in zip(second(collected), second(assemble_kernel)):
        check(actual, expected)


def test_gradgradcheck():
    # By finite differences, for which cells are changed in place.
    cells, alpha = make_cells(), make_alphas(2)[1]

    def f(alpha, cells):
        return collected(alpha, cells, *USES[1]) + collected(2 * alpha, cells, *USES[1])

    assert torch.autograd.gradcheck(f, (alpha, cells))
    assert torch.autograd.gradgradcheck(f, (alpha, cells))


def test_a_penalty_on_the_gradient_of_the_input():
    # Only alpha's gradient is computed, with a graph that leads to the cells.
    def penalty(assemble):
        grads = torch.autograd.grad(loss(cells, alphas, assemble), alphas, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), cells)

    cells, alphas = make_cells(), make_alphas()
    check(penalty(collected), penalty(assemble_kernel))


def test_cells_that_are_also_used_directly():
    def direct(assemble, use=lambda cells: cells):
        return loss(cells, alphas, assemble) + use(cells).pow(3).sum()

    cells, alphas = make_cells(), make_alphas()
    expected = torch.autograd.grad(direct(assemble_kernel), cells)
    check(torch.autograd.grad(direct(collected), cells), expected)
    # The collector's result can be used like any tensor.
    check(torch.autograd.grad(direct(collected, collect_gradients), cells), expected)


def test_frozen_attention():
    cells, alphas = make_cells(), [alpha.detach() for alpha in make_alphas()]
    check(torch.autograd.grad(loss(cells, alphas), cells),
          torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells))


def test_frozen_cells():
    cells, alphas = make_cells().requires_grad_(False), make_alphas()
    assert collect_gradients(cells) is cells
    check(torch.autograd.grad(loss(cells, alphas), alphas),
          torch.autograd.grad(loss(cells, alphas, assemble_kernel), alphas))


def test_cells_that_are_frozen_and_thawed_while_a_graph_is_alive():
    cells, alphas = make_cells(), make_alphas()
    total = loss(cells, alphas)
    cells.requires_grad_(False)
    assert collect_gradients(cells) is cells
    cells.requires_grad_(True)
    (total + loss(cells, alphas)).backward()
    check(cells.grad, 2 * torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells)[0])


def test_cells_of_another_origin_are_not_collected():
    # Only for a parameter is it certain that nobody needs an intermediate gradient.
    cells = make_cells() * 2
    assert collect_gradients(cells) is cells


class Fails(torch.autograd.Function):
    """Identity whose backward pass does not always work."""

    broken = True

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if Fails.broken:
            raise ArithmeticError('no gradient')
        return grad


@pytest.mark.parametrize('same_graph', [True, False])
def test_after_a_pass_that_failed(same_graph, monkeypatch):
    # Two layers have stored their factors when the third fails.
    cells, alphas = make_cells(), make_alphas()

    def chain():
        first = collected(alphas[0], cells, *USES[0]).sin().sum()
        second = collected(Fails.apply(alphas[1]) * first, cells, *USES[1]).sin().sum()
        return collected(alphas[2] * second, cells, *USES[2]).sin().sum()

    total = chain()
    with pytest.raises(ArithmeticError):
        total.backward(retain_graph=True)
    assert cells.grad is None
    for alpha in alphas:
        alpha.grad = None
    monkeypatch.setattr(Fails, 'broken', False)
    (total if same_graph else chain()).backward()
    actual = cells.grad, *(alpha.grad for alpha in alphas)
    monkeypatch.setitem(globals(), 'collected', assemble_kernel)
    check(actual, torch.autograd.grad(chain(), [cells, *alphas]))


def test_two_threads():
    cells, alphas = make_cells(), [make_alphas() for _ in range(2)]

    def gradients(i):
        return [torch.autograd.grad(loss(cells, alphas[i]), [cells, *alphas[i]])
                for _ in range(20)]

    for i, found in enumerate(run_in_threads(gradients)):
        expected = torch.autograd.grad(loss(cells, alphas[i], assemble_kernel),
                                       [cells, *alphas[i]])
        for grads in found:
            check(grads, expected)


def test_two_threads_go_back_through_one_graph():
    # Keyed by graph and not by pass, the factors of one pass would end in the other's product.
    cells, alphas = make_cells(), make_alphas()
    total = loss(cells, alphas)
    expected, = torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells)
    found = run_in_threads(lambda i: [
        torch.autograd.grad((i + 1) * total, cells, retain_graph=True)[0] for _ in range(20)])
    for i, grads in enumerate(found):
        for grad in grads:
            check(grad, (i + 1) * expected)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    cells, alphas = make_cells(), make_alphas()
    with mode():
        assert collect_gradients(cells) is cells
        kernel = collected(alphas[0], cells, *USES[0])
    assert not kernel.requires_grad
    check(kernel, assemble_kernel(alphas[0], cells, *USES[0]).detach())


def test_a_graph_that_is_alive_is_not_seen_without_gradients():
    cells, alphas = make_cells(), make_alphas()
    total = loss(cells, alphas)
    with torch.no_grad():
        assert not collected(alphas[0], cells, *USES[0]).requires_grad
    total.backward()
    check(cells.grad, torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells)[0])


def test_compiled():
    cells, alphas = make_cells(), make_alphas()
    compiled = torch.compile(loss, backend='aot_eager', fullgraph=True)
    check(torch.autograd.grad(compiled(cells, alphas), [cells, *alphas]),
          torch.autograd.grad(loss(cells, alphas, assemble_kernel), [cells, *alphas]))


def test_function_transforms():
    cells, alphas = make_cells(), make_alphas()
    expected, = torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells)
    check(torch.func.grad(loss)(cells, alphas), expected)
    # For a parameter that the function closes over.
    check(torch.func.grad(lambda alpha: loss(cells, [alpha, *alphas[1:]]))(alphas[0]),
          torch.autograd.grad(loss(cells, alphas, assemble_kernel), alphas[0])[0])
    batches = torch.stack([alphas[0], 2 * alphas[0]])
    check(torch.func.vmap(lambda alpha: collected(alpha, cells, *USES[0]))(batches),
          torch.stack([assemble_kernel(alpha, cells, *USES[0]) for alpha in batches]))


def test_a_change_of_dtype_while_a_graph_is_alive():
    # The collector of the old dtype would be found, because the parameter is the same object.
    module = nn.Module()
    module.cells, alphas = make_cells(), make_alphas()
    old = loss(module.cells, alphas)
    module.float()
    alphas = [alpha.detach().float().requires_grad_() for alpha in alphas]
    loss(module.cells, alphas).backward()
    assert module.cells.grad.dtype == torch.float32
    torch.testing.assert_close(module.cells.grad, torch.autograd.grad(
        loss(module.cells, alphas, assemble_kernel), module.cells)[0])
    assert old.dtype == torch.float64


@pytest.mark.parametrize('amp', [False, True])
def test_new_memory_while_a_graph_is_alive(amp):
    # As ``.to()`` and a swap of weights do; the version of the parameter stays the same.
    cells, alphas = make_cells(torch.float32), make_alphas(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        old = loss(cells, alphas)
        cells.data = torch.randn_like(cells)
        new, expected = loss(cells, alphas), loss(cells, alphas, assemble_kernel)
    assert abs(new - old) > 0.1
    torch.testing.assert_close(new, expected, rtol=0.02 if amp else 1e-5, atol=0)


def test_an_optimizer_that_steps_in_the_backward_pass():
    # Once for a step, with the whole gradient, and the next forward pass sees the new values.
    cells, alphas = make_cells(), make_alphas()
    steps = []

    def step(parameter):
        steps.append(parameter.grad)
        parameter.grad = None
        with torch.no_grad():
            parameter.sub_(0.1 * steps[-1])

    cells.register_post_accumulate_grad_hook(step)
    for count in (1, 2):
        expected, = torch.autograd.grad(loss(cells, alphas, assemble_kernel), cells)
        loss(cells, alphas).backward()
        assert len(steps) == count
        check(steps[-1], expected)


@pytest.mark.parametrize('amp', [False, True])
def test_an_optimizer_s_step_while_a_graph_is_alive(amp):
    # A view of the parameter lost its grad_fn in the step, and the next forward pass raised;
    # under autocast the converted copy still had the old values.
    cells, alphas = make_cells(torch.float32), make_alphas(dtype=torch.float32)
    optimizer = torch.optim.SGD([cells], lr=0.5)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        old = loss(cells, alphas)
        loss(cells, alphas).backward()
        optimizer.step()
        optimizer.zero_grad()
        new, expected = loss(cells, alphas), loss(cells, alphas, assemble_kernel)
        assert abs(new - old) > 0.1
        torch.testing.assert_close(new, expected, rtol=0.02 if amp else 1e-5, atol=0)
        new.backward()
    torch.testing.assert_close(cells.grad, torch.autograd.grad(expected, cells)[0],
                               rtol=0.05 if amp else 1e-5, atol=0.1 if amp else 1e-5)


@pytest.mark.parametrize('amp', [False, True])
def test_training_as_ever(amp):
    # Several steps, the loss of the last one still alive in each.
    losses = []
    for assemble in (collected, assemble_kernel):
        torch.manual_seed(0)
        cells, alphas = make_cells(torch.float32), make_alphas(dtype=torch.float32)
        optimizer = torch.optim.SGD([cells, *alphas], lr=0.01, momentum=0.9)
        for _ in range(5):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                total = loss(cells, alphas, assemble)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        losses.append(total.detach())
    torch.testing.assert_close(*losses, rtol=0.02 if amp else 1e-5, atol=0)


def test_a_copy_made_while_a_graph_is_alive():
    cells, alphas = make_cells(), make_alphas()
    total = loss(cells, alphas)
    twin = copy.deepcopy(cells)
    loss(twin, alphas).backward()
    assert cells.grad is None
    total.backward()
    check(cells.grad, twin.grad)


class Net(nn.Module):
    """Two layers of one warehouse."""

    def __init__(self):
        super().__init__()
        specs = [ConvSpec('a', 4, 8, (3, 3)), ConvSpec('b', 8, 4, (1, 1))]
        self.warehouse_manager = WarehouseManager(plan_warehouses(specs, dict(cell_num_ratio=2)))
        self.a = KWConv2d(4, 8, 3, padding=1, bias=False, manager=self.warehouse_manager, name='a')
        self.b = KWConv2d(8, 4, 1, bias=False, manager=self.warehouse_manager, name='b')

    def forward(self, x):
        return self.b(self.a(x).relu())


def gradients(net, total):
    net.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize('amp', [False, True])
def test_activation_checkpointing(use_reentrant, amp):
    # A backward pass within another one, through cells that a layer outside of it also uses.
    net = Net().eval()
    x = torch.randn(3, 4, 5, 6, requires_grad=True)

    def total(first):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            return net(net(first(x))).float().square().sum()

    plain = gradients(net, total(net))
    again = gradients(net, total(lambda x: checkpoint(net, x, use_reentrant=use_reentrant)))
    for name, grad in plain.items():
        bound = (0.05 if amp else 1e-4) * grad.abs().max().item()
        torch.testing.assert_close(again[name], grad, rtol=0, atol=bound, msg=name)


def test_checkpointed_layers_share_one_copy_of_the_cells():
    # Checkpointing freed the collector after each layer, so each layer made its own copy.
    cells = nn.Parameter(torch.randn(5, 2, 256, 1, 1))
    alphas, counts = make_alphas(dtype=torch.float32) * 2, []
    kernels = []
    for alpha, use in zip(alphas, USES * 2):
        kernels.append(checkpoint(lambda alpha, use=use: collected(alpha, cells, *use), alpha,
                                  use_reentrant=False))
        gc.collect()
        counts.append(sum(issubclass(type(t), torch.Tensor) and t.shape == cells.shape
                          for t in gc.get_objects()))
    assert counts[0] == counts[-1]
    sum(kernel.sum() for kernel in kernels).backward()
    expected, = torch.autograd.grad(sum(assemble_kernel(alpha, cells, *use).sum()
                                        for alpha, use in zip(alphas, USES * 2)), cells)
    torch.testing.assert_close(cells.grad, expected)


def test_autocast_gives_gradients_in_the_parameters_dtype(monkeypatch):
    net, x = Net().eval(), torch.randn(3, 4, 5, 6)
    exact = copy.deepcopy(net).double()
    expected = gradients(exact, exact(x.double()).square().sum())

    def under_autocast():
        with torch.autocast('cpu', torch.bfloat16):
            y = net(x)
        return gradients(net, y.float().square().sum())

    found = under_autocast()
    monkeypatch.setattr('kw_mm.layers.conv.collect_gradients', lambda cells: cells)
    plain = under_autocast()
    for name, grad in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - grad).norm() <= 2 * (plain[name] - grad).norm() < 0.2 * grad.norm()


def test_layers_of_one_graph_share_one_conversion():
    cells = make_cells(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        first = collect_gradients(cells)
        assert collect_gradients(cells) is first
    assert collect_gradients(cells).dtype == torch.float32


@pytest.mark.parametrize('backward', [True, False])
def test_nothing_outlives_the_graph(backward):
    cells, alphas = make_cells(), make_alphas()
    gc.collect()
    gc.disable()  # without cycles it is not needed
    try:
        total = loss(cells, alphas)
        collector = weakref.ref(collect_gradients(cells))
        node = weakref.ref(collector().grad_fn)
        assert collector() is not None and node() is not None
        if backward:
            total.backward()
        del total
        assert collector() is None and node() is None
        parameter = weakref.ref(cells)
        del cells
        assert parameter() is None
    finally:
        gc.enable()


def test_a_failed_pass_leaves_no_memory_behind():
    cells, alphas = make_cells(), make_alphas()
    kernel = collected(Fails.apply(alphas[0]), cells, *USES[0])
    total = kernel.sum() + collected(alphas[1], cells, *USES[1]).sum()
    node = weakref.ref(collect_gradients(cells).grad_fn)
    with pytest.raises(ArithmeticError):
        total.backward()
    del total, kernel
    gc.collect()  # the exception's traceback is one
    assert node() is None
