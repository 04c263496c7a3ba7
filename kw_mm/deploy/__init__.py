"""Whole detectors and segmentors of OpenMMLab as files for other runtimes."""
from .comparison import compare
from .exporting import export_model, load_model
from .models import export_form

__all__ = ['compare', 'export_form', 'export_model', 'load_model']
