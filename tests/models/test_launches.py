"""What only a GPU feels, on the meta device: kernels that are started, waiting for results, and
what a compiler does not take."""
import copy

import pytest
import torch
from kw_benchmark.launches import LaunchCounter, count_launches

from kw_mm import KWResNet, optimize_for_inference_
from kw_mm.ops import cuda

SHAPE = (1, 3, 800, 1344)


def build(budget=None, **options):
    with torch.device('meta'):
        kw_cfg = None if budget is None else dict(cell_num_ratio=budget)
        return KWResNet(50, static=budget is None, kw_cfg=kw_cfg, **options).eval()


def test_counting_by_hand():
    x = torch.empty(2, 3, device='meta')
    with LaunchCounter() as counter:
        (x.t() @ x).relu_().view(9)
        torch.empty(3)
    assert counter.counts == {'aten::mm': 1, 'aten::relu_': 1}
    with pytest.raises(ValueError, match='x must be on the meta device'):
        count_launches(torch.nn.ReLU(), torch.zeros(1))


# Kernels at most: of the static network, and with 50 KW layers 6 more for each as it is trained, 3
# as optimised. With torch's products, which serve until a GPU has shown that Triton is right and
# faster, there are more; they may not become even more.
STATIC = 172
WITH_TRITON = dict(trained=STATIC + 6 * 50, optimised=STATIC + 3 * 50)
WITH_TORCH = dict(trained=756, optimised=569)


def test_kernels_of_the_static_network():
    x = torch.empty(SHAPE, device='meta')
    assert count_launches(build(), x).total == STATIC


@pytest.mark.slow
@pytest.mark.parametrize('budget', [1, 4])
def test_kernels_started(budget, monkeypatch):
    # At batch 1 a GPU would wait for the CPU that starts them. Channels-last, as GPUs convolve.
    x = torch.empty(SHAPE, device='meta').contiguous(memory_format=torch.channels_last)
    nets = dict(trained=build(budget))
    nets['optimised'] = copy.deepcopy(nets['trained'])
    optimize_for_inference_(nets['optimised'])
    for name, net in nets.items():
        for limits, with_triton in ((WITH_TORCH, False), (WITH_TRITON, True)):
            monkeypatch.setattr(cuda, '_triton_is_wanted', with_triton)
            counter = count_launches(net, x, with_triton)
            assert counter.total <= limits[name], (name, counter.total, counter.counts)


@pytest.mark.slow
@pytest.mark.parametrize('norm_eval', [False, True])
def test_nothing_waits_for_a_result(norm_eval):
    # The meta device has no values: it refuses .item(), and shapes that depend on values.
    net = build(1, norm_eval=norm_eval, frozen_stages=1).train()
    x = torch.empty(2, 3, 64, 96, device='meta')
    sum(y.sum() for y in net(x)).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['training', 'inference', 'optimised'])
def test_whole_for_a_compiler(kind):
    training = kind == 'training'
    net, x = build(4, norm_eval=False).train(training), torch.empty(2, 3, 64, 96, device='meta')
    if kind == 'optimised':
        optimize_for_inference_(net)
    torch.compiler.reset()
    with torch.set_grad_enabled(training):
        outputs = torch.compile(net, fullgraph=True, backend='aot_eager')(x)
        if training:
            sum(y.sum() for y in outputs).backward()
    assert [y.shape for y in outputs] == [y.shape for y in net(x)]
