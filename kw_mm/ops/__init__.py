"""Functions of tensors. ``ops.reference`` has a slow, literal twin of each."""
from .assembly import assemble_kernel
from .attention import (
    logit_norms,
    mean_positions,
    mixing_weights,
    order_logits,
)
from .bases import contract_bases, mix_bases
from .cell_gradients import collect_gradients
from .compiled import use_cpu_products
from .convolution import dynamic_conv
from .cuda import use_triton
from .layout import cut_kernel

__all__ = ['assemble_kernel', 'collect_gradients',
           'contract_bases', 'cut_kernel', 'dynamic_conv', 'logit_norms', 'mean_positions',
           'mix_bases', 'mixing_weights', 'order_logits', 'use_cpu_products', 'use_triton']
