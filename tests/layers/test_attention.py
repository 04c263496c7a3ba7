import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kw_mm import ConvSpec, KWConv2d, KWLinear, plan_warehouses, set_temperature
from kw_mm.layers import Attention
from kw_mm.layers.attention import AttentionBatchNorm


def attention(batch_norm=True, **kw_cfg):
    plan = plan_warehouses([ConvSpec('a', 8, 8, (3, 3))],
                           dict(attn_norm='BN1d' if batch_norm else 'LN', **kw_cfg))
    return Attention(plan.layers['a']).double()


def test_it_reads_like_the_method():
    torch.manual_seed(0)
    layer = attention().eval()
    layer.norm1.running_mean.normal_()
    layer.fc2.bias.data.normal_()
    x = torch.randn(3, 8, 5, 4).double()
    hidden = (x.mean((2, 3)) @ layer.fc1.weight.T - layer.norm1.running_mean) / (1 + 1e-5)**.5
    z = (hidden.clamp(min=0) @ layer.fc2.weight.T + layer.fc2.bias).view(3, 9, 10)
    expected = (z / (z.abs().sum(-1, keepdim=True) + 1e-3))[..., :9]
    torch.testing.assert_close(layer(x), expected)
    set_temperature(layer, 1)
    torch.testing.assert_close(layer(x), torch.eye(9).double().expand(3, 9, 9))


def test_layer_norm_sees_samples_apart():
    layer = attention(batch_norm=False)
    x = torch.randn(3, 8, 5, 4).double()
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


@pytest.mark.parametrize('batch', [0, 1])
def test_small_training_batch_uses_and_keeps_running_statistics(batch):
    # nn.BatchNorm1d raises "Expected more than 1 value per channel when training".
    layer = attention().train()
    layer.norm1.running_mean.normal_()
    before = layer.norm1.running_mean.clone()
    x = torch.randn(batch, 8, 5, 4).double()
    torch.testing.assert_close(layer(x), copy.deepcopy(layer).eval()(x))
    assert torch.equal(layer.norm1.running_mean, before)
    layer(torch.randn(2, 8, 5, 4).double())
    assert not torch.equal(layer.norm1.running_mean, before)


def test_initial_values():
    layer = attention(cell_num_ratio=4)
    assert torch.equal(layer.fc2.bias, torch.zeros(9 * 37).double())
    assert layer.fc1.weight.std().item() == pytest.approx((2 / 16)**.5, rel=0.2)
    assert layer.fc2.weight.std().item() == pytest.approx((2 / (9 * 37))**.5, rel=0.05)


class TestTemperature:
    def net(self):
        return nn.Sequential(KWConv2d(4, 4, 3), nn.Sequential(KWLinear(4, 4)))

    def taus(self, module):
        return [m.tau.item() for m in module.modules() if isinstance(m, Attention)]

    def test_set_everywhere_and_zero_at_first(self):
        net = self.net()
        assert self.taus(net) == [0, 0]
        assert set_temperature(net, 0.3) == 2
        assert self.taus(net) == [0.3, 0.3]
        assert set_temperature(nn.Conv2d(1, 1, 1), 0.3) == 0

    def test_no_change_of_dtype_rounds_it(self):
        net = self.net()
        set_temperature(net, 0.3)
        for change in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
            net.to(change)
            assert self.taus(net) == [0.3, 0.3]
            assert {m.tau.dtype for m in net.modules() if isinstance(m, Attention)} == {
                torch.float64}
        assert self.taus(copy.deepcopy(net)) == [0.3, 0.3]

    def test_beta_and_tau_move_but_stay_out_of_the_state_dict(self):
        layer = KWConv2d(4, 4, 3)
        assert not {k for k in layer.state_dict() if 'beta' in k or 'tau' in k}
        assert layer.to('meta').attention.beta.is_meta
        assert layer.attention.tau.is_meta

    @pytest.mark.parametrize('tau, error', [(1.1, ValueError), (-0.1, ValueError),
                                            (float('nan'), ValueError), ('1', TypeError),
                                            (True, TypeError)])
    def test_errors(self, tau, error):
        with pytest.raises(error, match=rf'tau must be a number in \[0, 1\], got {tau!r}'):
            set_temperature(self.net(), tau)


class TestSettling:
    def norm(self):
        return AttentionBatchNorm(5).double()

    @pytest.mark.parametrize('batch', [1, 2, 3])
    def test_statistics_become_those_of_the_first_batches(self, batch, monkeypatch):
        monkeypatch.setattr('kw_mm.layers.attention.SETTLING_BATCHES', 4)
        norm = self.norm()
        norm.settle()
        x = 3 + 0.1 * torch.randn(7, batch, 5, dtype=torch.float64)
        for i in range(4):
            seen = x[:i + 1].flatten(0, 1)
            scale = (seen.var(0, correction=0) + norm.eps).sqrt()
            torch.testing.assert_close(norm(x[i]), (x[i] - seen.mean(0)) / scale)
        before = copy.deepcopy(norm.state_dict())
        assert before['num_batches_tracked'] == 4
        for i in range(4, 7):
            torch.testing.assert_close(norm(x[i]), (x[i] - seen.mean(0)) / scale)
        assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())

    def test_evaluation_ends_it_and_a_checkpoint_goes_on(self):
        norm = self.norm()
        x = torch.randn(2, 4, 5).double()
        norm.settle()
        norm(x[0])
        norm.eval()
        norm(x[1])
        assert norm.num_batches_tracked == 1
        other = self.norm()
        other.load_state_dict(norm.state_dict())
        for module in (norm, other):
            module.settle()
            module(x[1])
        torch.testing.assert_close(other.running_var, x.flatten(0, 1).var(0, correction=0))
        assert torch.equal(norm.running_var, other.running_var)

    def test_what_was_trained_stays(self):
        # With a counter, and without one, as in old checkpoints.
        for trained in (dict(num_batches_tracked=torch.tensor(1000)),
                        dict(running_mean=torch.ones(5))):
            norm = self.norm()
            norm.load_state_dict(trained, strict=False)
            before = copy.deepcopy(norm.state_dict())
            norm.settle()
            norm(torch.randn(4, 5).double())
            assert all(torch.equal(norm.state_dict()[k], v) for k, v in before.items())

    def test_an_empty_batch_says_nothing(self):
        norm = self.norm()
        norm.settle()
        assert norm(torch.zeros(0, 5).double()).shape == (0, 5)
        assert norm.num_batches_tracked == 0 and norm.settling

    def test_passes_before_a_backward_pass_do_not_disturb_each_other(self):
        # Changing statistics in place is an error for graphs that have saved them.
        norm = self.norm()
        norm.settle()
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        (norm(x[0]).sum() + norm(x[1]).sum()).backward()
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize('use_reentrant', [True, False])
    def test_activation_checkpointing_counts_a_batch_once(self, use_reentrant):
        norm = self.norm()
        other = copy.deepcopy(norm)
        inputs = torch.randn(3, 4, 5, dtype=torch.float64)
        grads = []
        for module in (norm, other):
            module.settle()
            for x in inputs:
                x = x.clone().requires_grad_()
                y = module(x) if module is norm else checkpoint(
                    module, x, use_reentrant=use_reentrant)
                y.square().sum().backward()
                grads.append(x.grad)
        assert norm.num_batches_tracked == other.num_batches_tracked == 3
        assert torch.equal(norm.running_var, other.running_var)
        assert all(torch.equal(a, b) for a, b in zip(grads[:3], grads[3:]))

    def test_compiled_code_follows_too(self):
        norm = self.norm()
        other = copy.deepcopy(norm)
        compiled = torch.compile(other, backend='eager')
        for module in (norm, other):
            module.settle()
        for x in torch.randn(3, 4, 5, dtype=torch.float64):
            torch.testing.assert_close(compiled(x), norm(x))
        assert other.num_batches_tracked == 3
