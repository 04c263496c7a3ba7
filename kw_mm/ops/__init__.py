"""Tensors in, tensors out. ``ops.reference`` holds a slow, literal twin of every function."""
from .assembly import assemble_kernel
from .attention import basis_logits, mixing_weights
from .convolution import dynamic_conv

__all__ = ['assemble_kernel', 'basis_logits', 'dynamic_conv', 'mixing_weights']
