"""Fits the cells of a KW network with b < 1 to what its static network computes on images.

The kernels of such a network cannot be those of the static one, but its feature maps can come
nearer. While it is fitted, each layer has one kernel for all images, as after any static start: so
an ordinary network is trained whose kernels are mixed from cells, and that costs little more than
the static one. Norms use the statistics of the batch and have them measured again at the end.
"""
from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn import is_norm
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.state_dict import find_kw_layers
from ..export import to_static_
from ..layers import set_mixtures_
from ..layers.conv import KWConv
from ..ops import assemble_kernel, mixing_weights

# Adam moves each tensor by this part of the root mean square of its values in a step, at first.
RATE = 0.007
WARM_UP = 20  # steps
NUM_TIMED = 3  # steps to find out how long one takes
NUM_STATISTICS = 16  # batches from which norms take their statistics in the end
# Of the mean variance of channels, added to that of each, so that channels that are always the same
# do not dominate.
SMOOTHING = 0.1


@dataclass(frozen=True)
class FitReport:
    """What a fit did, in words.

    Attributes:
        before: How far feature maps are from the static network's, as a part of their deviation
            (root of the mean of squares over all maps), on images that were not used to fit.
        after: The same in the end.
        num_steps: Steps taken.
        idle: Layers that were not reached; their kernels are still those of the start.
    """

    before: float
    after: float
    num_steps: int
    idle: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (f'fitted in {self.num_steps} steps: on images that were not used to fit, feature '
                f'maps now differ from those of the static network by {self.after:.0%} of their '
                f'deviation, {self.before:.0%} before')
        if self.idle:
            text += ('\nnot fitted, because features do not depend on them: '
                     + ', '.join(self.idle))
        return text


def fit_to_static_(model: nn.Module, static: Mapping[KWConv, Tensor],
                   run: Callable[[nn.Module, Tensor], Any], batches: Iterator[Tensor],
                   held_out: Sequence[Tensor], num_steps: int | None = None,
                   seconds: float = 600.0, progress: Callable[[int, int, float], None] | None = None
                   ) -> FitReport:
    """Fits the cells and mixtures of warehouses with too few cells, and the norms, in place.

    Warehouses whose start is exact keep their kernels. In the end the attention gives the same
    kernels for every image, as after any static start.

    Args:
        model: A KW network, started from static weights.
        static: The effective static kernel of each KW convolution inside.
        run: Computes what is to be matched: called with a network and a batch.
        batches: Batches of images to fit to, endless.
        held_out: Batches to measure the result with.
        num_steps: Adam's steps; None for as many as fit into ``seconds``.
        seconds: See ``num_steps``.
        progress: Called after each step with the number of steps done, that of all steps, and the
            loss.

    Returns:
        How near feature maps have come.

    Raises:
        ValueError: If there is nothing to fit, because every warehouse has a cell for each piece.
    """
    fit = _Fit(model, static, run)
    before = fit.error(held_out)
    fit.adopt_statistics_(next(batches) for _ in range(NUM_STATISTICS))
    if num_steps is None:
        num_steps = max(1, int(seconds / fit.seconds_per_step(batches)) - NUM_STATISTICS)
    rates = [group['lr'] for group in fit.optimizer.param_groups]
    for step in range(num_steps):
        factor = min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / num_steps)) / 2
        for group, rate in zip(fit.optimizer.param_groups, rates):
            group['lr'] = rate * factor
        loss = fit.loss(next(batches))
        fit.optimizer.step()
        if progress:
            progress(step + 1, num_steps, loss)
    fit.measure_norms_(next(batches) for _ in range(NUM_STATISTICS))
    after = fit.error(held_out)
    fit.write_back_()
    return FitReport(before, after, num_steps, fit.idle())


@dataclass
class _Mixed:
    """A warehouse with too few cells: its layers, their mixtures and its cells, to be trained."""

    layers: list[KWConv]
    mixtures: list[Tensor]
    cells: Tensor


class _Fit:
    """The static network, and one with kernels mixed from cells that is to become like it."""

    def __init__(self, model: nn.Module, static: Mapping[KWConv, Tensor],
                 run: Callable[[nn.Module, Tensor], Any]) -> None:
        self.model = model
        layers = find_kw_layers(model)
        self.student: Any = revert_sync_batchnorm(copy.deepcopy(model).eval())
        to_static_(self.student)
        for module in self.student.modules():
            if hasattr(module, 'with_cp'):
                module.with_cp = False  # a block that is computed again would not have our kernels
        self.paths = {layer: _conv_path(self.student, names[0]) for layer, names in layers.items()}
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        with torch.no_grad():
            for layer, path in self.paths.items():
                weight = self.teacher.get_parameter(f'{path}.weight')
                weight.copy_(static[layer].reshape(weight.shape))
        self.mixed = _find_mixed(layers)
        if not self.mixed:
            raise ValueError('the budget must be below 1 in some warehouse for a fit to images: '
                             'with b >= 1 the start is exact')
        self.run = run
        blocks = dict.fromkeys(_block(model, names[0]) for names in layers.values())
        self.expected, self.actual = _Maps(self.teacher, blocks), _Maps(self.student, blocks)
        self.norms: dict[str, Any] = {
            name: module for name, module in self.student.named_modules() if is_norm(module)}
        self.biases = {layer: self.student.get_parameter(f'{path}.bias')
                       for layer, path in self.paths.items() if layer.bias is not None}
        self.student.requires_grad_(False)
        trained = [(tensor, RATE * _size(tensor)) for mixed in self.mixed
                   for tensor in (mixed.cells, *mixed.mixtures)]
        # What norms scale and shift is of size 1, whatever their own values are.
        trained += [(tensor, RATE) for norm in self.norms.values()
                    for tensor in norm.parameters()]
        trained += [(tensor, RATE * _size(tensor)) for tensor in self.biases.values()]
        for tensor, _ in trained:
            tensor.requires_grad_()
        self.optimizer = torch.optim.Adam(
            [dict(params=[tensor], lr=rate) for tensor, rate in trained], betas=(0.9, 0.99))

    def loss(self, images: Tensor) -> float:
        """The loss; computes its gradients."""
        loss = self._distances(images, training=True).mean()
        self.optimizer.zero_grad()
        loss.backward()
        return loss.item()

    def seconds_per_step(self, batches: Iterator[Tensor]) -> float:
        """How long a step takes here."""
        self.loss(next(batches))  # the first one allocates memory
        start = time.perf_counter()
        for _ in range(NUM_TIMED):
            self.loss(next(batches))
        return (time.perf_counter() - start) / NUM_TIMED

    def idle(self) -> tuple[str, ...]:
        """The layers on which nothing that was matched depends, by the last gradients."""
        paths = (self.paths[layer] for mixed in self.mixed
                 for layer, alpha in zip(mixed.layers, mixed.mixtures) if alpha.grad is None)
        return tuple(paths)

    @torch.no_grad()
    def error(self, batches: Iterable[Tensor]) -> float:
        """How far maps are from the static network's, in evaluation mode."""
        distances = [self._distances(images, training=False).mean() for images in batches]
        return torch.stack(distances).mean().sqrt().item()

    @torch.no_grad()
    def adopt_statistics_(self, batches: Iterable[Tensor]) -> None:
        """Lets batch norms do with statistics of these images what they did with their own.

        Those of other images, as of ImageNet, may be far off, and then norms that use statistics of
        the batch scale otherwise. Norms that are not reached, as those of heads, are left alone
        from here on.
        """
        moments: dict[str, list[Tensor]] = {name: [] for name in self.norms}
        with ExitStack() as hooks:
            for name, found in moments.items():
                hooks.callback(self.teacher.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, found=found: found.append(_moments(args[0]))).remove)
            for images in batches:
                self.run(self.teacher, images)
        self.norms = {name: norm for name, norm in self.norms.items() if moments[name]}
        for name, norm in self.norms.items():
            if isinstance(norm, _BatchNorm) and norm.affine and norm.track_running_stats:
                _adopt_(norm, *torch.stack(moments[name]).mean(0))

    @torch.no_grad()
    def measure_norms_(self, batches: Iterable[Tensor]) -> None:
        """Takes the statistics of batch norms anew, the mean of those of all batches."""
        norms = [norm for norm in self.norms.values() if isinstance(norm, _BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for images in batches:
            self._distances(images, training=True)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum

    @torch.no_grad()
    def write_back_(self) -> None:
        """Gives the model what has been fitted."""
        for mixed in self.mixed:
            set_mixtures_(mixed.layers, mixed.mixtures, mixed.cells)
        for name, norm in self.norms.items():
            self.model.get_submodule(name).load_state_dict(norm.state_dict())
        for layer, bias in self.biases.items():
            layer.get_parameter('bias').copy_(bias)

    def _kernels(self) -> dict[str, Tensor]:
        kernels = {}
        for mixed in self.mixed:
            for layer, alpha in zip(mixed.layers, mixed.mixtures):
                path = f'{self.paths[layer]}.weight'
                kernel = assemble_kernel(alpha[None], mixed.cells, layer.plan.grid,
                                         layer.kernel_size)[0]
                kernels[path] = kernel.reshape(self.student.get_parameter(path).shape)
        return kernels

    def _distances(self, images: Tensor, training: bool) -> Tensor:
        """For each map the squared distance to the static network's, in units of its variance."""
        with torch.no_grad():
            expected = self.expected.of(lambda: self.run(self.teacher, images))
        for norm in self.norms.values():
            norm.train(training)
        actual = self.actual.of(lambda: functional_call(
            _Call(self.student, self.run), {f'net.{k}': v for k, v in self._kernels().items()},
            (images,)))
        return torch.stack([_distance(a, b) for a, b in zip(actual, expected, strict=True)])


class _Call(nn.Module):
    """``run`` of a network as a module, for ``functional_call``."""

    def __init__(self, net: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net = net
        self.run = run

    def forward(self, images: Tensor) -> Any:
        return self.run(self.net, images)


class _Maps:
    """The outputs of some modules inside a network, in the order in which they are computed."""

    def __init__(self, net: nn.Module, paths: Iterable[str]) -> None:
        self.found: list[Tensor] = []
        for path in paths:
            net.get_submodule(path).register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 2:
            self.found.append(output)

    def of(self, call: Callable[[], Any]) -> list[Tensor]:
        """The outputs while something is called."""
        self.found = []
        call()
        found, self.found = self.found, []
        return found


def _moments(x: Tensor) -> Tensor:
    """Mean and mean of squares of each channel, ``(2, C)``."""
    rest = [d for d in range(x.dim()) if d != 1]
    return torch.stack((x.mean(rest), x.square().mean(rest)))


def _adopt_(norm: Any, mean: Tensor, square: Tensor) -> None:
    """Scales and shifts so that statistics of these moments give what the stored ones did."""
    old = (norm.running_var + norm.eps).sqrt()
    new = (square - mean.square()).clamp(min=0).add(norm.eps).sqrt()
    norm.bias += (mean - norm.running_mean) * norm.weight / old
    norm.weight *= new / old


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    # Channels are the second dimension of images, the last one of tokens (N, L, C).
    channel = 1 if expected.dim() > 3 else -1
    rest = [d for d in range(expected.dim()) if d != channel % expected.dim()]
    variance = expected.var(rest, correction=0, keepdim=True)
    scale = variance + SMOOTHING * variance.mean() + torch.finfo(variance.dtype).tiny
    return ((actual - expected).square() / scale).mean()


def _find_mixed(layers: Iterable[KWConv]) -> list[_Mixed]:
    """The warehouses with too few cells, with copies of their tensors."""
    shared: dict[tuple[nn.Module, int], list[KWConv]] = {}
    for layer in layers:
        shared.setdefault((layer.manager, layer.plan.warehouse), []).append(layer)
    return [_Mixed(members, [_mixtures(layer) for layer in members],
                   members[0].cells.detach().clone())
            for members in shared.values()
            if any(None in layer.plan.assignment.columns for layer in members)]


@torch.no_grad()
def _mixtures(layer: KWConv) -> Tensor:
    """The mixing weights ``(m, n)`` that a static start gave to a layer."""
    attention = layer.attention
    logits = attention.logits(attention.beta.new_zeros(1, layer.plan.hidden))
    return mixing_weights(logits, None, None)[0].clone()


def _size(tensor: Tensor) -> float:
    return max(tensor.detach().square().mean().sqrt().item(), 1e-4)


def _conv_path(net: nn.Module, path: str) -> str:
    """The static layer at the path of a KW layer, which may stand behind its padding."""
    return f'{path}.1' if isinstance(net.get_submodule(path), nn.Sequential) else path


def _block(model: nn.Module, path: str) -> str:
    """The block that a layer belongs to: its innermost parent that is no plain list of modules."""
    parts = path.split('.')
    for end in range(len(parts) - 1, 0, -1):
        above = '.'.join(parts[:end])
        if not isinstance(model.get_submodule(above), (nn.Sequential, nn.ModuleList)):
            return above
    # It stands in the lists of the network itself.
    for end in range(1, len(parts)):
        above = '.'.join(parts[:end])
        if isinstance(model.get_submodule(above), nn.Sequential):
            return above
    return path
