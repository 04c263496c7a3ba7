"""KWConverted: any registered module, started from the static weights of its config."""
import copy
import pickle

import pytest
import torch
from mmdet.registry import MODELS as DET_MODELS
from mmengine.dataset import DefaultSampler
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmseg.registry import MODELS as SEG_MODELS
from optimised import perturb_norms_
from torch import nn

from kw_mm import KWConv2d, KWConverted, KWLinear, convert_to_kw_

REGNET = dict(type='mmdet.RegNet', arch=dict(w0=24, wa=36, wm=2.5, group_w=8, depth=8, bot_mul=1.0),
              norm_eval=True)
SWIN = dict(type='mmdet.SwinTransformer', embed_dims=32, depths=(2, 2), num_heads=(2, 4),
            strides=(4, 2), out_indices=(0, 1), window_size=4)


class Parent(BaseModule):
    """Initialises itself like a detector."""

    def __init__(self, backbone, init_cfg=None):
        super().__init__(init_cfg)
        self.backbone = MODELS.build(backbone)
        self.head = nn.Conv2d(3, 3, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def regnet(tmp_path):
    """A static RegNet with random weights and statistics, and its checkpoint."""
    static = perturb_norms_(DET_MODELS.build(REGNET))
    static.eval()
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in static.state_dict().items()}),
               tmp_path / 'static.pth')
    return static, dict(type='Pretrained', checkpoint=str(tmp_path / 'static.pth'),
                        prefix='backbone.')


def close(outputs, expected, bound=1e-4):
    return all((a - b).norm() < bound * b.norm() for a, b in zip(outputs, expected, strict=True))


def test_a_detector_starts_from_the_static_weights_of_its_backbone(regnet):
    static, init_cfg = regnet
    # The parent initialises before, and ignores KW layers anyway.
    parent = Parent(dict(type='KWConverted', module=dict(**REGNET, init_cfg=init_cfg),
                         kw_cfg=dict(cell_num_ratio=2)),
                    init_cfg=dict(type='Constant', layer=['Conv2d', 'Linear'], val=3))
    assert type(parent.backbone) is type(static)
    x = torch.randn(2, 3, 64, 64)
    parent.eval()
    assert not close(parent.backbone(x), static(x))
    parent.init_weights()
    assert (parent.head.weight == 3).all()
    assert close(parent.backbone(x), static(x))
    assert torch.equal(parent.backbone.conv1.weight, static.conv1.weight)


def test_mmengine_leaves_layers_alone_that_were_converted_in_python():
    fpn = DET_MODELS.build(dict(type='FPN', in_channels=[32, 32], out_channels=32, num_outs=2))
    linear = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    owner = BaseModule()
    owner.fpn, owner.linear, owner.conv = fpn, linear, KWConv2d.from_conv(nn.Conv2d(16, 16, 3))
    convert_to_kw_(owner, linear=True)
    before = {k: v.clone() for k, v in owner.state_dict().items()}
    owner.init_weights()
    linear[0].init_weights()
    owner.conv.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in owner.state_dict().items())


def test_building_loads_nothing_and_initialising_does():
    cfg = dict(type='KWConverted', module=dict(**REGNET, init_cfg=dict(
        type='Pretrained', checkpoint='/nowhere/static.pth')))
    model = MODELS.build(cfg)
    with pytest.raises(FileNotFoundError, match='/nowhere/static.pth'):
        model.init_weights()


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_starts_by_itself(regnet, duplicate):
    static, init_cfg = regnet
    model = MODELS.build(dict(type='KWConverted', module=dict(**REGNET, init_cfg=init_cfg)))
    before = model.warehouse_manager.weights[0].clone()
    twin = duplicate(model)
    twin.init_weights()
    twin.eval()
    x = torch.randn(2, 3, 64, 64)
    assert close(twin(x), static(x))
    assert torch.equal(model.warehouse_manager.weights[0], before)
    again = duplicate(twin)
    again.eval()
    assert all(map(torch.equal, again(x), twin(x)))


def test_a_checkpoint_loads_strictly_into_what_the_config_builds(regnet):
    _, init_cfg = regnet
    cfg = dict(type='KWConverted', module=dict(**REGNET, init_cfg=init_cfg), filter=['layer1.*'])
    model = MODELS.build(cfg)
    model.init_weights()
    cfg['module']['init_cfg']['checkpoint'] = '/nowhere/static.pth'
    other = MODELS.build(cfg)
    other.load_state_dict(model.state_dict(), strict=True)
    model.eval(), other.eval()
    x = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, other(x), model(x)))
    assert not any(isinstance(m, KWConv2d) for m in other.layer1.modules())


def test_a_second_initialisation_does_nothing(monkeypatch):
    model = MODELS.build(dict(type='KWConverted', module=REGNET))
    model.init_weights()
    before = copy.deepcopy(model.state_dict())
    said = []
    monkeypatch.setattr('kw_mm.models.static_weights.print_log',
                        lambda message, **kwargs: said.append(message))
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert said == ['init_weights of RegNet has been called more than once.']


def test_an_init_weights_of_the_modules_own_is_honoured(tmp_path):
    """Swin's init_weights reads checkpoints itself, and its linear layers become KW ones."""
    static = DET_MODELS.build(SWIN)
    for parameter in static.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    static.eval()
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in static.state_dict().items()}),
               tmp_path / 'swin.pth')
    model = MODELS.build(dict(type='KWConverted', linear=True, module=dict(
        **SWIN, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth')))))
    assert sum(isinstance(m, KWLinear) for m in model.modules()) == 9
    model.init_weights()
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    assert close(model(x), static(x))


def test_without_static_weights_it_starts_as_the_static_module_does():
    model = MODELS.build(dict(type='KWConverted', module=dict(
        type='mmdet.FPN', in_channels=[32, 32], out_channels=32, num_outs=2)))
    torch.manual_seed(1)
    model.init_weights()
    torch.manual_seed(1)
    static = DET_MODELS.build(dict(type='FPN', in_channels=[32, 32], out_channels=32, num_outs=2))
    static.init_weights()
    inputs = [torch.randn(1, 32, 8, 8), torch.randn(1, 32, 4, 4)]
    assert close(model.eval()(inputs), static(inputs))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))


def test_a_module_without_init_weights():
    MODELS.register_module(module=Plain, name='PlainForTest')
    try:
        model = MODELS.build(dict(type='KWConverted', module=dict(type='PlainForTest')))
        model.init_weights()
        assert model.layer1[0].attention.fc2.weight.abs().sum() == 0
        assert model.is_init
    finally:
        del MODELS.module_dict['PlainForTest']


def test_types_resolve_in_the_current_scope():
    fpn = dict(type='FPN', in_channels=[32, 32], out_channels=32, num_outs=2)
    for scope, registry in (('mmdet', DET_MODELS), ('mmseg', SEG_MODELS)):
        with DefaultScope.overwrite_default_scope(scope):
            model = registry.build(dict(type='KWConverted', module=fpn))
        assert type(model).__module__.startswith(scope)
        model.init_weights()  # the scope is that in which it was built
    assert MODELS.get('KWConverted') is KWConverted


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(module='mmdet.RegNet'), TypeError, 'module must be the config of a registered module'),
    (dict(filter='layer1.*'), TypeError, 'filter must be a list of globs'),
    (dict(filter=['layer7.*']), ValueError, "filter must match layers, but 'layer7.*' matches"),
    (dict(kw_cfg=dict(budget=1)), ValueError, 'unknown key'),
    (dict(groups=['layer9.*']), ValueError, 'matches no convertible layer'),
])
def test_wrong_arguments_are_told_at_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        KWConverted(**{'module': REGNET, **kwargs})


class Classifier(BaseModel):
    """The smallest model that a Runner can train."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        outputs = self.backbone(inputs)
        return dict(loss=outputs[-1].square().mean()) if mode == 'loss' else outputs


def run(work_dir, init_cfg, max_epochs=1, **kwargs):
    MMLogger._instance_dict.clear()
    model = Classifier(dict(type='KWConverted', module=dict(**REGNET, init_cfg=init_cfg)))
    runner = Runner(
        model, str(work_dir), dict(
            dataset=[dict(inputs=torch.randn(3, 32, 32)) for _ in range(2)], batch_size=2,
            num_workers=0,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-9)),
        custom_hooks=[dict(type='EMAHook')], log_level='ERROR', **kwargs)
    runner.train()
    return runner


def test_a_runner_starts_from_static_weights_and_resumes(tmp_path, regnet):
    static, init_cfg = regnet
    runner = run(tmp_path / 'run', init_cfg)
    x = torch.randn(2, 3, 64, 64)
    ema = runner.hooks[[type(h).__name__ for h in runner.hooks].index('EMAHook')].ema_model
    for model in (runner.model, ema.module):
        model.eval()
        assert close(model.backbone(x), static(x), 1e-3)
    resumed = run(tmp_path / 'run', init_cfg, max_epochs=2, resume=True,
                  load_from=str(tmp_path / 'run/epoch_1.pth'))
    assert resumed.iter == 2
    resumed.model.eval()
    assert close(resumed.model.backbone(x), static(x), 1e-3)
