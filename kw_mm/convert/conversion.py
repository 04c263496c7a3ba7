"""Turning any module into a KernelWarehouse one, in place."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..arguments import checks_arguments
from ..config import WarehouseConfig
from ..layers import KWLinear, StartReport, WarehouseManager, start_from_static_
from ..plan import Warehouse, WarehousePlan
from .candidates import KW_LAYERS, Candidate, FilterFn, find_candidates
from .forms import PlainConv, has_own_form, read_plain
from .grouping import (
    ATTENTION_BOUND,
    Groups,
    group_by_pattern,
    group_by_stage,
    plan_groups,
    where_kept,
)
from .origin import Origin
from .surgery import swap_

logger = logging.getLogger(__name__)

MANAGER = 'warehouse_manager'


@checks_arguments()
def convert_to_kw_(module: nn.Module, kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None,
                   groups: Groups | None = None, filter_fn: FilterFn = None,
                   linear: bool = False) -> ConvertedPlan:
    """Makes the convolutions of a module dynamic, in place, starting from their weights.

    At temperature 0 the module computes what it did before if the budget is at least 1. Below that,
    nothing is left of what it predicted: a warning says by how much kernels differ, and
    ``plan.start`` has it by warehouse. The module stays the same object with the same attributes,
    and gets a child ``warehouse_manager`` that owns all cells. Device, dtype, training mode and
    ``requires_grad`` are kept: a layer's attention is trainable if its weight was, a warehouse's
    cells if the weight of any of its layers was. Build optimizers afterwards.

    Layers of exactly these types are converted: ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``, with
    ``linear`` also ``nn.Linear``, and types that compute the same in another way, if that is known
    or declared (``treat_as_plain``). Known are mmcv's and timm's convolutions that pad their input
    depending on its size or standardise their weight. Their KW layers start from the weight after
    it was standardised. Everything else stays static, with the reason in ``plan.static``:

    - other subclasses (deformable, lazy, ...; those of known types, too) and transposed
      convolutions;
    - layers with hooks, parametrizations (weight and spectral norm), parameters that their type
      does not have, a replaced ``forward``, or a parameter that another module has too, and layers
      that are also stored in an attribute outside the module tree (e.g. in a list);
    - what ``filter_fn`` leaves out;
    - unless a group names them: linear layers inside an attention (a module whose name or class
      contains attention, attn or MSA), layers with fewer than 16 input channels, all layers inside
      a network that is a KW one already, and layers that ``group_by_stage`` finds too small.

    A layer that is used at several places stays shared: the same KW layer replaces it at all of
    them. Existing KW layers are left alone. If an error is raised, nothing has changed.

    Each sample gets its own kernel, and the first dimension of the input counts as samples, for
    linear layers too. In a head whose first dimension is regions of interest, each region gets a
    kernel, which is thousands of kernels.

    Args:
        module: Any module but a layer, a plain list of modules or a wrapper for distributed
            training.
        kw_cfg: Settings of the warehouses, a dict of ``WarehouseConfig``'s fields or the object.
        groups: Which layers share a warehouse: a sequence of groups or a mapping from names to
            them. A group is a glob of whole paths, such as ``'layer1.*.conv[12]'`` (as in
            ``fnmatch``, where ``*`` also matches dots), a list of globs, or
            ``dict(pattern=..., kw_cfg=...)`` with settings that take precedence over ``kw_cfg``.
            Layers of no group stay static. None finds groups from the module tree, see
            ``group_by_stage``.
        filter_fn: ``(layer, path) -> bool``; False leaves a layer static. It is called with each
            path of a shared layer.
        linear: Whether to convert linear layers, too; by default those of MLPs, see above.

    Returns:
        The plan, which prints as a table with what stayed static; ``plan.start`` has the errors.

    Raises:
        TypeError: If an argument, or the result of a form given to ``treat_as_plain``, is of a
            wrong type.
        ValueError: If the module is itself a layer (``KWConv2d.from_conv`` makes a new one), a
            list, or a wrapper; has a ``warehouse_manager`` already, as after an earlier conversion;
            if no layer can be converted; if a group matches nothing, two groups match the same
            layer, or the layers of a group cannot share; if a layer does not compute what was
            declared for its type; or if a setting is out of range.
    """
    return plan_conversion(module, kw_cfg, groups, filter_fn, linear).apply_()


@dataclass(frozen=True)
class ConvertedPlan(WarehousePlan):
    """The plan of a converted network, with what became of its weights.

    Attributes:
        start: How well each warehouse reproduces the static kernels it started from; prints as a
            table. None if weights are random.
    """

    start: StartReport | None = None


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned but not yet done.

    Attributes:
        module: What is to be converted.
        plan: Its warehouses, and the layers that stay static.
        layers: The layers to be replaced, in module order.
    """

    module: nn.Module
    plan: WarehousePlan
    layers: tuple[Candidate, ...]

    def apply_(self, start: bool = True) -> ConvertedPlan:
        """Does the conversion.

        Args:
            start: Whether to start from the layers' weights; otherwise weights are random.

        Returns:
            The plan, with the errors of the start.
        """
        first = self.layers[0].module.weight
        manager = WarehouseManager(self.plan, first.device, first.dtype)
        for warehouse, cells in zip(self.plan.warehouses, manager.weights):
            weights = [member.module.weight for member in self._members(warehouse)]
            cells.data = cells.data.to(weights[0].device, weights[0].dtype)
            cells.requires_grad = any(weight.requires_grad for weight in weights)
        manager.train(self.module.training)
        made: dict[nn.Module, nn.Module] = {}
        starts = []
        for candidate in self.layers:
            plain = read_plain(candidate.module, candidate.name)
            made[candidate.module], conv = _make(candidate, plain, manager)
            starts.append((conv, plain.weight, plain.bias))
        plan = ConvertedPlan(self.plan.warehouses, self.plan.static)
        if start:
            report = start_from_static_(starts)
            plan = replace(plan, start=report)
            logger.log(report.level, '%s', report)
        manager.plan = plan
        swap_(self.module, made)
        setattr(self.module, MANAGER, manager)
        return plan

    def _members(self, warehouse: Warehouse) -> list[Candidate]:
        names = {layer.spec.name for layer in warehouse.layers}
        return [candidate for candidate in self.layers if candidate.name in names]


def _make(candidate: Candidate, plain: PlainConv,
          manager: WarehouseManager) -> tuple[nn.Module, Any]:
    """A new layer for a static one, and the convolution that it is or has inside."""
    layer = candidate.kw_type.like(plain, manager=manager, name=candidate.name)
    conv = layer.conv if isinstance(layer, KWLinear) else layer
    conv.pad_input = plain.pad_input
    if has_own_form(candidate.module):
        conv.origin = Origin.of(candidate.module)
    return layer, conv


@checks_arguments()
def plan_conversion(module: nn.Module,
                    kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None,
                    groups: Groups | None = None, filter_fn: FilterFn = None,
                    linear: bool = False) -> Conversion:
    """Plans what ``convert_to_kw_`` would do and changes nothing; same arguments, same errors.

    ``print(plan_conversion(module).plan)`` shows it.
    """
    _check_root(module)
    config = WarehouseConfig.from_cfg(kw_cfg)
    candidates, static = find_candidates(module, filter_fn, linear)
    if groups is None:
        grouping = group_by_stage(candidates, module, config)
    else:
        grouping = group_by_pattern(candidates, static, groups)
    for key, members in grouping.warehouses.items():
        kept_in = {where_kept(member) for member in members}
        if len(kept_in) > 1:
            raise ValueError(f'layers of one group must have one dtype and device, got '
                             f'{sorted(kept_in)} in {key!r}')
    order = {name: i for i, name in enumerate(n for n, _ in module.named_modules())}
    kept = tuple(sorted([*static, *grouping.static], key=lambda entry: order[entry[0]]))
    if not grouping.warehouses:
        why = '; '.join(WarehousePlan((), kept).describe_static())
        raise ValueError('nothing matched: the module has no layer to convert'
                         + (f' ({why})' if why else ''))
    plan = replace(plan_groups(grouping, config, candidates), static=kept)
    logger.info('%s', plan)
    for warehouse in plan.warehouses:
        attention = sum(layer.num_attention_parameters for layer in warehouse.layers)
        fixed = sum(layer.spec.num_static_parameters for layer in warehouse.layers)
        if groups is not None and attention > 10 * ATTENTION_BOUND * fixed:
            logger.warning(
                'the attention of %r has %s parameters, %.0f times those of its static layers: '
                'the greatest common divisors of their channels make cells of %s; split the group',
                warehouse.key, f'{attention:,}', attention / fixed, warehouse.cell_shape)
    return Conversion(module, plan, tuple(c for c in candidates if c.name in plan.layers))


def _check_root(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f'module must be an nn.Module, got {module!r}')
    name = type(module).__name__
    if isinstance(module, KW_LAYERS):
        raise ValueError(f'nothing matched: the module is itself a {name} already')
    if isinstance(module, (_ConvNd, nn.Linear)):
        maker = 'KWLinear.from_linear' if isinstance(module, nn.Linear) else 'KWConv2d.from_conv'
        raise ValueError(f'module must hold the layers to replace, and is itself a {name}, which '
                         f'cannot be replaced in place; {maker} makes a new layer of it')
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f'module must be the owner of the {name}, not the list itself, in which '
                         'the warehouse_manager would stand among its entries')
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f'module must be what the {name} wraps; convert before wrapping')
    if hasattr(module, MANAGER):
        raise ValueError(f'module must not have an attribute {MANAGER!r} yet, got a {name} that '
                         'has: it was converted before, or is a KW backbone; convert everything '
                         'in one call')
