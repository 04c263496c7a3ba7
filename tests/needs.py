"""Marks of tests for what older versions of torch lack (docs/versions.md)."""
import functools

import pytest
import torch
from torch import nn

from kw_mm.ops import operators


def _multiplies_halves():
    try:
        return bool(torch.ones(2, 2, dtype=torch.float16).mm(torch.ones(2, 2).half()).all())
    except RuntimeError:
        return False


def _autocasts_to_float16():
    try:
        with torch.autocast('cpu', dtype=torch.float16):
            return True
    except RuntimeError:
        return False


needs_operators = pytest.mark.skipif(not operators.ARE_REGISTERED,
                                     reason='torch below 2.4 registers no operators')
needs_halves = pytest.mark.skipif(not _multiplies_halves(),
                                  reason='this torch multiplies no halves on CPUs')
needs_float16 = pytest.mark.skipif(not _autocasts_to_float16(),
                                   reason='on CPUs this torch autocasts to bfloat16 alone')


@functools.cache
def exports_max_pool():
    """Whether torch exports sizes that change and go through ``MaxPool2d``; 2.12 does not."""
    size = torch.export.Dim('size', min=16, max=64)
    try:
        torch.export.export(nn.MaxPool2d(3, 2, 1), (torch.zeros(1, 1, 32, 32),),
                            dynamic_shapes=({2: size},))
    except torch._dynamo.exc.UserError:
        return False
    return True
