"""Reads the golden files in ``data/golden``: outputs of the authors' backbones, in float64.

The weights are not stored, because they follow from names and shapes: each state-dict entry is
drawn from numpy's ``RandomState``, seeded with the CRC-32 of its key.
"""
from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / 'data' / 'golden'


def load(name: str) -> dict:
    """One golden file as a dict."""
    return json.loads((FOLDER / f'{name}.json').read_text())


def backbone_entries(entries: dict) -> dict:
    """The entries of the backbone in a dict with state-dict names, without its classifier."""
    classifier = ('fc.', 'classifier.', 'head.', 'norm.')
    if any(key.startswith('classifier.1.conv') for key in entries):
        classifier += ('warehouse_manager.weights.9',)  # the cells of a dynamic classifier
    return {key: entry for key, entry in entries.items() if not key.startswith(classifier)}


def value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden value of the state-dict entry ``key``."""
    if key.endswith('num_batches_tracked'):
        return torch.zeros(shape, dtype=torch.long)
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith('running_var'):
        drawn = 1 + 0.2 * np.abs(noise)
    elif key.endswith(('running_mean', '.bias', 'basis_bias')):
        drawn = 0.1 * noise
    elif key.endswith('gamma'):
        drawn = 0.5 + 0.1 * noise
    elif len(shape) == 1:  # scale of a norm
        drawn = 1 + 0.1 * noise
    else:  # fan-in of a weight; for cells only positions and input channels
        fan = shape[2:] if 'warehouse_manager.weights' in key else shape[1:]
        drawn = noise * math.sqrt(2 / max(1, math.prod(fan)))
    return torch.from_numpy(np.asarray(drawn, dtype=np.float64))


def fill(module: torch.nn.Module) -> None:
    """Gives every entry of the module's state dict its golden value."""
    module.load_state_dict({key: value(key, tuple(old.shape))
                            for key, old in module.state_dict().items()})


def image(shape: list[int]) -> torch.Tensor:
    """The golden input."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal(tuple(shape)))


def samples(output: torch.Tensor, count: int) -> torch.Tensor:
    """The entries of an output that a golden file keeps."""
    return output.flatten()[torch.linspace(0, output.numel() - 1, count).long()]
