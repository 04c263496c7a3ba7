"""The configs of the project, for several test files."""
import copy
import functools
import re
from pathlib import Path

from mmengine.config import Config

ROOT = Path(__file__).parents[1] / 'configs'
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('[!_]*/*.py'))

SEGMENTORS = ('deeplabv3plus', 'fcn', 'fpn', 'pspnet', 'upernet')
SEG_CONFIGS = [name for name in CONFIGS if Path(name).stem.split('_')[0] in SEGMENTORS]
DET_CONFIGS = [name for name in CONFIGS if name not in SEG_CONFIGS]


def read_config(name):
    """A copy of a config. Each is read once, because that takes a third of a second."""
    return copy.deepcopy(_read(name))


@functools.cache
def _read(name):
    return Config.fromfile(ROOT / name)


def by_model(names):
    """Lists of names that differ only in the length of training: 1x and 3x, 80k and 160k."""
    models = {}
    for name in names:
        models.setdefault(re.sub(r'-\d+[xek]_', '_', name), []).append(name)
    return list(models.values())
