"""Every segmentor is built, takes a training step and predicts; only images are smaller."""
import copy

import pytest
import torch
from config_files import SEG_CONFIGS, by_model, read_config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from kw_mm import KWConvNeXt, KWMobileNetV2, KWResNet
from kw_mm.config_types import all_dicts, without_downloads_
from kw_mm.datasets import draw_scene
from kw_mm.datasets.annotations import semantic_map

# Configs for the user's own data have no twin, and their schedule and size are not compared.
PUBLIC = [name for name in SEG_CONFIGS if not name.startswith('custom/')]
KW = [name for name in PUBLIC if '_kw' in name]
BACKBONES = {'r18': KWResNet, 'r50': KWResNet, 'mobilenet-v2': KWMobileNetV2,
             'convnext-t': KWConvNeXt}


def model_key(name):
    """A key for configs that differ only in data set and schedule."""
    method, backbone, *_ = name.split('/')[1].split('_')
    return method, backbone


# One config of each model, for the data set with the most classes.
MODEL_CONFIGS = {model_key(name): name for name in SEG_CONFIGS
                 if 'kw' in name or 'convnext' in name or 'shapes' in name}


def without_data_set(model):
    """A model's config without values that depend on the data set."""
    model = copy.deepcopy(model)
    for _, node in all_dicts(model):
        node.pop('num_classes', None)
    model.data_preprocessor.pop('size', None)
    for name in ('crop_size', 'stride'):
        model.test_cfg.pop(name, None)
    return model


def samples(num, size):
    inputs, targets = [], []
    for index in range(num):
        image, instances = draw_scene(0, 'train', index, size)
        labels = torch.from_numpy(semantic_map(instances)).long()[None]
        inputs.append(torch.from_numpy(image).permute(2, 0, 1))
        targets.append(SegDataSample(
            gt_sem_seg=PixelData(data=labels),
            metainfo=dict(ori_shape=labels.shape[1:], img_shape=labels.shape[1:])))
    return dict(inputs=inputs, data_samples=targets)


@pytest.mark.slow
@pytest.mark.parametrize('name', [names[0] for names in by_model(SEG_CONFIGS)])
def test_a_training_step_and_a_prediction(name):
    torch.manual_seed(0)
    cfg = read_config(name)
    if 'size' in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.size = (64, 64)
    if cfg.model.test_cfg.mode == 'slide':
        cfg.model.test_cfg.update(crop_size=(64, 48), stride=(32, 32))
    if cfg.optim_wrapper.type == 'AmpOptimWrapper':  # refuses CPUs, where it would take minutes
        cfg.optim_wrapper.type = 'OptimWrapper'
        del cfg.optim_wrapper.loss_scale
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = revert_sync_batchnorm(MODELS.build(without_downloads_(cfg.model)))
        model.init_weights()
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        batch = samples(2, 64)
        model.train()
        inputs = model.data_preprocessor(batch, training=True)
        losses = model(**inputs, mode='loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
        assert torch.isfinite(loss)
        assert any(key.startswith('aux.') for key in losses) == ('auxiliary_head' in cfg.model)
        # Distributed training without find_unused_parameters needs a gradient for each.
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unused == []
        cells = [p for n, p in model.named_parameters()
                 if 'warehouse_manager' in n and p.requires_grad]
        before = [tensor.detach().clone() for tensor in cells]
        wrapper.step()
        model.eval()
        with torch.no_grad():
            found = model.test_step(samples(1, (72, 56)))
    assert bool(cells) == ('_kw' in name)
    assert not any(torch.equal(*pair) for pair in zip(before, cells))
    labels = found[0].pred_sem_seg.data
    assert labels.shape == (1, 56, 72)
    assert 0 <= labels.min() <= labels.max() < cfg.model.decode_head.num_classes


@pytest.mark.parametrize('name', KW)
def test_it_differs_from_its_twin_in_the_backbone_alone(name):
    method, backbone = model_key(name)
    budget, size = backbone.split('-', 1)
    cfg, twin = (read_config(n) for n in (name, name.replace(f'{budget}-', '')))
    one = read_config(MODEL_CONFIGS[method, backbone])
    assert without_data_set(cfg.model) == without_data_set(one.model)
    assert cfg.model.backbone.type == BACKBONES[size.removesuffix('-d8')].__name__
    if 'shapes' not in name:  # from scratch
        assert cfg.model.backbone.init_cfg.type == 'StaticPretrained'
    assert cfg.model.pretrained is None
    for each in (cfg, twin):
        each.model.pretrained = each.model.backbone = None
        each.pop('kw_backbone', None)
        each.custom_hooks = [h for h in each.custom_hooks if h.type != 'KWTemperatureHook']
    assert cfg.to_dict() == twin.to_dict()


@pytest.mark.parametrize('name', [name for name in PUBLIC if 'shapes' not in name])
def test_names_tell_data_set_and_schedule(name):
    cfg = read_config(name)
    *_, schedule, data = name[:-len('.py')].split('_')
    kind, crop = data.split('-')
    assert kind in cfg.train_dataloader.dataset.type.lower()
    assert cfg.model.data_preprocessor.size == tuple(map(int, crop.split('x')))
    assert schedule.endswith(f'{cfg.train_cfg.max_iters // 1000}k')
    assert f'xb{cfg.train_dataloader.batch_size}-' in schedule
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    num_classes = dict(ade20k=150, cityscapes=19)[kind]
    assert {node['num_classes'] for _, node in all_dicts(cfg.model)
            if 'num_classes' in node} == {num_classes}
    assert ('-amp-' in name) == (cfg.optim_wrapper.type == 'AmpOptimWrapper')


def test_stagewise_rates_of_the_convnext_recipe():
    cfg = read_config('upernet/upernet_kw1x-convnext-t_8xb2-amp-160k_ade20k-512x512.py')
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    cfg.optim_wrapper.type = 'OptimWrapper'
    del cfg.optim_wrapper.loss_scale
    model = torch.nn.ModuleDict(dict(
        backbone=KWConvNeXt(dict(depths=(1, 1, 2, 1), channels=(8, 8, 8, 8))),
        head=torch.nn.Linear(2, 2)))
    with DefaultScope.overwrite_default_scope('mmseg'):
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {names[id(p)]: group for group in wrapper.optimizer.param_groups
              for p in group['params']}
    assert set(groups) == set(names.values())
    # The power of 0.9 in the learning rate. Shared cells belong to no stage and have the heads'
    # rate.
    expected = {
        'head.weight': 0, 'backbone.norm3.bias': 0, 'backbone.warehouse_manager.weights.0': 0,
        'backbone.stages.3.0.gamma': 3, 'backbone.stages.2.1.dwconv.attention.fc1.weight': 4,
        'backbone.stages.0.0.pwconv1.bias': 6, 'backbone.downsample_layers.2.1.bias': 7}
    assert {name: groups[name]['lr'] for name in expected} == pytest.approx(
        {name: 1e-4 * 0.9**power for name, power in expected.items()})
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1
        assert (groups[name]['weight_decay'] == 0.05) == decays, name
