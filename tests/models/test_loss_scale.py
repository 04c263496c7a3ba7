"""Training from scratch in float16: gradients stay in its range at the loss scales that static
networks are trained with."""
import pytest
import torch
import torch.nn.functional as F
from needs import needs_float16
from torch import nn

from kw_mm import KWResNet, set_temperature

pytestmark = needs_float16


def step(loss_scale, tau, **options):
    """Gradients of one step in float16, with a GradScaler's loss scale."""
    torch.manual_seed(0)
    net = KWResNet(18, base_channels=16, norm_eval=False, zero_init_residual=False,
                   **options).train()
    set_temperature(net, tau)
    head = nn.Linear(128, 10)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(10, (2,))
    with torch.autocast('cpu', torch.float16):
        loss = F.cross_entropy(head(net(images)[-1].mean((2, 3))).float(), labels)
    (loss * loss_scale).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


# Training from scratch begins at temperature 1. At 0, kernels are 4 to 6 times smaller than a
# static network's, and their gradients, which convolutions compute in float16, larger by that
# factor.
@pytest.mark.parametrize('attn_norm, tau, loss_scale', [
    ('BN1d', 1, 16_384), ('LN', 1, 16_384), ('LN', 0.5, 16_384), ('LN', 0, 4_096)])
def test_gradients_are_finite(attn_norm, tau, loss_scale):
    # In the last case the gradients of mixing weights, which are long sums, overflowed first.
    gradients = step(loss_scale, tau, kw_cfg=dict(attn_norm=attn_norm))
    assert all(grad.isfinite().all() for grad in gradients.values())


def test_the_static_twin_is_fine_there():
    assert all(grad.isfinite().all() for grad in step(16_384, 0, static=True).values())
