"""Applies the options of ``tools/train.py`` and ``tools/test.py`` to a config.

``default_scope`` tells whether a config is for detection or segmentation.
"""
from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from ..checkpoint import check_checkpoint
from ..compat import has_accelerator, prepare_cpu_ddp_, prepare_cpu_optimizer_
from ..config_types import innermost_dataset, type_name
from ..crash_safety import choose_checkpoint_
from ..datasets import check_data
from ..files import NotWrittenError
from ..layers.loading import CheckpointMismatch, strict_loading
from .quiet_log import shorten_log_

__all__ = ['CheckpointMismatch', 'NotWrittenError', 'add_cfg_options', 'add_common_options',
           'build_runner', 'check_checkpoint', 'check_data_sets', 'choose_checkpoint_',
           'config_path', 'enable_amp_', 'enable_auto_scale_lr_', 'enable_drawing_', 'enable_tta_',
           'image_size', 'load_config', 'prepare_resume_', 'read_config', 'set_output_',
           'set_resume_', 'strict_loading', 'test_checkpoint']

# To check data sets within seconds at the start of a run, so many images of each are read, and no
# annotation file with more bytes than this.
_SAMPLE, _MAX_JSON = 64, 100 * 2**20


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that train and test have in common."""
    parser.add_argument('--work-dir', help='where to write; default: work_dirs/<config name>')
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='how the processes of a distributed run were started')
    parser.add_argument('--skip-data-check', action='store_true',
                        help='start without checking the data sets')
    # Old launchers pass it; torch.distributed.run sets the environment variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help=argparse.SUPPRESS)


def add_cfg_options(parser: argparse.ArgumentParser, of: str = 'the config') -> None:
    """Adds ``--cfg-options``, which ``read_config`` takes as changes."""
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help=f'settings that replace those of {of}, e.g. '
                        'train_dataloader.batch_size=4; lists as "[1,2]" or 1,2')


def config_path(path: str) -> str:
    """For argparse: the path of a config that exists."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f'config {path!r} does not exist')
    return path


def image_size(text: str) -> tuple[int, int]:
    """For argparse: height and width, written as ``800x1344``."""
    height, _, width = text.partition('x')
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'a size must be HEIGHTxWIDTH, as 800x1344, got {text!r}')
    return int(height), int(width)


def read_config(path: str, changes: Mapping[str, Any] | None = None) -> Config:
    """Reads a config and changes settings, by dotted names, as ``--cfg-options`` gives them."""
    cfg = Config.fromfile(path)
    if changes:
        cfg.merge_from_dict(changes)
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the common options to it."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, {'launcher': args.launcher, **(args.cfg_options or {})})
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    prepare_cpu_ddp_(cfg)
    prepare_cpu_optimizer_(cfg)
    return cfg


def check_data_sets(args: argparse.Namespace, cfg: Config, loaders: Sequence[str]) -> None:
    """Checks a sample of each data set of a run, and prints what was found.

    In a distributed run, one process does it for all.

    Raises:
        ValueError: If a fault would end the run; one sentence for each kind of fault.
    """
    if args.skip_data_check or _rank() > 0:
        return
    found = check_data(cfg, loaders, _SAMPLE, _MAX_JSON)
    for line in found.lines():
        print(f'data: {line}', flush=True)
    if found.errors:
        raise ValueError('\n'.join([
            'the data sets cannot be used as they are (docs/datasets.md says where public ones go, '
            '--skip-data-check starts all the same):',
            *found.errors]))


def _rank() -> int:
    """The rank of this process, before torch.distributed is initialised."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if os.environ.get(name, '').isdecimal():
            return int(os.environ[name])
    return 0


def build_runner(cfg: Config) -> Any:
    """Builds the runner of a config, with a visualizer of its own.

    mmengine keeps visualizers by name. A second run in a process would get that of the first, and
    write its figures and pictures to the first run's folder.
    """
    name = (cfg.get('visualizer') or {}).get('name')
    if name and Visualizer.check_instance_created(name):
        cfg.visualizer.name = f'{name}-{time.time_ns()}'
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    shorten_log_(runner)
    return runner


def test_checkpoint(config: str, checkpoint: str, work_dir: str,
                    changes: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The metrics of a checkpoint on the test data of a config.

    Args:
        config: Path of the config.
        checkpoint: Path; it must fit exactly.
        work_dir: The folder ``tests`` in it is written to.
        changes: Settings that replace those of the config, by dotted names.
    """
    cfg = read_config(config, changes)
    cfg.work_dir = str(Path(work_dir, 'tests'))
    cfg.load_from, cfg.resume = checkpoint, False
    with strict_loading():
        metrics = build_runner(cfg).test()
    return {name: float(value) for name, value in metrics.items()}  # some are numpy's


def enable_amp_(cfg: Config) -> None:
    """Sets automatic mixed precision (``--amp``).

    Raises:
        ValueError: If there is no accelerator to run it on, or the config has an optimizer
            wrapper of another kind.
    """
    if not has_accelerator():
        raise ValueError('--amp needs a GPU or another accelerator, and mmengine found none')
    wrapper = type_name(cfg.optim_wrapper) or 'OptimWrapper'
    if wrapper == 'AmpOptimWrapper':
        return
    if wrapper != 'OptimWrapper':
        raise ValueError("--amp needs optim_wrapper.type to be 'OptimWrapper', which it replaces, "
                         f'got {wrapper!r}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = 'dynamic'


def enable_auto_scale_lr_(cfg: Config) -> None:
    """Scales the learning rate with the total batch size (``--auto-scale-lr``).

    Raises:
        ValueError: If the config does not say for which batch size its learning rate is.
    """
    if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise ValueError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config, the '
                         'total batch size its learning rate is meant for, got auto_scale_lr='
                         f'{cfg.get("auto_scale_lr")!r}')
    cfg.auto_scale_lr.enable = True


def set_resume_(cfg: Config, resume: str) -> None:
    """Resumes from a checkpoint, or with ``'auto'`` from the newest whole one in the work folder.

    ``choose_checkpoint_`` finds that one when there is a runner.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If it is not whole or cannot be resumed from.
    """
    cfg.resume = True
    cfg.load_from = None if resume == 'auto' else resume
    if cfg.load_from:
        check_checkpoint(cfg.load_from, resume=True)


def prepare_resume_(runner: Runner) -> None:
    """Prepares a run for a checkpoint that will set every weight.

    mmengine would first load the checkpoint of ``init_cfg``, which may not exist any more. And the
    moving average is not loaded through ``strict_loading``, so it is made strict here.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.is_init = True
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            hook.strict_load = True


def enable_drawing_(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Draws predictions (``--show``, ``--show-dir``).

    Raises:
        ValueError: If the config has no visualization hook or no visualizer.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None or cfg.get('visualizer') is None:
        raise ValueError('--show and --show-dir need default_hooks.visualization and visualizer '
                         f'in the config, got {hook!r} and {cfg.get("visualizer")!r}')
    hook.draw = True
    if show:
        hook.show = True
        hook.wait_time = wait_time
    if show_dir:
        if cfg.get('default_scope') == 'mmdet':
            hook.test_out_dir = show_dir
        else:
            cfg.visualizer.save_dir = show_dir
            # MMSegmentation's hook would only draw every 50th batch.
            hook.interval = 1


def set_output_(cfg: Config, out: str) -> None:
    """Keeps predictions (``--out``): a pickle file of detections, a folder of segmentations.

    Raises:
        ValueError: If the file name of detections does not end in ``.pkl`` or ``.pickle``, or the
            scope is neither.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmdet':
        if not out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'--out must be a .pkl or .pickle file for detections, got {out!r}')
        metrics = cfg.test_evaluator
        dump = dict(type='DumpDetResults', out_file_path=out)
        cfg.test_evaluator = [*(metrics if isinstance(metrics, list) else [metrics]), dump]
    elif scope == 'mmseg':
        metrics = cfg.test_evaluator
        for metric in metrics if isinstance(metrics, list) else [metrics]:
            metric.output_dir = out
            metric.keep_results = True
    else:
        raise ValueError(f"--out needs default_scope 'mmdet' or 'mmseg', got {scope!r}")


def enable_tta_(cfg: Config) -> None:
    """Tests with augmentation (``--tta``), as the config says; detectors are flipped by default.

    Of detectors that predict masks of instances, boxes alone are tested, see ``BoxesAloneHook``.

    Raises:
        ValueError: If there is neither a ``tta_pipeline`` nor a default for it, or the model
            predicts masks by a head that its boxes cannot do without.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmseg'):
        raise ValueError(f"--tta needs default_scope 'mmdet' or 'mmseg', got {scope!r}")
    if scope == 'mmdet':
        _evaluate_boxes_alone_(cfg)
    dataset = innermost_dataset(cfg.test_dataloader.dataset)
    if 'tta_pipeline' not in cfg:
        if scope != 'mmdet':
            raise ValueError('--tta needs tta_pipeline in a segmentation config, a pipeline with '
                             'a TestTimeAug in it')
        cfg.tta_pipeline = _flip_pipeline(dataset.pipeline)
    if 'tta_model' not in cfg:
        cfg.tta_model = (dict(type='SegTTAModel') if scope == 'mmseg' else dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _evaluate_boxes_alone_(cfg: Config) -> None:
    """Takes the metrics of masks out of a detector's evaluation."""
    evaluators = cfg.get('test_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        metric = evaluator.get('metric')
        metrics = [metric] if isinstance(metric, str) else list(metric or [])
        if 'segm' not in metrics:
            continue
        if not (cfg.model.get('roi_head') or {}).get('mask_head'):
            raise ValueError(f'--tta merges boxes alone, and the masks of {cfg.model.type} come '
                             f'with its boxes: test without --tta')
        evaluator.metric = [name for name in metrics if name != 'segm'] or ['bbox']


def _flip_pipeline(pipeline: list) -> list:
    """A detector's test pipeline that returns each image twice, flipped and not."""
    meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
                 'flip_direction')
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    pack = dict(type='PackDetInputs', meta_keys=meta_keys)
    return [*copy.deepcopy(pipeline[:-1]),
            dict(type='TestTimeAug', transforms=[flips, [pack]])]
