"""The log of a run is useful, and does not have a line for every parameter."""
import pytest
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner

from kw_mm import KWResNet
from kw_mm.engine.quiet_log import shorten_log_


@pytest.fixture
def model_type():
    class Model(BaseModel):
        def __init__(self):
            super().__init__(init_cfg=dict(type='Constant', layer='Linear', val=0.5))
            self.backbone = KWResNet(18, base_channels=8)
            self.head = torch.nn.Linear(64, 2)

        def forward(self, inputs):
            return self.head(self.backbone(inputs)[-1].mean((2, 3)))

    MODELS.register_module(name='ModelOfTheQuietLog', module=Model)
    yield 'ModelOfTheQuietLog'
    MODELS.module_dict.pop('ModelOfTheQuietLog')


@pytest.mark.parametrize('level', ['INFO', 'DEBUG'])
def test_lines_for_every_parameter_are_left_out(tmp_path, model_type, level):
    runner = Runner(dict(type=model_type), str(tmp_path), log_level=level,
                    experiment_name=f'quiet-{level}')
    shorten_log_(runner)
    runner._init_model_weights()
    build_optim_wrapper(runner.model, dict(
        optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
        paramwise_cfg=dict(norm_decay_mult=0)))
    print_log('and this is read', logger='current')
    for handler in runner.logger.handlers:
        handler.flush()
    text = next(tmp_path.rglob('*.log')).read_text()
    assert 'and this is read' in text
    if level == 'DEBUG':
        assert text.count('paramwise_options') > 50 and 'head.weight - torch.Size' in text
    else:
        assert 'paramwise_options' not in text and 'head.weight - torch.Size' not in text
        # Both parameters of the linear layer, by how they were initialised.
        assert '    2  ConstantInit: val=0.5' in text
    assert torch.all(runner.model.head.weight == 0.5)
