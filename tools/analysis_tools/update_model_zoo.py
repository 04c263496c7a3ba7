"""Writes the tables of the model zoo into configs/*/README.md and docs/backbones.md.

    python tools/analysis_tools/update_model_zoo.py            # writes what has changed
    python tools/analysis_tools/update_model_zoo.py --check    # fails if anything has

Parameters and FLOPs are computed. Results are read from configs/*/metafile.yml and
docs/backbones.yml, which contain published results only. A table is between the markers
`<!-- begin: model zoo -->` and `<!-- end: model zoo -->`; the text around it is written by hand.
"""
from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

import kw_mm  # noqa: F401  (registers everything)
from kw_mm.engine.complexity import Complexity, input_size, measure_config, measure_module
from kw_mm.files import replace_text
from kw_mm.models.official.report import as_code

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = '<!-- begin: model zoo -->', '<!-- end: model zoo -->'

BACKBONE_NAMES = {
    'r18': 'ResNet18', 'r50': 'ResNet50', 'convnext-t': 'ConvNeXt-T', 'mobilenet-v2': 'MobileNetV2',
    'r50-d8': 'ResNet50-D8', 'mobilenet-v2-d8': 'MobileNetV2-D8', 'swin-t-p4-w7': 'Swin-T',
    'regnetx-3.2GF': 'RegNetX-3.2GF'}
# Evaluators' names of the metrics, and the metafiles' names.
METRICS = {'bbox': 'box AP', 'segm': 'mask AP', 'mIoU': 'mIoU'}
# Folders whose configs are not in the zoo and need no metafile.
REMARKS = {'demo': 'of the demo, see above',
           'custom': 'a template for your own data',
           'small_data': 'for comparisons, see above'}

LEGEND = """\
Parameters and FLOPs are computed, see `python tools/analysis_tools/model_complexity.py --help`. A
FLOP is a multiply-add; the image has the size given (height x width). KW FLOPs, a part of the
others, go into attentions and the assembly of kernels."""


def readmes(root: Path = ROOT) -> list[Path]:
    """READMEs of all folders with configs."""
    return sorted({path.parent / 'README.md' for path in (root / 'configs').glob('[!_]*/*.py')})


def render(path: Path) -> str:
    """The text of a README, or of docs/backbones.md, with a new table.

    Raises:
        ValueError: If it does not have the markers of exactly one table.
    """
    text = path.read_text(encoding='utf-8')
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f'{path} must have the marker {marker} once, got {text.count(marker)}')
    table = folder_table(path.parent) if path.name == 'README.md' else (
        imagenet_table(path.with_suffix('.yml')))
    return f'{text.split(BEGIN)[0]}{BEGIN}\n{table}\n{END}{text.split(END)[1]}'


def folder_table(folder: Path) -> str:
    """One row for each config of a folder, in the order of its metafile."""
    entries = [(model, Config.fromfile(folder / f'{model["Name"]}.py')) for model in models(folder)]
    metrics = [name for key, name in METRICS.items()
               if any(key in evaluated(cfg) for _, cfg in entries)]
    rows = []
    for model, cfg in entries:
        whole, backbone = measure(cfg)
        results = published(model)
        remark = 'published by the authors' if results else 'not trained yet'
        rows.append((
            *network(model['Name']), training(cfg), '{} x {}'.format(*input_size(cfg)),
            millions(whole.parameters), billions(whole.flops), millions(backbone.parameters),
            billions(backbone.flops), billions(whole.attention_flops + whole.assembly_flops),
            *(f'{results[metric]:.1f}' if metric in results else '-' for metric in metrics),
            f'*{REMARKS.get(folder.name, remark)}*', f'[config]({model["Name"]}.py)'))
    header = ('Backbone', 'Budget', 'Training', 'Image', 'Params (M)', 'FLOPs (G)',
              'Backbone params (M)', 'Backbone FLOPs (G)', 'KW FLOPs (G)', *metrics, 'Results',
              'Config')
    return f'{markdown(header, rows)}\n\n{LEGEND}'


def models(folder: Path) -> list[Mapping[str, Any]]:
    """The entries of a folder's metafile, or its configs if it has none."""
    metafile = folder / 'metafile.yml'
    if metafile.exists():
        return yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']
    return [dict(Name=path.stem) for path in sorted(folder.glob('*.py'))]


def published(model: Mapping[str, Any]) -> dict[str, float]:
    """All metrics of a metafile's entry."""
    return {metric: value for result in model.get('Results', ())
            for metric, value in result['Metrics'].items()}


def network(name: str) -> tuple[str, str]:
    """Backbone and budget from a name in MMDetection's scheme, method_backbone_..."""
    backbone = name.split('_')[1]
    dynamic = re.fullmatch(r'kw(\d+(?:d\d+)?)x-(.+)', backbone)
    if dynamic:
        return f'KW-{BACKBONE_NAMES.get(dynamic[2], dynamic[2])}', dynamic[1].replace('d', '/')
    return BACKBONE_NAMES.get(backbone, backbone), 'static'


def evaluated(cfg: Config) -> list[str]:
    """Those keys of METRICS that a config's validation computes."""
    names = [name for each in listed(cfg.val_evaluator)
             for field in ('metric', 'iou_metrics') for name in listed(each.get(field, []))]
    return [name for name in names if name in METRICS]


def listed(value: Any) -> list[Any]:
    """A list of an option's value or values."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def training(cfg: Config) -> str:
    """The length of a config's training, and whether it uses mixed precision."""
    loop = cfg.train_cfg
    number, unit = (loop.max_epochs, 'epoch') if 'max_epochs' in loop else (
        loop.max_iters, 'iteration')
    length = f'{number:,} {unit}{"s" * (number != 1)}'
    is_mixed = cfg.optim_wrapper.type == 'AmpOptimWrapper'
    return f'{length}, {cfg.optim_wrapper.get("dtype", "float16")}' if is_mixed else length


_measured: dict[str, dict[str, Complexity]] = {}  # a model's schedules share them


def measure(cfg: Config) -> tuple[Complexity, Complexity]:
    """The measures of the whole model and of its backbone."""
    key = json.dumps([cfg.model, input_size(cfg)], sort_keys=True, default=str)
    if key not in _measured:
        _measured[key] = measure_config(cfg)
    return _measured[key][''], _measured[key]['backbone']


class Classifier(nn.Module):
    """A backbone with the head of the ImageNet models.

    Args:
        backbone: Its config.
        head: The head's config without sizes; an ordinary linear layer by default.
    """

    def __init__(self, backbone: Mapping[str, Any], head: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.backbone = MODELS.build(copy.deepcopy(backbone)).eval()
        width = self.backbone(torch.empty(1, 3, 32, 32))[-1].shape[1]
        sizes = dict(in_features=width, out_features=1000)
        self.head = MODELS.build(dict(copy.deepcopy(head), **sizes)) if head else (
            nn.Linear(**sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``(N, 3, H, W)`` to scores ``(N, 1000)``."""
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def measure_classifier(entry: Mapping[str, Any]) -> Complexity:
    """The measures of an entry of docs/backbones.yml with an image of 224 x 224."""
    with torch.device('meta'):
        classifier = Classifier(entry['backbone'], entry.get('head'))
        return measure_module(classifier, torch.empty(1, 3, 224, 224))['']


def imagenet_table(source: Path) -> str:
    """One row for each model of the authors' ImageNet table."""
    rows = []
    for entry in yaml.safe_load(source.read_text(encoding='utf-8')):
        found = measure_classifier(entry)
        head = f', head: `{as_code(entry["head"])}`' if 'head' in entry else ''
        rows.append((
            entry['model'], entry['budget'], millions(found.parameters),
            f'{entry["params"]:.2f}', billions(found.flops),
            billions(found.attention_flops + found.assembly_flops), f'{entry["top-1"]:.2f}',
            f'{entry["top-5"]:.2f}', f'`{as_code(entry["backbone"])}`{head}'))
    return markdown(('Model', 'Budget', 'Params (M)', 'published', 'FLOPs (G)', 'KW FLOPs (G)',
                     'top-1', 'top-5', 'Backbone'), rows)


def millions(number: int) -> str:
    return f'{number / 1e6:.2f}'


def billions(number: int) -> str:
    return f'{number / 1e9:.2f}' if number else '-'


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, centred like MMDetection's."""
    lines = [header, (':-:',) * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing')
    args = parser.parse_args(argv)
    stale = []
    for path in (*readmes(), ROOT / 'docs' / 'backbones.md'):
        text = render(path)
        if text != path.read_text(encoding='utf-8'):
            stale.append(path)
            if not args.check:
                replace_text(path, text)
    for path in stale:
        print(f'{path.relative_to(ROOT)} {"is stale" if args.check else "written"}')
    return int(args.check and bool(stale))


if __name__ == '__main__':
    raise SystemExit(main())
