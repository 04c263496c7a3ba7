"""Tensors in, tensors out. ``ops.reference`` holds a slow, literal twin of what computes."""
from .assembly import assemble_kernel, assemble_logits
from .attention import (
    hidden_units,
    logit_norms,
    mean_positions,
    mixing_weights,
    order_logits,
)
from .bases import contract_bases, mix_bases
from .cell_casts import cast_once
from .cell_gradients import collect_gradients
from .compiled import use_cpu_products
from .convolution import dynamic_conv
from .cuda import triton_is_wanted, use_triton
from .layout import cut_kernel
from .path_table import use_paths

__all__ = ['assemble_kernel', 'assemble_logits', 'cast_once', 'collect_gradients',
           'contract_bases', 'cut_kernel', 'dynamic_conv', 'hidden_units', 'logit_norms',
           'mean_positions', 'mix_bases', 'mixing_weights', 'order_logits',
           'triton_is_wanted', 'use_cpu_products', 'use_paths', 'use_triton']
