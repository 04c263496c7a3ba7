"""Decides which candidates share a warehouse: as the user says, or from the module tree."""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..assignment import floor
from ..config import WarehouseConfig
from ..layers import KWLinear
from ..plan import MIN_WIDTH, WarehousePlan, count_mixtures, plan_warehouses
from .candidates import Candidate
from .stages import find_stage

Groups = Mapping[str, Any] | Sequence[Any]

# The attention of a group has at most so many times its static parameters (see group_by_stage). The
# paper's networks with b <= 1 are at 0.1 (ResNet50) to 0.8 (MobileNetV2).
ATTENTION_BOUND = 1.0


@dataclass(frozen=True)
class Grouping:
    """The warehouses that will be made.

    Attributes:
        warehouses: The layers of each by its key.
        static: Name and reason of each candidate that stays static.
        own_cfgs: Settings of single warehouses by key.
    """

    warehouses: Mapping[str, Sequence[Candidate]]
    static: Sequence[tuple[str, str]]
    own_cfgs: Mapping[Hashable, Any]


@dataclass(frozen=True)
class Group:
    """One warehouse as the user asks for it."""

    key: str
    patterns: tuple[str, ...]
    kw_cfg: Any = None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether a pattern matches one of the names."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.patterns)


def group_by_pattern(candidates: Sequence[Candidate], refused: Sequence[tuple[str, str]],
                     groups: Groups) -> Grouping:
    """Makes one warehouse for each group; layers of no group stay static.

    Args:
        candidates: The layers to choose from.
        refused: Name and reason of layers that cannot be converted, for messages.
        groups: As ``convert_to_kw_`` takes them.

    Raises:
        TypeError: If ``groups`` is of a wrong type.
        ValueError: If a group is malformed or matches nothing, or two groups match one layer.
    """
    wanted = list(parse_groups(groups))
    warehouses: dict[str, list[Candidate]] = {group.key: [] for group in wanted}
    static = []
    for candidate in candidates:
        matching = [group for group in wanted if group.matches(candidate.names)]
        if len(matching) > 1:
            raise ValueError(f'groups must not overlap, but {[g.key for g in matching]} all '
                             f'match {candidate.name!r}')
        if matching:
            warehouses[matching[0].key].append(candidate)
        else:
            static.append((candidate.name, 'matched by no group'))
    for group in wanted:
        if not warehouses[group.key]:
            why = [f'{name} ({reason})' for name, reason in refused if group.matches([name])]
            raise ValueError(
                f'groups must match layers each, but {group.key!r} with the pattern(s) '
                f'{list(group.patterns)} matches no convertible layer'
                + (f'; it matches {", ".join(why)}' if why else
                   '; patterns are globs of whole paths ("*" also spans dots), and linear layers '
                   'need linear=True'))
    return Grouping(warehouses, static,
                    {group.key: group.kw_cfg for group in wanted if group.kw_cfg is not None})


def parse_groups(groups: Groups) -> Iterator[Group]:
    """Reads the user's groups; see ``convert_to_kw_``."""
    if isinstance(groups, Mapping):
        named = [(str(key), group) for key, group in groups.items()]
    elif isinstance(groups, Sequence) and not isinstance(groups, str):
        named = [(f'group {i}', group) for i, group in enumerate(groups)]
    else:
        raise TypeError(f'groups must be a mapping or a sequence of groups, got {groups!r}')
    if not named:
        raise ValueError('groups must not be empty; None finds them from the module tree')
    for key, group in named:
        if not isinstance(group, Mapping):
            group = dict(pattern=group)
        unknown = set(group) - {'pattern', 'kw_cfg'}
        patterns = group.get('pattern')
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        if unknown or not isinstance(patterns, Sequence) or not patterns or not all(
                isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f'{key!r} of groups must be a glob, a list of globs, or a dict of '
                             f'pattern and, at will, kw_cfg; got {group!r}')
        yield Group(key, tuple(patterns), group.get('kw_cfg'))


def group_by_stage(candidates: Sequence[Candidate], root: nn.Module,
                   config: WarehouseConfig) -> Grouping:
    """Finds groups of layers that share well, with attentions of limited size.

    Layers of one stage (see ``find_stage``) and one kind share a warehouse. Kinds are depthwise,
    other grouped, spatial (larger than 1x1), pointwise and linear; layers that differ in
    dimensions, dtype or device are of different kinds, and so are different kernel sizes if cells
    are whole kernels. The size of cells is the greatest common divisors of the layers' channels;
    smaller cells mean more cells and a larger attention. If the attention has more than
    ``ATTENTION_BOUND`` times the static parameters of the group, the group is split: first into
    layers whose channels are multiples of those of the smallest, then by shape, then into halves,
    down to single layers. A layer whose attention is too large even then stays static. So does one
    whose kernel would be a single cell, because there would be nothing to mix.

    Depthwise and grouped layers have few weights, so the attention of both together is compared
    with the parameters of all layers of the stage. All attentions of a network together thus have
    at most twice its static parameters.

    Args:
        candidates: The layers, in module order.
        root: The module they are in.
        config: The settings of the warehouses. Of a tuple, the value that makes the attention
            largest is taken.
    """
    worst = _worst_case(config)
    modules = dict(root.named_modules(remove_duplicate=False))
    static = [(c.name, c.reservation) for c in candidates if c.reservation]
    kinds: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    kept_in = {where_kept(candidate) for candidate in candidates}
    for candidate in candidates:
        if not candidate.reservation:
            kind = _kind(candidate, worst)
            kind += f' {where_kept(candidate)}' if len(kept_in) > 1 else ''
            kinds[find_stage(candidate.name, modules), kind].append(candidate)
    stage_sizes: dict[str, int] = defaultdict(int)
    for name, module in root.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            stage_sizes[find_stage(name, modules)] += sum(
                p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))
    grouped_sizes: dict[str, int] = defaultdict(int)
    for (stage, _), members in kinds.items():
        grouped_sizes[stage] += sum(map(_size, members)) if _is_grouped(members[0]) else 0
    warehouses = {}
    for (stage, kind), members in kinds.items():
        allowance = ATTENTION_BOUND
        if _is_grouped(members[0]):
            allowance *= stage_sizes[stage] / grouped_sizes[stage]
        for key, group, reason in _split(f'{stage} {kind}'.lstrip(), members, worst, allowance):
            if reason is None:
                warehouses[key] = group
            else:
                static += [(candidate.name, reason) for candidate in group]
    return Grouping(warehouses, static, {})


def _split(key: str, members: Sequence[Candidate], config: WarehouseConfig, allowance: float,
           level: int = 0) -> Iterator[tuple[str, Sequence[Candidate], str | None]]:
    """Yields groups: key, members, and None or why these have to stay static."""
    problem = _problem(members, config, allowance)
    if problem is None or len(members) == 1:
        yield (members[0].name if len(members) == 1 else key), members, problem
        return
    parts: dict[str, Any] = {}
    if level == 0:
        parts = _by_multiples(key, members)
    elif level == 1:
        for member in members:
            shape = 'x'.join(map(str, member.spec.weight_shape))
            parts.setdefault(f'{key.partition(" by ")[0]} of {shape}', []).append(member)
    else:
        half = len(members) // 2
        parts = {f'{key.partition(" from ")[0]} from {part[0].name}': part
                 for part in (members[:half], members[half:])}
    for name, part in parts.items():
        yield from _split(name, part, config, allowance, level + 1)


def _by_multiples(key: str, members: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Puts layers together whose channels are multiples of those of the smallest among them."""
    parts: dict[tuple[int, int], set[Candidate]] = {}
    for member in sorted(members, key=lambda m: math.prod(m.spec.weight_shape[:2])):
        out_channels, in_channels = member.spec.weight_shape[:2]
        base = next((base for base in parts
                     if out_channels % base[0] == 0 and in_channels % base[1] == 0),
                    (out_channels, in_channels))
        parts.setdefault(base, set()).add(member)
    return {f'{key} by {base[0]}x{base[1]}': [m for m in members if m in part]
            for base, part in parts.items()}


def _problem(members: Sequence[Candidate], config: Any,
             allowance: float) -> str | None:
    specs = [member.spec for member in members]
    bound = allowance * sum(map(_size, members))
    try:
        mixtures = sum(count_mixtures(specs, config))
    except ValueError as error:
        return str(error)
    num_cells = max(floor(config.cell_num_ratio * mixtures), 1)
    if num_cells < 2:
        return 'its kernel would be a single cell, with nothing to mix'
    # With channels of odd sizes there can be millions of cells, which take long to plan.
    least = MIN_WIDTH * mixtures * min(num_cells, MIN_WIDTH)
    if least > bound or plan_warehouses(specs, config).num_attention_parameters > bound:
        return 'too small for an attention'
    return None


def _worst_case(config: WarehouseConfig) -> WarehouseConfig:
    """Replaces tuples by the value that makes the attention largest."""
    single: dict[str, Any] = {}
    for name, choose in (('cell_num_ratio', max), ('cell_inplane_ratio', min),
                         ('cell_outplane_ratio', min), ('reduction', max),
                         ('nonlocal_basis_ratio', max), ('spatial_partition', all)):
        value = getattr(config, name)
        single[name] = choose(value) if isinstance(value, tuple) else value
    return replace(config, **single)


def _kind(candidate: Candidate, config: WarehouseConfig) -> str:
    spec = candidate.spec
    if candidate.kw_type is KWLinear:
        return 'linear'
    if spec.groups > 1:
        depthwise = spec.groups == spec.in_channels == spec.out_channels
        kind = 'depthwise' if depthwise else 'grouped'
    else:
        kind = 'pointwise' if math.prod(spec.kernel_size) == 1 else 'spatial'
    if len(spec.kernel_size) != 2:
        kind += f' {len(spec.kernel_size)}d'
    if not config.spatial_partition:
        kind += f' {"x".join(map(str, spec.kernel_size))}'
    return kind


def where_kept(candidate: Candidate) -> str:
    """Dtype and device of its weight. Layers of one warehouse have the same."""
    weight = candidate.module.weight
    return f'{str(weight.dtype).removeprefix("torch.")} {weight.device}'


def _is_grouped(candidate: Candidate) -> bool:
    return candidate.spec.groups > 1


def _size(candidate: Candidate) -> int:
    return candidate.spec.num_static_parameters


def plan_groups(grouping: Grouping, config: WarehouseConfig,
                order: Sequence[Candidate]) -> WarehousePlan:
    """The plan of all warehouses, layers in module order.

    Raises:
        ValueError: If layers of a group cannot share.
    """
    keys = {member: key for key, group in grouping.warehouses.items() for member in group}
    specs = [replace(candidate.spec, warehouse=keys[candidate]) for candidate in order
             if candidate in keys]
    return plan_warehouses(specs, config, grouping.own_cfgs)
