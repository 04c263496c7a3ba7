"""Tensors in, tensors out. ``ops.reference`` holds a slow, literal twin of what computes."""
from .assembly import (
    assemble_kernel,
    cut_kernel,
    mix_cells,
    mix_in_place,
    mixes_in_place,
    positions_last,
)
from .attention import basis_logits, logit_norms, mean_positions, mix, mixing_weights
from .backend import use_cpu_products, use_triton
from .bases import block_mixtures, contract_bases, mix_bases
from .cell_gradients import collect_gradients
from .convolution import dynamic_conv

__all__ = ['assemble_kernel', 'basis_logits', 'block_mixtures', 'collect_gradients',
           'contract_bases', 'cut_kernel', 'dynamic_conv', 'logit_norms', 'mean_positions',
           'mix', 'mix_bases', 'mix_cells', 'mix_in_place', 'mixes_in_place', 'mixing_weights',
           'positions_last', 'use_cpu_products', 'use_triton']
