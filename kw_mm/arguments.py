"""Arguments of public classes, checked against their annotations before anything is built."""
from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    # Configs may also use None, 0 and 1.
    return value is None or type(value).__name__ in ('bool', 'bool_') or (
        isinstance(value, Integral) and value in (0, 1))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _are_integers(value: Any) -> bool:
    return _is_sequence(value) and all(map(_is_integer, value))


def _is_dict(value: Any) -> bool:
    # Empty, or the config of something to build.
    return isinstance(value, Mapping) and (
        not value or isinstance(value.get('type'), (str, type)))


def _are_dicts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_dict, value))


# Only annotations made of these types are checked here. Functions check all other arguments
# themselves.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'int': (_is_integer, 'an integer'),
    'float': (_is_number, 'a finite number'),
    'bool': (_is_flag, 'True or False'),
    'str': (lambda value: isinstance(value, str), 'a string'),
    'Sequence[int]': (_are_integers, 'a tuple of integers'),
    'Mapping[str, Any]': (_is_dict, 'a dict with a type'),
    'list': (_are_dicts, 'a list of dicts with a type'),
    'nn.Module': (lambda value: hasattr(value, 'named_modules'), 'an nn.Module'),
    'FilterFn': (lambda value: value is None or callable(value), 'a function or None'),
    'Iterable[ConvSpec]': (lambda value: isinstance(value, Iterable), 'ConvSpecs'),
    'WarehouseManager': (lambda value: hasattr(value, 'plan'), 'a WarehouseManager'),
    'None': (lambda value: value is None, 'None'),
}


def checks_arguments(*but: str) -> Callable[[Callable], Callable]:
    """A decorator for which an argument of a wrong type is a ``TypeError`` that names it.

    Without it, the call would fail later with an error about something else. The function itself
    checks ranges. Annotations must be strings (``from __future__ import annotations``).

    Args:
        but: Names of arguments that the function checks itself.
    """
    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        kinds = {}
        for name, parameter in signature.parameters.items():
            parts = str(parameter.annotation).split(' | ')
            if name not in but and all(part in _KINDS for part in parts):
                kinds[name] = [_KINDS[part] for part in parts]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name in kinds and not any(fits(value) for fits, _ in kinds[name]):
                    expected = ' or '.join(text for _, text in kinds[name])
                    raise TypeError(f'{name} must be {expected}, got {value!r}')
            return function(*args, **kwargs)

        return checked

    return decorate


def check_positive(**values: Any) -> None:
    """Checks counts, such as numbers of channels.

    Raises:
        ValueError: If one is not a positive integer.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be a positive integer, got {value!r}')
