"""Everything that can be computed once, before the first image."""
from .layers import OptimizedConv
from .optimization import OptimizationReport, optimize_for_inference_

__all__ = ['OptimizationReport', 'OptimizedConv', 'optimize_for_inference_']
