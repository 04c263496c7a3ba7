"""A model that is optimised for one test predicts the same, with averaged weights too."""
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from kw_mm import KWConv2d, KWResNet
from kw_mm.engine.hooks import OptimizeForTestHook


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = KWResNet(18, base_channels=8)

    def forward(self, inputs, mode='predict'):
        out = self.backbone(torch.stack(list(inputs)))[-1]
        return [row for row in out.flatten(1)] if mode == 'predict' else dict(loss=out.sum())


class Keep(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [row.clone() for row in data_samples]

    def compute_metrics(self, results):
        Keep.kept = torch.stack(results)
        return dict(num=len(results))


@pytest.fixture(autouse=True)
def registered():
    MODELS.register_module(name='ModelToOptimise', module=Model)
    METRICS.register_module(name='KeepAll', module=Keep)
    yield
    MODELS.module_dict.pop('ModelToOptimise')
    METRICS.module_dict.pop('KeepAll')


def run(tmp_path, checkpoint, hooks, optimize, name):
    torch.manual_seed(1)
    images = list(torch.randn(3, 3, 32, 32))
    runner = Runner(
        dict(type='ModelToOptimise'), str(tmp_path / name), custom_hooks=hooks,
        load_from=checkpoint, experiment_name=name, test_cfg={},
        test_dataloader=DataLoader(images, collate_fn=lambda batch: dict(inputs=batch)),
        test_evaluator=dict(type='KeepAll'))
    if optimize:
        runner.register_hook(OptimizeForTestHook())
    runner.test()
    return runner, Keep.kept


@pytest.mark.parametrize('hooks', [[], [dict(type='EMAHook')],
                                   [dict(type='EMAHook', update_buffers=True)]])
def test_predictions_stay(tmp_path, hooks):
    torch.manual_seed(0)
    path = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=Model().state_dict(), meta={}), path)
    name = f'{len(hooks)}{"update_buffers" in str(hooks)}'
    _, expected = run(tmp_path, path, hooks, False, f'plain{name}')
    runner, actual = run(tmp_path, path, hooks, True, f'fast{name}')
    assert not any(isinstance(m, KWConv2d) for m in runner.model.modules())
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-4)
    assert actual.abs().sum() > 0
