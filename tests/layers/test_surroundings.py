"""KW layers under what training puts them through: copies, compilers, wrappers, checkpoints."""
import sys

import copies
import pytest
import torch
import torch.distributed as dist
from forks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kw_mm import ConvSpec, KWConv2d, plan_warehouses, set_temperature
from kw_mm.layers import WarehouseManager


class Net(nn.Module):
    """Two layers of one warehouse."""

    def __init__(self, **kw_cfg):
        super().__init__()
        specs = [ConvSpec('a', 4, 8, (3, 3)), ConvSpec('b', 8, 4, (1, 1))]
        self.warehouse_manager = WarehouseManager(plan_warehouses(specs, kw_cfg))
        self.a = KWConv2d(4, 8, 3, padding=1, bias=False, manager=self.warehouse_manager, name='a')
        self.b = KWConv2d(8, 4, 1, bias=False, manager=self.warehouse_manager, name='b')

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def x():
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1)).double()


def test_cells_are_one_parameter_and_stand_in_the_state_dict_once(net):
    names = [name for name, _ in net.named_parameters()]
    assert [n for n in names if 'warehouse' in n] == ['warehouse_manager.weights.0']
    assert [k for k in net.state_dict() if 'weights.0' in k] == ['warehouse_manager.weights.0']
    assert net.a.cells is net.b.cells is net.warehouse_manager.weights[0]


def test_state_dict_round_trip(net, x):
    other = Net().double()
    assert other.load_state_dict(net.state_dict(), strict=True)
    other.eval(), net.eval()
    assert torch.equal(other(x), net(x))
    assigned = Net().double().eval()
    assigned.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(assigned(x), net(x))


@pytest.mark.parametrize('duplicate', copies.WAYS)
def test_copies_share_among_themselves_and_not_with_the_original(net, x, duplicate):
    set_temperature(net, 0.3)
    twin = duplicate(net)
    twin.eval(), net.eval()
    assert torch.equal(twin(x), net(x))
    assert twin.a.cells is twin.b.cells is twin.warehouse_manager.weights[0]
    before = net(x)
    twin.warehouse_manager.weights[0].data.zero_()
    assert torch.equal(net(x), before)
    assert twin(x).abs().sum() == 0


def test_to_moves_the_cells_that_layers_read(net, x):
    net.float()
    assert net(x.float()).dtype == torch.float32
    assert net.a.cells.dtype == torch.float32


def test_functional_call_swaps_cells(net, x):
    net.eval()
    zeros = {'warehouse_manager.weights.0': torch.zeros_like(net.a.cells)}
    assert torch.func.functional_call(net, zeros, (x,)).abs().sum() == 0
    assert net(x).abs().sum() > 0
    parameters = dict(net.named_parameters())
    assert torch.equal(torch.func.functional_call(net, parameters, (x,)), net(x))


@pytest.mark.skipif(not hasattr(torch.compiler, 'set_stance'),
                    reason='torch below 2.6 cannot be told not to compile again')
@pytest.mark.parametrize('kw_cfg', [dict(), dict(nonlocal_basis_ratio=0.5, attn_norm='LN')])
def test_a_layer_compiles_without_graph_breaks(x, kw_cfg):
    torch.manual_seed(0)
    net = Net(**kw_cfg).double().eval()
    compiled = torch.compile(net.a, fullgraph=True, backend='aot_eager')
    for tau in (0, 0.4):  # a new temperature does not compile again
        set_temperature(net, tau)
        with torch.compiler.set_stance('default' if tau == 0 else 'fail_on_recompile'):
            y = compiled(x)
        torch.testing.assert_close(y, net.a(x))
    leaves = [p for p in net.a.parameters()] + [net.a.cells]
    for a, b in zip(*(torch.autograd.grad(f(x).square().sum(), leaves)
                      for f in (compiled, net.a))):
        torch.testing.assert_close(a, b)


def test_ema_averages_cells_once(net, x):
    from mmengine.model import ExponentialMovingAverage
    ema = ExponentialMovingAverage(net, momentum=0.5)
    ema.update_parameters(net)
    with torch.no_grad():
        start = net.a.cells.clone()
        net.warehouse_manager.weights[0].add_(1)
    ema.update_parameters(net)
    torch.testing.assert_close(ema.module.b.cells, start + 0.5)
    assert ema.module.a.cells is ema.module.b.cells


def test_activation_checkpointing(net, x):
    net.eval()
    plain, again = (torch.autograd.grad(run.square().sum(), list(net.parameters()))
                    for run in (net(x), checkpoint(net, x, use_reentrant=False)))
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


def test_empty_batch_gives_every_parameter_a_gradient(net):
    net(torch.zeros(0, 4, 5, 6).double().requires_grad_()).sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is None} == set()
    assert all(p.grad.abs().sum() == 0 for p in net.parameters())


def test_a_layer_of_shared_warehouses_must_be_as_planned(net):
    manager = net.warehouse_manager
    with pytest.raises(ValueError, match=r"name must be a layer .*\['a', 'b'\], got 'c'"):
        KWConv2d(4, 8, 3, bias=False, manager=manager, name='c')
    with pytest.raises(ValueError, match="layer 'a' must be built as planned"):
        KWConv2d(4, 8, 1, bias=False, manager=manager, name='a')
    with pytest.raises(ValueError, match='kw_cfg must be None for a layer of shared'):
        KWConv2d(4, 8, 3, bias=False, manager=manager, name='a', kw_cfg=dict())


def test_a_checkpoint_of_another_budget_is_told():
    with pytest.raises(ValueError, match=r'weights.0 .*\(40, 4, 4, 1, 1\), got \(20, 4, 4, 1, 1\)'):
        Net(cell_num_ratio=2).load_state_dict(Net().state_dict(), strict=False)


def check_ddp():
    """In each of two processes."""
    dist.init_process_group('gloo')
    for norm in ('LN', 'BN1d'):
        torch.manual_seed(0)
        net = Net(attn_norm=norm).double()
        net.train(norm == 'LN')  # in training a batch norm's statistics are each process's own
        x = torch.randn(6, 4, 5, 6).double()
        net(x).square().mean().backward()
        expected = [p.grad.clone() for p in net.parameters()]
        ddp = DistributedDataParallel(net)  # find_unused_parameters stays off
        for _ in range(2):  # a parameter left out of the first step raises in the second
            net.zero_grad()
            rank = dist.get_rank()
            ddp(x[3 * rank:3 * rank + 3]).square().mean().backward()
        for p, grad in zip(net.parameters(), expected):
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12)
    # gloo's threads end with the group, and that with the last model; at exit they would abort.
    del ddp
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == 'win32', reason='processes cannot be forked')
def test_two_process_ddp_gives_the_gradients_of_the_global_batch(tmp_path):
    run_ranks(check_ddp, num=2, log=tmp_path / 'output.txt')


def test_channels_last():
    # Cells have five dimensions, for which nn.Module.to refuses this format.
    net = nn.Sequential(KWConv2d(4, 8, 3), nn.Conv2d(8, 8, 3)).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.double)
    expected = net(x)
    net.to(memory_format=torch.channels_last)
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), expected)
