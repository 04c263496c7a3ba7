"""Optimised networks in a Runner of mmengine."""
import copy

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from optimised import optimised_with, randomise

from kw_mm import KWResNet


class Detector(BaseModel):
    """The smallest model that a Runner can test."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs, data_samples=None, mode='predict'):
        return list(self.backbone(torch.stack(inputs) if isinstance(inputs, list) else inputs)[0])


class Sums(BaseMetric):
    """Keeps what the model returns."""

    def process(self, data_batch, data_samples):
        self.results.extend(y.sum().item() for y in data_samples)

    def compute_metrics(self, results):
        return {f'image{i}': value for i, value in enumerate(results)}


@pytest.mark.parametrize('kind', ['bases', 'cells'])
@pytest.mark.parametrize('loop', ['val', 'test'])
def test_a_runner(kind, loop, tmp_path):
    DefaultScope._instance_dict.clear()
    MMLogger._instance_dict.clear()
    model = Detector(randomise(KWResNet(18, base_channels=8, num_stages=2, out_indices=(1,))))
    twin, _ = optimised_with(kind, model)
    data = [dict(inputs=x) for x in torch.randn(5, 3, 32, 32)]
    loader = dict(dataset=data, batch_size=2, num_workers=0,
                  sampler=dict(type='DefaultSampler', shuffle=False))
    metrics = []
    for i, net in enumerate((model, twin)):
        runner = Runner(copy.deepcopy(net), str(tmp_path / str(i)), log_level='ERROR',
                        default_scope='mmengine', experiment_name=f'{tmp_path.name}{i}',
                        **{f'{loop}_dataloader': loader, f'{loop}_cfg': dict(),
                           f'{loop}_evaluator': [Sums(prefix='x')]})
        metrics.append(getattr(runner, loop)())
        MMLogger._instance_dict.clear()
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    assert len(metrics[0]) == 5
    DefaultScope._instance_dict.clear()
