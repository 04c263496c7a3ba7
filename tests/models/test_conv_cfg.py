"""conv_cfg=dict(type='KWConv2d') where MMDetection and MMSegmentation build convolutions."""
import pytest
import torch
from mmdet.registry import MODELS as DET_MODELS
from mmengine.config import ConfigDict
from mmseg.registry import MODELS as SEG_MODELS

from kw_mm import KWConv2d

KW = dict(type='KWConv2d', kw_cfg=dict(cell_num_ratio=2))
BN = dict(type='BN')


def feature_maps(channels, size=16):
    return [torch.randn(2, c, size // 2**i, size // 2**i) for i, c in enumerate(channels)]


@pytest.mark.parametrize('registry, cfg, inputs, num_kw', [
    (DET_MODELS, dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=3,
                      add_extra_convs='on_output'), feature_maps([8, 16]), 5),
    (DET_MODELS, dict(type='PAFPN', in_channels=[8, 16], out_channels=8, num_outs=2),
     feature_maps([8, 16]), 6),
    (DET_MODELS, dict(type='CSPNeXtPAFPN', in_channels=[8, 16, 32], out_channels=8,
                      num_csp_blocks=1, norm_cfg=BN), feature_maps([8, 16, 32]), 27),
    (DET_MODELS, dict(type='FCNMaskHead', num_convs=2, in_channels=8, conv_out_channels=8,
                      num_classes=3), torch.randn(4, 8, 7, 7), 2),
    (SEG_MODELS, dict(type='UPerHead', in_channels=[8, 16, 16, 32], in_index=[0, 1, 2, 3],
                      pool_scales=(1, 2), channels=8, num_classes=3, norm_cfg=BN,
                      align_corners=False), feature_maps([8, 16, 16, 32]), 10),
    (SEG_MODELS, dict(type='FCNHead', in_channels=8, in_index=0, channels=8, num_convs=2,
                      num_classes=3, norm_cfg=BN), feature_maps([8]), 3),
], ids=lambda value: value.get('type') if isinstance(value, dict) else None)
@pytest.mark.filterwarnings('ignore:.*(build_loss|avg_non_ignore):UserWarning')
def test_forward_backward_and_initialisation(registry, cfg, inputs, num_kw):
    torch.manual_seed(0)
    static = registry.build(ConfigDict(cfg)).eval()
    module = registry.build(ConfigDict(**cfg, conv_cfg=KW)).train()
    layers = {n: m for n, m in module.named_modules() if isinstance(m, KWConv2d)}
    assert len(layers) == num_kw
    assert all(layer.cells.numel() == 2 * layer.plan.spec.num_static_parameters
               - 2 * layer.plan.spec.bias * layer.out_channels for layer in layers.values())
    module.init_weights()  # mmengine's initialisers do not know KW layers by name
    outputs, expected = module(inputs), static(inputs)
    as_list = lambda out: list(out) if isinstance(out, (list, tuple)) else [out]  # noqa: E731
    assert [o.shape for o in as_list(outputs)] == [o.shape for o in as_list(expected)]
    sum(out.square().mean() for out in as_list(outputs)).backward()
    assert [n for n, layer in layers.items()
            if any(p.grad is None for p in layer.parameters())] == []
