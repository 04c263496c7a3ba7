"""Detectors and segmentors of the configs with small backbones, and scores that differ."""
from __future__ import annotations

from typing import Any

from config_files import read_config
from mmengine.config import Config
from torch import nn

import kw_mm  # noqa: F401  (registers the backbones)
from kw_mm.config_types import without_downloads_
from kw_mm.models.random_weights import random_model

DETECTORS = dict(
    faster_rcnn='faster_rcnn/faster-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py',
    mask_rcnn='mask_rcnn/mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py',
    cascade_rcnn='cascade_rcnn/cascade-mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py',
    retinanet='retinanet/retinanet_kw1x-r50_fpn_ms-adamw-1x_coco.py',
    rtmdet='rtmdet/rtmdet-ins_kw1x-r50_8xb32-300e_coco.py',
    dino='dino/dino-4scale_kw1x-r50_8xb2-12e_coco.py',
    swin='swin/mask-rcnn_kw1x-swin-t-p4-w7_fpn_1x_coco.py')
SEGMENTORS = dict(
    fcn='fcn/fcn_kw1x-r50-d8_4xb4-80k_ade20k-512x512.py',
    pspnet='pspnet/pspnet_kw1x-r50-d8_4xb4-80k_ade20k-512x512.py',
    deeplabv3plus='deeplabv3plus/deeplabv3plus_kw1x-r50-d8_4xb4-80k_ade20k-512x512.py',
    upernet='upernet/upernet_kw1x-r50_4xb4-80k_ade20k-512x512.py',
    sem_fpn='sem_fpn/fpn_kw1x-r50_4xb4-80k_ade20k-512x512.py')
CHANNELS = [8, 16, 32, 64]
CLASSES = 5


def small_config(name: str) -> Config:
    """A config with a KW-ResNet18 of an eighth of its width, and five classes."""
    cfg = read_config({**DETECTORS, **SEGMENTORS}[name])
    model = without_downloads_(cfg.model)
    if name == 'swin':
        model.backbone.module.update(embed_dims=16, depths=(1, 2, 1, 1), num_heads=(2, 2, 2, 2))
        channels = [16, 32, 64, 128]
    else:
        model.backbone.update(depth=18, base_channels=8)
        channels = CHANNELS
    for key in ('num_classes',):
        _set_all(model, key, CLASSES)
    if name in SEGMENTORS:
        model.auxiliary_head = None
        head = model.decode_head
        head.channels = 16
        if name == 'sem_fpn':
            model.neck.update(in_channels=channels, out_channels=16)
            head.in_channels = [16] * 4
        elif name == 'upernet':
            head.in_channels = channels
        else:
            head.in_channels = channels[-1]
        if name == 'deeplabv3plus':
            head.update(c1_in_channels=channels[0], c1_channels=8)
        if 'norm_cfg' in head:
            head.norm_cfg = dict(type='BN')
        return cfg
    own = {index: width for index, width in enumerate(channels)}
    model.neck.in_channels = [own[i] for i in model.backbone.get('out_indices', range(4))][
        -len(model.neck.in_channels):]
    if 'rpn_head' in model:
        _shrink_two_stage(model)
    if name == 'retinanet':
        model.neck.out_channels = 32
        model.bbox_head.update(in_channels=32, feat_channels=32, stacked_convs=1)
        model.test_cfg.nms_pre = 200
    if name == 'rtmdet':
        model.neck.update(out_channels=32, num_csp_blocks=1)
        model.bbox_head.update(in_channels=32, feat_channels=32, stacked_convs=1)
    if name == 'dino':
        model.num_queries = 60
        model.encoder.num_layers, model.decoder.num_layers = 1, 2
        model.test_cfg.max_per_img = 50
    return cfg


def _shrink_two_stage(model: Any) -> None:
    model.neck.out_channels = 32
    model.rpn_head.update(in_channels=32, feat_channels=32)
    model.test_cfg.rpn.update(nms_pre=200, max_per_img=60)
    model.test_cfg.rcnn.max_per_img = 40
    head = model.roi_head
    for part in (head.get('bbox_head'), head.get('mask_head')):
        for own in part if isinstance(part, list) else [part] if part else []:
            own.in_channels = 32
            own.update(dict(fc_out_channels=64) if 'fc_out_channels' in own else
                       dict(conv_out_channels=16, num_convs=1))
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        if name in head:
            head[name].out_channels = 32


def _set_all(node: Any, key: str, value: Any) -> None:
    if isinstance(node, dict):
        if key in node:
            node[key] = value
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _set_all(child, key, value)


def build(cfg: Config, seed: int = 0) -> nn.Module:
    """The model of a config, with random weights under which it finds something."""
    model: Any = random_model(cfg, seed)
    model.dataset_meta = dict(classes=tuple(f'class{i}' for i in range(CLASSES)))
    return model
