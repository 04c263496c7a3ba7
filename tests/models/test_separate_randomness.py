"""Parts of a model that do not disturb the random numbers of the others."""
import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import kw_mm  # noqa: F401


def build(seed, apart=True, **backbone):
    """A backbone as a run of this seed builds and initialises it, and what is drawn next."""
    torch.manual_seed(seed)
    cfg = dict(type='KWResNet', depth=18, base_channels=8, init_cfg=dict(
        type='Kaiming', layer='Conv2d'), **backbone)
    net = MODELS.build(dict(type='WithOwnRandomNumbers', module=cfg) if apart else cfg)
    head = nn.Linear(3, 3)
    net.init_weights()
    return net, head.weight, torch.rand(3)


def test_what_is_drawn_elsewhere_does_not_depend_on_the_module():
    (_, head, later), (_, other_head, other_later) = build(1, static=True), build(1)
    assert torch.equal(head, other_head) and torch.equal(later, other_later)
    plain = build(1, apart=False, static=True)[1], build(1, apart=False)[1]
    assert not torch.equal(*plain)


def test_the_seed_of_the_run_decides_its_weights():
    first, again, other = build(1)[0], build(1)[0], build(2)[0]
    for name, tensor in first.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert type(first).__name__ == 'KWResNet'


def test_copies_initialise_themselves():
    net = build(1)[0]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin.is_init = False
        with torch.no_grad():
            net.conv1.weight.zero_()
            twin.conv1.weight.zero_()
        twin.init_weights()
        assert twin.conv1.weight.any() and not net.conv1.weight.any()


@pytest.mark.parametrize('module', [None, 'KWResNet', dict(depth=18)])
def test_bad_module(module):
    with pytest.raises(TypeError, match='module must be the config of a registered module, got'):
        MODELS.build(dict(type='WithOwnRandomNumbers', module=module))
