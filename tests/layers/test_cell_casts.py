"""Under autocast a warehouse's cells are converted once a step, and no step sees old values."""
import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from optimised import randomise
from torch import nn

from kw_mm import KWConv2d, convert_to_kw_, optimize_for_inference_
from kw_mm.ops import cast_once, cell_casts

NUM_LAYERS = 3


def network(num_layers=NUM_LAYERS, budget=2):
    """Layers of one warehouse. Norms would be folded, and hide who converts what."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
                          for _ in range(num_layers)))
    convert_to_kw_(net, dict(cell_num_ratio=budget), groups=['*'])
    randomise(net)
    return net.eval()


def cells_of(net):
    (cells,) = net.warehouse_manager.weights
    return cells


def conversions(run, cells):
    """How often something as large as the cells is brought to another dtype."""
    with torch.autograd.profiler.profile(record_shapes=True) as found:
        run()
    shapes = [e.input_shapes[0] for e in found.function_events if e.name == 'aten::_to_copy']
    return shapes.count(list(cells.shape))


def inference(net, x, mode=torch.inference_mode):
    def run():
        with mode(), torch.autocast('cpu', torch.bfloat16):
            return net(x)
    return run


def training(net, x):
    def run():
        with torch.autocast('cpu', torch.bfloat16):
            y = net(x)
        return y.float().sum()
    return run


X = torch.randn(2, 16, 5, 6)


@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize('kind', ['trained', 'optimised', 'frozen'])
def test_once_a_step(kind, mode, monkeypatch):
    net = network()
    cells = cells_of(net)
    if kind == 'optimised':
        # All from cells: bases are another tensor for each layer.
        optimize_for_inference_(net, memory_budget=0)
    if kind == 'frozen':
        net.requires_grad_(False)
    run = training(net, X) if kind == 'frozen' else inference(net, X, mode)
    for _ in range(2):
        assert conversions(run, cells) == 1
        assert not cell_casts._step.copies  # nothing stays
    expected = run()
    # One for each layer: what this spares, and what gives the same.
    monkeypatch.setattr('kw_mm.layers.warehouse.cast_once', lambda cells, *_: cells)
    assert conversions(run, cells) == NUM_LAYERS
    assert torch.equal(run(), expected)


def test_once_a_step_in_training():
    net = network().train()
    assert conversions(training(net, X), cells_of(net)) == 1


@pytest.mark.slow
@pytest.mark.parametrize('train', [False, True])
def test_once_in_compiled_code(train):
    # After equal conversions were merged and the backward pass cut off, as torch's compiler does.
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compile_utils import fx_graph_cse
    counts = []

    def count(graph, _):
        merged = fx_graph_cse(graph.graph)
        counts.append(sum(
            node.target == torch.ops.aten._to_copy.default
            and node.args[0].meta['val'].shape == cells.shape
            and node.kwargs.get('dtype') == torch.bfloat16 for node in merged.nodes))
        return make_boxed_func(graph.forward)

    net = network().train(train)
    cells = cells_of(net)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend=aot_autograd(
        fw_compiler=count, partition_fn=min_cut_rematerialization_partition))
    with torch.set_grad_enabled(train), torch.autocast('cpu', torch.bfloat16):
        compiled(X)
    assert counts[0] == 1


def step(net, cells):
    cells.grad = torch.ones_like(cells)
    torch.optim.SGD([cells], lr=0.1).step()


def load(net, _):
    net.load_state_dict({key: value + 0.1 if value.is_floating_point() else value
                         for key, value in net.state_dict().items()})


def edit(_, cells):
    with torch.no_grad():
        cells.mul_(1.1)


def swap(_, cells):
    # As mmengine's EMAHook: torch does not count such a change as a new version.
    cells.data.copy_(cells.data * 1.1)


def replace(_, cells):
    cells.data = cells.data * 1.1


@pytest.mark.parametrize('change', [step, load, edit, swap, replace])
@pytest.mark.parametrize('whole', [True, False])
def test_never_stale(change, whole):
    # Also after a step that ended early, as by an error, so that some layers never asked.
    net = network()
    cells, run = cells_of(net), inference(net, X)
    run() if whole else inference(net[:2], X)()
    change(net, cells)
    expected = inference(copy.deepcopy(net), X)()
    assert torch.equal(run(), expected)


def test_a_copy_that_no_layer_will_fetch_goes_with_the_next_step():
    net = network()
    cells = cells_of(net)
    inference(net[:2], X)()
    held = weakref.ref(cell_casts._step.copies[cells].cells)
    assert conversions(inference(net, X), cells) == 1
    assert held() is None and not cell_casts._step.copies


def test_a_change_between_layers_of_one_step():
    cells = nn.Parameter(torch.randn(4, 2, 2, 1, 1))
    with torch.no_grad():
        first = cast_once(cells, torch.bfloat16, 'a', 3)
        assert cast_once(cells, torch.bfloat16, 'b', 3) is first
        cells.add_(1)
        assert torch.equal(cast_once(cells, torch.bfloat16, 'c', 3), cells.bfloat16())
        # Other precisions, and inference mode, whose tensors are of no use outside of it.
        assert cast_once(cells, torch.float16, 'd', 3).dtype == torch.float16
        with torch.inference_mode():
            assert cast_once(cells, torch.float16, 'e', 3).is_inference()
        assert not cast_once(cells, torch.float16, 'f', 3).is_inference()
        assert cast_once(cells, torch.float32, 'a', 3) is cells
        assert cast_once(cells, torch.bfloat16, 'a', 1) is cells
    assert cast_once(cells, torch.bfloat16, 'a', 3) is cells  # needs a gradient


def test_what_goes_with_the_model():
    net = network()
    inference(net[:2], X)()  # a copy is alive
    twin = copy.deepcopy(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    edit(twin, cells_of(twin))
    expected = inference(net, X)()
    assert torch.equal(inference(loaded, X)(), expected)
    assert not torch.equal(inference(twin, X)(), expected)
    inference(net[:2], X)()
    copies, held = cell_casts._step.copies, weakref.ref(cells_of(net))
    del net
    gc.collect()
    assert held() is None and not copies


def test_threads_have_steps_of_their_own():
    net = network()
    expected, found = inference(net, X)(), []
    threads = [threading.Thread(target=lambda: found.extend(
        inference(net, X)() for _ in range(5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15 and all(torch.equal(y, expected) for y in found)


def test_a_layer_of_its_own():
    layer = KWConv2d(16, 16, 3, padding=1).eval()
    inference(layer, X)()
    assert not cell_casts._step.copies


def test_modes_see_the_cells():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    net = network()
    expected = inference(net, X)()
    with Passes():
        assert torch.equal(inference(net, X)(), expected)
    assert not cell_casts._step.copies
