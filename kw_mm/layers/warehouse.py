"""The owner of all cells of a network, or of a single layer."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import cast_once
from ..ops.autocast import product_dtype
from ..plan import LayerPlan, WarehousePlan
from .loading import check_fit


class Cells(nn.ParameterList):
    """One parameter of cells per warehouse, with initial values for the plan's layers.

    A class of its own, because sharding a model on the meta device calls ``reset_parameters`` of
    every module that has parameters.

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
        """Draws the cells of each layer like the weight of one convolution (method, section 5)."""
        for layer in self.plan.layers.values():
            own = layer.assignment
            if own.num_cells and not self[layer.warehouse].is_meta:
                with torch.no_grad():
                    cells = self[layer.warehouse][own.first_cell:own.stop_cell]
                    nn.init.kaiming_normal_(cells.flatten(0, 1), mode='fan_out',
                                            nonlinearity='relu')


class WarehouseManager(nn.Module):
    """Owns one tensor of cells, ``weights[i]`` of shape ``(n, c_out, c_in, *k)``, per warehouse.

    Layers read their cells from here and own none, so that a cell tensor is one parameter and is in
    a state dict exactly once.

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
            RuntimeError: If they are sharded separately from the layers that read them.
        """
        cells = self.weights[index]
        # In a wrapper of their own, they are only complete while the wrapper runs, and no layer
        # calls it.
        if not isinstance(self.weights, Cells) or cells.dim() < 3:
            raise RuntimeError(
                f'the cells of warehouse {index} are sharded by themselves, so that layers cannot '
                'read them: keep WarehouseManager together with its layers, as with '
                'force_leaf_modules={WarehouseManager} of size_based_auto_wrap_policy '
                '(kw_mm.layers.WarehouseManager)')
        return cells

    def forward(self, x: Any) -> Any:
        """Returns its input, so that it may be the last child of an ``nn.Sequential``."""
        return x

    def _apply(self, fn, recurse: bool = True):
        # Module.to(memory_format=torch.channels_last) fails for tensors with five dimensions, which
        # it takes for weights of 3-d convolutions. So it gets cells without their spatial
        # dimensions.
        return super()._apply(lambda t: fn(t.flatten(2)).view(t.shape), recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        check_fit(self, state_dict, prefix)

    def extra_repr(self) -> str:
        return '\n'.join(
            f'({i}): {w.num_cells} cells of {tuple(w.cell_shape)}, {len(w.layers)} layers, '
            f'{w.num_mixtures} mixtures' for i, w in enumerate(self.plan.warehouses))


class CellUser(nn.Module):
    """A layer whose kernels are mixed from the cells of its own or a shared warehouse.

    Shared cells belong to their manager. The layer refers to it without registering it, so that the
    manager's owner is its only parent.
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
        """All cells of the warehouse, not only its own, ``(n, c_out, c_in, *k)``.

        Raises:
            RuntimeError: In one of the copies of ``nn.DataParallel``, whose cells are elsewhere.
        """
        if self.__dict__.get('_is_replica') and '_manager' in self.__dict__:
            raise RuntimeError('nn.DataParallel copies layers apart from the cells that they share '
                               'and cannot be used here: use DistributedDataParallel, with one '
                               'process if need be')
        return self.manager.cells(self.plan.warehouse)

    def cells_as(self, dtype: torch.dtype | None = None) -> Tensor:
        """The cells for mixtures in a dtype, by default their own, or autocast's where that is on.

        Layers that need no gradient share a narrower copy (``kw_mm.ops.cast_once``).
        """
        cells = self.cells
        dtype = product_dtype(cells) if dtype is None else dtype
        if cells.dtype.itemsize <= dtype.itemsize:
            return cells
        warehouse = self.manager.plan.warehouses[self.plan.warehouse]
        return cast_once(cells, dtype, self.plan.spec.name, len(warehouse.layers))
