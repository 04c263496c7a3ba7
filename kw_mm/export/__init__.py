"""Forms in which KW models leave PyTorch. Of OpenMMLab nothing is imported here."""
from .files import ModelFile, record, write_model
from .forms import prepare_for_export_
from .layers import ExportConv, ExportLinear
from .static import StaticReport, to_static_

__all__ = ['ExportConv', 'ExportLinear', 'ModelFile', 'StaticReport', 'prepare_for_export_',
           'record', 'to_static_', 'write_model']
