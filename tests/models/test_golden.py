"""The backbones against the golden values of the authors', in float64."""
import math

import golden
import pytest
import torch

from kw_mm import KWConvNeXt, KWMobileNetV2, KWResNet, set_temperature

HALF = dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
MOBILENET_HALF = dict(reduction=1 / 32, cell_num_ratio=(1, 1, 1, 1, 1, 1, .5, 1, .5),
                      cell_inplane_ratio=(1, 1, 1, 1, 1, 1, .5, 1, .5),
                      cell_outplane_ratio=(1, 1, 1, 1, 1, 1, .5, 1, .5))
BACKBONES = {
    'kw_resnet18_1x': (KWResNet, dict(depth=18)),
    'kw_resnet18_1d4x': (KWResNet, dict(depth=18, kw_cfg={**HALF, 'cell_num_ratio': 0.25})),
    'kw_resnet50_1x': (KWResNet, dict(depth=50)),
    'kw_resnet50_1d2x': (KWResNet, dict(depth=50, kw_cfg={**HALF, 'nonlocal_basis_ratio': 1 / 16})),
    'kw_convnext_tiny_1x': (KWConvNeXt, dict(arch='tiny')),
    'kw_mobilenet_v2_100_1x': (KWMobileNetV2, dict()),
    'kw_mobilenet_v2_100_1d2x': (KWMobileNetV2, dict(
        kw_cfg=MOBILENET_HALF, share_pointwise=False, static_pointwise_stages=(1, 2, 3, 4, 5))),
}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if 'mobilenet' in name else pytest.mark.slow)
    for name in BACKBONES])
def test_it_computes_what_the_authors_compute(name):
    expected = golden.load(name)
    backbone, kwargs = BACKBONES[name]
    model = backbone(**kwargs).double().eval()
    state = golden.backbone_entries(expected['state_dict'])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == state
    dropped = set(expected['state_dict']) - set(state)
    cells_of_classifier = sum(math.prod(expected['state_dict'][key]) for key in dropped
                              if key.startswith('warehouse_manager'))
    assert sum(p.numel() for p in model.parameters()) == (
        expected['backbone_parameters'] - cells_of_classifier)
    warehouses = [dict(cells=w.num_cells, cell_shape=list(w.cell_shape))
                  for w in model.plan.warehouses]
    assert warehouses == expected['warehouses'][:len(warehouses)]

    golden.fill(model)
    x = golden.image(expected['input_shape'])
    for i, (tau, probes) in enumerate(expected['eval'].items()):
        set_temperature(model, float(tau))
        outputs = model(x)
        if i == 0:  # the gradients are those of the first temperature
            loss = sum((out ** 2).mean() for out in outputs)
            assert loss.item() == pytest.approx(expected['loss'], rel=1e-9)
            loss.backward()
        for out, probe in zip(outputs, probes, strict=True):
            assert list(out.shape) == probe['shape']
            wanted = torch.tensor(probe['samples'], dtype=torch.float64)
            scale = wanted.abs().max().item()
            torch.testing.assert_close(golden.samples(out, len(wanted)), wanted, rtol=0,
                                       atol=1e-9 * scale)
            assert out.mean().item() == pytest.approx(probe['mean'], abs=1e-9 * scale)
            assert out.std().item() == pytest.approx(probe['std'], abs=1e-9 * scale)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    wanted = golden.backbone_entries(expected['grad_norm'])
    assert norms == pytest.approx(wanted, rel=1e-9, abs=1e-9 * max(wanted.values()))
