"""Converts the authors' checkpoints to MMDetection 3.x and back (method, sections 6 and 7)."""
from .conversion import convert_official_checkpoint, to_official_checkpoint
from .report import ConversionReport

__all__ = ['ConversionReport', 'convert_official_checkpoint', 'to_official_checkpoint']
