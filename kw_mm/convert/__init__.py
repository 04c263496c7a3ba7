"""Converts static modules to KernelWarehouse ones, with their weights; needs torch only."""
from .conversion import convert_to_kw_, plan_conversion
from .forms import PlainConv, treat_as_plain
from .known_forms import SamePadding
from .state_dict import start_from_state_dict_

__all__ = ['PlainConv', 'SamePadding', 'convert_to_kw_', 'plan_conversion',
           'start_from_state_dict_', 'treat_as_plain']
