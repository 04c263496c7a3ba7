"""Stages of common module trees."""
import pytest
from torch import nn

from kw_mm.convert.stages import find_stage


def conv():
    return nn.Conv2d(4, 4, 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.downsample = nn.Sequential(conv(), nn.BatchNorm2d(4))


class Layers(nn.Module):
    """A stage that is neither a list nor has a number in its name, like Swin's."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reduction = conv()


def module(**children):
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


def resnet():
    return module(conv1=conv(), layer1=nn.Sequential(Block(), Block()),
                  layer2=nn.Sequential(Block()))


def numbered(num):
    """Blocks without a list, like those of MMSegmentation's MobileNetV3."""
    return module(**{f'layer{i}': Block() for i in range(num)})


@pytest.mark.parametrize('root, layer, stage', [
    (resnet(), 'conv1', ''),
    (resnet(), 'layer1.0.downsample.0', 'layer1'),
    (module(resnet50=resnet()), 'resnet50.layer2.0.conv1', 'resnet50.layer2'),
    (module(neck=module(lateral_convs=nn.ModuleList([conv(), conv()]))),
     'neck.lateral_convs.1', 'neck.lateral_convs'),
    (module(stages=nn.ModuleList([nn.Sequential(Block()), nn.Sequential(Block())])),
     'stages.1.0.conv2', 'stages.1'),
    (module(stages=nn.ModuleList([Layers()])), 'stages.0.blocks.1.conv1', 'stages.0'),
    (module(stages=nn.ModuleList([Layers()])), 'stages.0.reduction', 'stages.0'),
    (module(features=nn.Sequential(conv(), Block(), Block())), 'features.2.conv1', 'features'),
    (module(blocks=nn.ModuleList([Block()])), 'blocks.0.conv1', 'blocks'),
    # HRNet: the first name that decides counts, not the branches inside.
    (module(stage2=nn.Sequential(module(branches=nn.ModuleList([nn.Sequential(Block())])))),
     'stage2.0.branches.0.0.conv1', 'stage2'),
    (module(features=module(dense1=module(layer1=Block(), layer2=Block()))),
     'features.dense1.layer2.conv1', 'features.dense1'),
    (numbered(6), 'layer5.conv1', 'layer5'),
    (numbered(7), 'layer5.downsample.0', ''),
    (module(backbone=numbered(12)), 'backbone.layer11.conv1', 'backbone'),
    (module(conv1=module(conv=conv())), 'conv1.conv', 'conv1'),
    (module(head=module(fc2=module(linear=nn.Linear(4, 4)), fc=nn.Linear(4, 4))),
     'head.fc', 'head'),
])
def test_stage_of_a_layer(root, layer, stage):
    modules = dict(root.named_modules())
    assert layer in modules
    assert find_stage(layer, modules) == stage
