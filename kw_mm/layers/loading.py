"""Checks that a state dict has all of a KW layer or backbone, or nothing of it."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

MAX_NAMES = 6  # of keys in a message


class CheckpointMismatch(ValueError):
    """A checkpoint is not that of the network into which it is loaded."""


@dataclass
class WholeLoad:
    """What was found while a whole network is loaded.

    Attributes:
        fitting: Whether a KW layer or backbone has been found in the state dict.
        absent: Paths of those for which it has nothing, and whether each is (in) a backbone.
    """

    fitting: bool = False
    absent: dict[str, bool] = field(default_factory=dict)

    def note_absent(self, path: str, is_backbone: bool) -> None:
        """Notes that there is nothing for a module, unless it is inside another such module."""
        if not any(not outer or path.startswith(f'{outer}.') for outer in self.absent):
            self.absent[path] = is_backbone or 'backbone' in path

    def check(self, module: nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Refuses a state dict that has nothing for a backbone, or nothing for the whole module.

        Raises:
            CheckpointMismatch: If it does.
        """
        lost = [path for path, in_backbone in self.absent.items() if in_backbone]
        if not lost and self.absent and not self.fitting and not (
                state_dict.keys() & module.state_dict().keys()):
            lost = list(self.absent)
        if lost:
            heads = sorted({str(key).partition('.')[0] for key in state_dict})
            raise CheckpointMismatch(
                f'the checkpoint has nothing for {lost[0] or type(module).__name__!r}, which would '
                f'stay as it was initialised; its keys begin with {_listed(heads)}. A file of the '
                "backbone alone goes into the backbone's init_cfg (type='Pretrained', a static one "
                "type='StaticPretrained'); tools/model_converters/official2kw.py converts the "
                "authors' files, tools/model_converters/static2kw.py static detectors")


_whole_load: ContextVar[WholeLoad | None] = ContextVar('whole_load', default=None)
_strict: ContextVar[bool] = ContextVar('strict', default=False)


@contextmanager
def whole_load() -> Iterator[WholeLoad]:
    """A context in which a state dict is meant for the whole module that is loaded.

    Elsewhere, as in ``head.load_state_dict``, a layer or backbone stays as it is if the state dict
    has none of its keys.
    """
    load = WholeLoad()
    token = _whole_load.set(load)
    try:
        yield load
    finally:
        _whole_load.reset(token)


@contextmanager
def strict_loading() -> Iterator[None]:
    """A context in which mmengine refuses all missing, unknown or misshapen keys."""
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


def is_strict() -> bool:
    """Whether ``strict_loading`` is in force."""
    return _strict.get()


def check_fit(module: nn.Module, state_dict: Mapping[str, Any], prefix: str,
              may_lack: tuple[str, ...] = (), may_have: tuple[str, ...] = (),
              is_backbone: bool = False) -> None:
    """Refuses a state dict that has only part of a module, or other shapes.

    ``load_state_dict(strict=False)`` and mmengine load what fits and ignore or log the rest, but a
    layer that is half loaded computes nonsense. Must be called from ``_load_from_state_dict``,
    after the inherited method, which runs the hooks that rename keys.

    Args:
        module: A KW layer, the owner of cells, or a backbone.
        state_dict: The whole state dict that is loaded.
        prefix: Prefix of the module's keys, empty or ending in a dot.
        may_lack: Beginnings of keys, within the module, that may be missing.
            ``num_batches_tracked`` always may, as in old files.
        may_have: Beginnings of unknown keys, within the module, that are ignored.
        is_backbone: Whether it is a backbone.

    Raises:
        CheckpointMismatch: If keys are missing, unknown or misshapen. It names them and says what
            helps.
    """
    expected, own_ways = _entries(module, prefix)
    given = {key: value for key, value in state_dict.items()
             if key.startswith(prefix) and not key.startswith(own_ways)}
    load = _whole_load.get()
    passed = tuple(prefix + name for name in may_have)
    if not any(key in expected or not key.startswith(passed) for key in given):
        if load is not None and expected:
            load.note_absent(prefix[:-1], is_backbone)
        return
    if load is not None:
        load.fitting = True
    optional = tuple(prefix + name for name in may_lack)
    missing = [key for key in expected if key not in given and not key.startswith(optional)
               and not key.endswith('num_batches_tracked')]
    unknown = [key for key in given if key not in expected and not key.startswith(passed)]
    misshapen = [key for key, own in expected.items()
                 if key in given and not _same_shape(own, given[key])]
    if missing or unknown or misshapen:
        shapes = [f'{key} must be {_shape(expected[key])}, got {_shape(given[key])}'
                  for key in misshapen]
        differences = describe_keys(MAX_NAMES, missing=missing, unknown=unknown,
                                    misshapen=shapes)
        raise CheckpointMismatch(
            f'{prefix[:-1] or "the state dict"} of the checkpoint must be that of this '
            f'{type(module).__name__}, got keys {differences}. '
            + _advice(module, prefix, expected, given, missing, unknown))


def describe_keys(limit: int, **kinds: Sequence[str]) -> str:
    """Counts and names keys, with a limit for each kind: ``2 missing: a, b; 1 unknown: c``."""
    return '; '.join(f'{len(keys)} {kind}: {_listed(keys, limit)}'
                     for kind, keys in kinds.items() if keys)


def _listed(names: Sequence[str], limit: int = MAX_NAMES) -> str:
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')


def _entries(module: nn.Module, prefix: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The entries of a module's state dict, and the prefixes of children that change keys.

    ``state_dict()`` is not called, because hooks of sharded modules would gather tensors of all
    processes.
    """
    entries: dict[str, Any] = {}
    own_ways = []
    module._save_to_state_dict(entries, prefix, keep_vars=True)
    for name, child in module._modules.items():
        if child is None:
            continue
        if child._load_state_dict_pre_hooks:
            # Wrappers for sharding and activation checkpointing rename keys as they load.
            own_ways.append(f'{prefix}{name}.')
            continue
        inner, ways = _entries(child, f'{prefix}{name}.')
        entries.update(inner)
        own_ways += ways
    return entries, tuple(own_ways)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _same_shape(own: Any, given: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(given, Tensor):
        return isinstance(own, Tensor) == isinstance(given, Tensor)
    # Like torch, which takes a tensor of one entry for a scalar.
    return own.shape == given.shape or (not own.dim() and given.numel() == 1)


def _advice(module: nn.Module, prefix: str, expected: Mapping[str, Any], given: Mapping[str, Any],
            missing: Sequence[str], unknown: Sequence[str]) -> str:
    """What to do about it."""
    def tell_kw(keys: Sequence[str]) -> bool:
        return any('attention.' in key or 'warehouse_manager.' in key or key.startswith(
            f'{prefix}weights.') for key in keys)

    # Paths of KW layers. A KW linear layer contains a convolution.
    layers = {key.partition('attention.')[0] for key in missing if 'attention.' in key}
    layers |= {path[:-len('conv.')] for path in layers if path.endswith('conv.')}
    if any(getattr(inner, 'has_fixed_temperature', False) for inner in module.modules()):
        return 'The model is optimized for inference: load before optimize_for_inference_'
    if any(isinstance(value, Mapping) for value in given.values()):
        return ("The weights lie deeper in the file; those of the authors' are converted by "
                'tools/model_converters/official2kw.py')
    if any(key.endswith('attention.weight') for key in unknown):
        return ('The checkpoint is that of a model optimized for inference, which only such a '
                'model takes')
    if any(f'{path}weight' in unknown for path in layers):
        return ('The checkpoint is that of a static network: convert a detector or segmentor with '
                "tools/model_converters/static2kw.py, or start a backbone with init_cfg="
                "dict(type='StaticPretrained', ...)")
    if tell_kw(unknown) and not tell_kw(list(expected)):
        return ('The checkpoint is that of a KW network and this one is static: take the config '
                'it was trained with (static=False)')
    if tell_kw([*missing, *unknown]) or tell_kw(
            [key for key in expected if key in given and not _same_shape(
                expected[key], given[key])]):
        return ('The checkpoint has another budget, reduction or architecture: set kw_cfg '
                '(cell_num_ratio, cell_inplane_ratio, cell_outplane_ratio, reduction, '
                'nonlocal_basis_ratio, spatial_partition, attn_norm) as it was trained')
    return ('The checkpoint has another architecture: build the network as it was trained; files '
            'of the authors are converted by tools/model_converters/official2kw.py')
