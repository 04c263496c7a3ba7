"""Computes what is the same for all images once, before the first one."""
from .layers import OptimizedConv
from .optimization import OptimizationReport, optimize_for_inference_

__all__ = ['OptimizationReport', 'OptimizedConv', 'optimize_for_inference_']
