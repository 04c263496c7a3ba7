"""The owner of all cells of a network, or of a layer that stands alone."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..plan import LayerPlan, WarehousePlan
from .loading import check_fit


class Cells(nn.ParameterList):
    """One parameter of cells per warehouse, as random as fits the plan.

    A class of its own for what makes a sharded model from one on the meta device: it calls
    ``reset_parameters`` of whatever holds parameters itself.

    Args:
        plan: Who shares what.
        device: Of the parameters, as in torch.
        dtype: Of the parameters, as in torch.
    """

    def __init__(self, plan: WarehousePlan, device=None, dtype=None) -> None:
        super().__init__(
            nn.Parameter(torch.empty(w.num_cells, *w.cell_shape, device=device, dtype=dtype))
            for w in plan.warehouses)
        self.plan = plan
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the cells of each layer as one convolution of their size (method, section 5)."""
        for layer in self.plan.layers.values():
            own = layer.assignment
            if own.num_cells and not self[layer.warehouse].is_meta:
                with torch.no_grad():
                    cells = self[layer.warehouse][own.first_cell:own.stop_cell]
                    nn.init.kaiming_normal_(cells.flatten(0, 1), mode='fan_out',
                                            nonlinearity='relu')


class WarehouseManager(nn.Module):
    """Owns one tensor of cells, ``weights[i]`` of shape ``(n, c_out, c_in, *k)``, per warehouse.

    Layers read their cells from here and own none, so that a cell tensor is one parameter and
    stands in a state dict exactly once.

    Args:
        plan: Who shares what.
        device: Of the parameters, as in torch.
        dtype: Of the parameters, as in torch.
    """

    def __init__(self, plan: WarehousePlan, device=None, dtype=None) -> None:
        super().__init__()
        self.plan = plan
        self.weights = Cells(plan, device, dtype)

    def reset_parameters(self) -> None:
        """Draws all cells again."""
        self.weights.reset_parameters()

    def cells(self, index: int) -> Tensor:
        """The cells of one warehouse, ``(n, c_out, c_in, *k)``.

        Raises:
            RuntimeError: If they are sharded apart from the layers that read them.
        """
        cells = self.weights[index]
        # Wrapped by themselves they are only whole while the wrapper runs, which no layer calls.
        if not isinstance(self.weights, Cells) or cells.dim() < 3:
            raise RuntimeError(
                f'the cells of warehouse {index} are sharded by themselves, so that layers cannot '
                'read them: keep WarehouseManager together with its layers, as with '
                'force_leaf_modules={WarehouseManager} of size_based_auto_wrap_policy '
                '(kw_mm.layers.WarehouseManager)')
        return cells

    def forward(self, x: Any) -> Any:
        """Returns its input: as the last child of an ``nn.Sequential`` it is in nobody's way."""
        return x

    def _apply(self, fn, recurse: bool = True):
        # Module.to(memory_format=torch.channels_last) takes any five dimensions for those of a 3-d
        # convolution and fails: cells are shown to it without their spatial extent.
        return super()._apply(lambda t: fn(t.flatten(2)).view(t.shape), recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        check_fit(self, state_dict, prefix)

    def extra_repr(self) -> str:
        return '\n'.join(
            f'({i}): {w.num_cells} cells of {tuple(w.cell_shape)}, {len(w.layers)} layers, '
            f'{w.num_mixtures} mixtures' for i, w in enumerate(self.plan.warehouses))


class CellUser(nn.Module):
    """A layer whose kernels are made of a warehouse's cells: its own, or shared ones.

    Shared cells are their manager's; the layer refers to it past nn.Module's registration, so that
    the manager's owner is its only parent.
    """

    plan: LayerPlan

    def _use_manager(self, manager: WarehouseManager, is_own: bool) -> None:
        if is_own:
            self.warehouse_manager = manager
        else:
            self.__dict__['_manager'] = manager

    @property
    def manager(self) -> WarehouseManager:
        """The owner of its cells."""
        own: Any = self._modules.get('warehouse_manager')
        return own or self.__dict__['_manager']

    @property
    def cells(self) -> Tensor:
        """The warehouse's cells, ``(n, c_out, c_in, *k)``: all of them, not only its own.

        Raises:
            RuntimeError: In one of the copies of ``nn.DataParallel``, whose cells are elsewhere.
        """
        if self.__dict__.get('_is_replica') and '_manager' in self.__dict__:
            raise RuntimeError('nn.DataParallel copies layers apart from the cells that they share '
                               'and cannot be used here: use DistributedDataParallel, with one '
                               'process if need be')
        return self.manager.cells(self.plan.warehouse)
