"""Which dtypes to compute in. The functions of autocast got their present form in torch 2.4."""
from __future__ import annotations

import torch
from torch import Tensor

_ASKS_BY_DEVICE = torch.__version__ >= '2.4'


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of products under autocast on a kind of device; None where it is off."""
    if device_type == 'meta':
        return None
    if _ASKS_BY_DEVICE:
        is_on = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if is_on else None
    if device_type == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a product takes a tensor: autocast's, which leaves float64 alone."""
    if tensor.dtype == torch.float64:
        return tensor.dtype
    return autocast_dtype(tensor.device.type) or tensor.dtype


def widest_dtype(device: torch.device) -> torch.dtype:
    """The most precise dtype of a device: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == 'mps' else torch.float64
