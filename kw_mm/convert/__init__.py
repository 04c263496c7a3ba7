"""From static modules to KernelWarehouse ones, weights included; needs nothing but torch."""
from .candidates import treat_as_plain
from .conversion import convert_to_kw_, plan_conversion
from .state_dict import start_from_state_dict_

__all__ = ['convert_to_kw_', 'plan_conversion', 'start_from_state_dict_', 'treat_as_plain']
