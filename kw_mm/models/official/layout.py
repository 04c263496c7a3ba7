"""Finds the weights in a checkpoint: container, prefixes, and entries outside the backbone."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

State = dict[str, Tensor]

# In order of preference: where a file has averaged weights too, the published figures are theirs.
CONTAINERS = ('model_ema', 'model', 'state_dict')
BACKBONE = 'backbone.'


@dataclass(frozen=True)
class Layout:
    """Where a file has its weights; enough to write another file in the same way.

    Attributes:
        container: The entry of the file with the state dict; None if the file itself is a state
            dict.
        prefix: ``'module.'`` if all keys start so, otherwise empty.
        backbone_prefix: ``'backbone.'`` if the backbone's keys start so, otherwise empty.
    """

    container: str | None
    prefix: str = ''
    backbone_prefix: str = ''

    to_dict = asdict

    def key(self, name: str) -> str:
        """The key in the file of the backbone's entry ``name``."""
        return f'{self.prefix}{self.backbone_prefix}{name}'

    def pack(self, backbone: State, others: State, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a file of this layout. Without a container, ``meta`` is lost."""
        state = {self.key(name): tensor for name, tensor in backbone.items()}
        state.update((self.prefix + name, tensor) for name, tensor in others.items())
        if self.container is None:
            return state
        return {**({'meta': dict(meta)} if meta else {}), self.container: state}


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        layout: Where the weights are.
        backbone: The backbone's entries, named as in the backbone, classifiers included.
        others: The entries of the other parts of a detector, without ``module.``.
        choices: All containers of the file that have weights.
        left_out: Entries of the file that have no weights, or others than those taken.
    """

    layout: Layout
    backbone: State
    others: State
    choices: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the other parts, ``('neck', 'rpn_head', 'roi_head')``."""
        return tuple(dict.fromkeys(name.split('.')[0] for name in self.others))

    @property
    def kind(self) -> str:
        """``'classifier'``, ``'backbone'``, ``'detector'`` or ``'segmentor'``."""
        if not self.layout.backbone_prefix:
            return 'classifier'
        if not self.parts:
            return 'backbone'
        return 'segmentor' if 'decode_head' in self.parts else 'detector'


def unpack(checkpoint: Mapping[str, Any], weights: str | None = None) -> Contents:
    """Finds the weights in what a file holds.

    Args:
        checkpoint: What ``torch.load`` returns.
        weights: Which of ``CONTAINERS`` to take; by default the first that exists.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If it holds no weights, or not those asked for.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f'a checkpoint must be a dict, got {type(checkpoint).__name__}')
    choices = tuple(name for name in CONTAINERS
                    if isinstance(checkpoint.get(name), Mapping) and checkpoint[name])
    if weights is not None and weights not in choices:
        raise ValueError(f'weights must be one of what the checkpoint holds, {listed(choices)}, '
                         f'got {weights!r}')
    container = weights or next(iter(choices), None)
    if container is None and not any(isinstance(v, Tensor) for v in checkpoint.values()):
        raise ValueError(f'a checkpoint must hold weights, under one of {list(CONTAINERS)} or '
                         f'directly; this one holds {listed(checkpoint)}')
    state = checkpoint if container is None else checkpoint[container]
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f'weights must be tensors with names, got {type(value).__name__} '
                             f'under {key!r}')
    left_out = () if container is None else tuple(
        str(name) for name in checkpoint if name not in (container, 'meta'))

    prefix = 'module.' if all(key.startswith('module.') for key in state) else ''
    state = {key[len(prefix):]: tensor for key, tensor in state.items()}
    backbone_prefix = BACKBONE if any(key.startswith(BACKBONE) for key in state) else ''
    backbone = {key[len(backbone_prefix):]: tensor for key, tensor in state.items()
                if key.startswith(backbone_prefix)}
    others = {key: tensor for key, tensor in state.items() if not key.startswith(backbone_prefix)}
    return Contents(Layout(container, prefix, backbone_prefix), backbone, others, choices,
                    left_out)


def listed(names: Iterable[Any], limit: int = 8) -> str:
    """The first few of possibly hundreds of names."""
    names = [str(name) for name in names]
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return (', '.join(names[:limit]) or 'nothing') + more
