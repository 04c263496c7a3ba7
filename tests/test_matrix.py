"""Every kind of network with everything that people do with networks: it works, or says why not.

``matrix.py`` has the networks. A check takes a network and compares it with itself in double
precision. ``REFUSED`` lists what is impossible, with the error message.
"""
from __future__ import annotations

import copy
import functools
import inspect
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from in_threads import run_in_threads
from matrix import MODELS, run, run_sharded
from mmdet.models.layers import ExpMomentumEMA
from mmengine.analysis import FlopAnalyzer
from needs import exports_max_pool
from optimised import error, outputs, randomise
from safetensors.torch import load_model, safe_open, save_model
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.flop_counter import FlopCounterMode

pytestmark = [pytest.mark.filterwarnings(f'ignore:{message}') for message in (
    'There is a performance drop because', 'Converting a tensor to a Python',
    r'`torch.jit.(save|load|trace|trace_method|script_method)` is deprecated')]

SINGLE, DOUBLE = 1e-4, 1e-10  # relative errors
OPTIMISED = 'bases', 'cells'


class Checked:
    """A network for one check, in evaluation, and its expected outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.net = copy.deepcopy(build(name))
        self.learns = name not in OPTIMISED
        self.x = images(2, 32, 48)

    def exact(self, x: Tensor, change: Callable[[nn.Module], object] = lambda net: None
              ) -> tuple[Tensor, ...]:
        """The outputs in double precision, of a network that may have been changed."""
        net = copy.deepcopy(build(self.name)).double()
        change(net)
        return outputs(net, x.double())

    def check(self, function: Callable, x: Tensor | None = None, bound: float = SINGLE,
              with_grad: bool = False) -> None:
        """Checks that a function computes what the network should."""
        x = self.x if x is None else x
        assert error(outputs(function, x, with_grad), expected(self.name, *x.shape)) < bound

    def check_gradients(self, found: Mapping[str, Tensor], bound: float = 1e-3) -> None:
        """Checks the gradients of the loss for ``self.x``."""
        exact = gradients(copy.deepcopy(build(self.name)).double(), self.x.double())
        assert distance({name: found[name] for name in exact}, exact) < bound


@functools.cache
def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]() if name in OPTIMISED else randomise(MODELS[name]())


@functools.cache
def expected(name: str, batch: int, channels: int, height: int, width: int) -> tuple[Tensor, ...]:
    """The outputs in double precision for images of a size, which are the same in every check."""
    return Checked(name).exact(images(batch, height, width))


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def loss(y: Tensor | Iterable[Tensor]) -> Tensor:
    return sum(part.double().square().mean() for part in ((y,) if isinstance(y, Tensor) else y))


def gradients(net: nn.Module, x: Tensor, function: Callable | None = None) -> dict[str, Tensor]:
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    y = net(x) if function is None else function(x)
    found = torch.autograd.grad(loss(y), list(parameters.values()))
    return dict(zip(parameters, found))


def distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The largest error of a gradient, relative to all gradients together."""
    whole = math.hypot(*(gradient.norm() for gradient in exact.values()))
    return max((found[name] - exact[name]).norm().item() for name in exact) / whole


def zero_(net: nn.Module) -> None:
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data.zero_()


def reopened(save: Callable, load: Callable, value: object) -> object:
    file = io.BytesIO()
    save(value, file)
    file.seek(0)
    return load(file)


def in_evaluation(s):
    for x in (s.x, images(1, 32, 48), images(3, 40, 33), images(0, 32, 32)):
        s.check(s.net, x)
        s.check(s.net, x.contiguous(memory_format=torch.channels_last))


def in_training(s):
    s.net.train()
    x = images(6, 32, 48)  # norms of few samples are almost discontinuous
    found, exact = gradients(s.net, x), gradients(copy.deepcopy(s.net).double(), x.double())
    assert distance(found, exact) < 1e-3
    optimizer = torch.optim.SGD(s.net.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(loss(s.net(x)))
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]


def deepcopied(s):
    twin = copy.deepcopy(s.net)
    zero_(s.net)
    s.check(twin)


def pickled(s):
    twins = [pickle.loads(pickle.dumps(s.net)),
             reopened(torch.save, functools.partial(torch.load, weights_only=False), s.net)]
    zero_(s.net)
    for twin in twins:
        s.check(twin)


def spawned(s, other_process):
    s.check(lambda x: tuple(map(torch.from_numpy, other_process.submit(run, s.net, x).result())))


def compiled(s):
    torch.compiler.reset()
    # The steps of the default backend before it generates code. With 'aot_eager', torch is wrong
    # about the strides of a layer norm's gradient.
    function = torch.compile(s.net, backend='aot_eager_decomp_partition', fullgraph=True)
    s.check(function)
    if s.name == 'resnet18':  # it takes three times as long
        s.check_gradients(gradients(s.net, s.x, function))


def traced(s):
    others = images(3, 40, 64), images(1, 32, 32), images(4, 64, 32)
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            trace = torch.jit.trace(s.net, s.x, check_trace=not with_gradients)
        for graph in (trace, reopened(torch.jit.save, torch.jit.load, trace)):
            for x in others:
                s.check(graph, x)
    found = run_in_threads(lambda i: [outputs(trace, x) for _ in range(3) for x in others], 4)
    exacts = [expected(s.name, *x.shape) for x in others]
    for results in found:
        for result, exact in zip(results, 3 * exacts, strict=True):
            assert error(result, exact) < SINGLE
    if s.learns:
        s.check_gradients(gradients(s.net, s.x, trace))


def exported(s):
    if any(isinstance(m, nn.MaxPool2d) for m in s.net.modules()) and not exports_max_pool():
        pytest.skip('this torch fixes the sizes of what goes through MaxPool2d')
    sizes = {0: Dim('batch', max=64), 2: Dim('height', min=16, max=2048),
             3: Dim('width', min=16, max=2048)}
    program = torch.export.export(s.net, (s.x,), dynamic_shapes=(sizes,))
    for one in (program, reopened(torch.export.save, torch.export.load, program)):
        graph = one.module()
        for x in (images(3, 40, 64), images(1, 64, 32)):
            s.check(graph, x)


def symbolically_traced(s):
    graph = torch.fx.symbolic_trace(s.net)
    for net in (graph, copy.deepcopy(graph)):
        s.check(net)
        s.check(net, images(3, 40, 64))


def called_functionally(s):
    state = {**dict(s.net.named_parameters()), **dict(s.net.named_buffers())}
    other = copy.deepcopy(s.net)
    zero_(other)
    s.check(lambda x: functional_call(other, state, (x,)))


def transformed(s):
    def loss_of(parameters, x):
        return loss(functional_call(s.net, parameters, (x,)))

    parameters = {name: p.detach() for name, p in s.net.named_parameters() if p.requires_grad}
    if s.learns:
        s.check_gradients(grad(loss_of)(parameters, s.x))
        # One gradient for each sample.
        each = vmap(grad(loss_of), (None, 0))(parameters, s.x.unsqueeze(1))
        s.check_gradients({name: gradient.mean(0) for name, gradient in each.items()})
    twin = copy.deepcopy(s.net).double()
    x = s.x.double().requires_grad_()
    exact, = torch.autograd.grad(loss(twin(x)), x)
    assert error((grad(loss_of, 1)(parameters, s.x),), (exact,)) < 1e-3
    s.check(lambda x: tuple(y.flatten(0, 1) for y in vmap(
        lambda sample: tuple(outputs(s.net, sample, True)))(x.unsqueeze(1))))


def in_mixed_precision(s):
    for dtype, bound in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        with torch.autocast('cpu', dtype):
            s.check(s.net, bound=bound)
        if s.learns:
            with torch.autocast('cpu', dtype):
                y = s.net(s.x)
            parameters = {name: p for name, p in s.net.named_parameters() if p.requires_grad}
            s.check_gradients(dict(zip(parameters, torch.autograd.grad(
                loss(y), list(parameters.values())))), 2 * bound)


def in_double_precision(s):
    s.net.double()
    x = s.x.double()
    s.check(s.net, x, DOUBLE)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast('cpu', dtype):
            s.check(s.net, x, DOUBLE)


def built_on_the_meta_device(s):
    state = s.net.state_dict()
    with torch.device('meta'):
        empty = MODELS[s.name]()
    empty.eval()
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    for net in (empty, copy.deepcopy(s.net).to('meta')):
        net.to_empty(device='cpu')
        for tensor in net.state_dict().values():
            tensor.fill_(float('nan') if tensor.is_floating_point() else -1)
        net.load_state_dict(state, strict=True)
        s.check(net)


def averaged_by_ema(s):
    ema = ExpMomentumEMA(s.net, momentum=0.5, gamma=1e-3)

    def multiply_(net, factor):
        for parameter in net.parameters():
            parameter.data *= factor

    ema.update_parameters(s.net)  # the first copies
    s.check(ema)
    multiply_(s.net, 3)
    ema.update_parameters(s.net)
    found, exact = outputs(ema, s.x), s.exact(s.x, lambda net: multiply_(net, 2))
    assert error(found, exact) < SINGLE


def averaged_by_swa(s):
    found = []
    for dtype in (torch.float32, torch.float64):
        net = copy.deepcopy(s.net).to(dtype)
        average = AveragedModel(net)
        average.update_parameters(net)
        s.check(average, s.x.to(dtype))
        update_bn([images(6, 32, 48).to(dtype), images(5, 32, 48).to(dtype)], average)
        found.append(outputs(average.eval(), s.x.to(dtype)))
    assert error(*found) < 1e-3


def sharded(s, processes, tmp_path, policies=('none', 'told'), originals=(True,)):
    for policy, original in itertools.product(policies, originals):
        futures = [processes.submit(run_sharded, rank, f'{tmp_path}/{policy}{original}', s.net,
                                    s.x, policy, original) for rank in (0, 1)]
        results = [future.result() for future in futures]
        found = zip(*(map(torch.from_numpy, ys) for ys, _ in results))
        assert error(tuple(map(torch.cat, found)), s.exact(s.x)) < SINGLE
        for _, found in results:
            if s.learns and original:
                s.check_gradients({name: torch.from_numpy(g) for name, g in found.items()})


def sharded_by_size(s, processes, tmp_path):
    # Sharded parameters alone must be all trainable or all frozen.
    all_alike = len({p.requires_grad for p in s.net.parameters()}) == 1
    sharded(s, processes, tmp_path, ('torch',), (not all_alike,))


def saved_as_safetensors(s, tmp_path):
    path = str(tmp_path / 'net.safetensors')
    save_model(s.net, path)
    with safe_open(path, 'pt') as file:
        assert set(file.keys()) == set(s.net.state_dict())  # nothing is shared or copied
    twin = copy.deepcopy(s.net)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert load_model(twin, path) == (set(), [])
    s.check(twin)


def replicated(s):
    """Copies a module like ``torch.nn.parallel.replicate`` for several GPUs."""
    replicas = {m: m._replicate_for_data_parallel() for m in s.net.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            replica._parameters.pop(name, None), replica._buffers.pop(name, None)
            setattr(replica, name, None if tensor is None else tensor.detach().clone())
    net = copy.deepcopy(replicas[s.net])
    zero_(s.net)
    s.check(net)


def counted(s):
    """mmengine traces with gradients on, and counts by names of operators."""
    analyzer = FlopAnalyzer(s.net, (s.x,)).unsupported_ops_warnings(False)
    products = sum(number for name, number in analyzer.by_operator().items()
                   if not name.endswith('norm') and 'pool' not in name)
    with FlopCounterMode(display=False) as counter:
        s.net(s.x)
    assert products == counter.get_total_flops() / 2


slow = pytest.mark.slow
CHECKS = [in_evaluation, in_training, deepcopied, pickled, called_functionally, transformed,
          in_mixed_precision, in_double_precision, built_on_the_meta_device, averaged_by_ema,
          averaged_by_swa, saved_as_safetensors, replicated, counted, symbolically_traced,
          pytest.param(traced, marks=slow), pytest.param(exported, marks=slow),
          pytest.param(compiled, marks=slow),
          pytest.param(spawned, marks=slow), pytest.param(sharded, marks=slow),
          pytest.param(sharded_by_size, marks=slow)]

REFUSED = {
    **{(in_training, name): 'optimized for inference cannot be trained; optimize a copy'
       for name in OPTIMISED},
    **{(sharded_by_size, name): r'the cells of warehouse \d+ are sharded by themselves, so .* keep '
       'WarehouseManager' for name in MODELS if name != 'bases'},
    **{(replicated, name): 'nn.DataParallel copies layers apart from the cells .* use '
       'DistributedDataParallel' for name in MODELS if name != 'bases'},
}


@pytest.fixture(scope='module')
def other_process():
    """Another process, which starts from nothing."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        yield pool


@pytest.fixture(scope='module')
def processes():
    """Two forks of this process; threads do not survive a fork."""
    with ProcessPoolExecutor(2, get_context('fork'), torch.set_num_threads, (1,)) as pool:
        yield pool


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_matrix(name, check, request):
    fixtures = [request.getfixturevalue(parameter)
                for parameter in ('other_process', 'processes', 'tmp_path')
                if parameter in inspect.signature(check).parameters]
    refusal = REFUSED.get((check, name))
    if refusal is None:
        check(Checked(name), *fixtures)
    else:
        with pytest.raises(RuntimeError, match=refusal):
            check(Checked(name), *fixtures)
