"""Marks of tests for what older versions of torch lack (docs/versions.md)."""
import pytest
import torch

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
