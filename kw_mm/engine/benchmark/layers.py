"""Every distinct KW layer of a backbone beside the static convolution of its geometry."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import floor
from .backbones import KW, OPTIMISED, STATIC, Subject, summarise
from .floor import Assembly, Rates
from .literal import plain_conv
from .networks import make_images, optimised, randomise_
from .parity import SHAPE, compare_outputs, raise_on_failure
from .programs import inference, training_pass
from .suite import Workload
from .timing import time_in_turns


def distinct_layers(module: nn.Module, shape: tuple[int, int, int]
                    ) -> list[tuple[str, tuple[int, ...], int]]:
    """The KW layers of a backbone, one of each geometry.

    Args:
        module: The backbone, placed.
        shape: Batch, height and width of its images.

    Returns:
        Name, shape of the input and number of layers alike.
    """
    names = {layer: name for name, layer in module.named_modules()}
    seen: dict[Any, list] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        plan, (x,) = layer.plan, args
        key = (plan.spec.weight_shape, layer.groups, layer.stride, layer.padding, layer.dilation,
               x.shape, plan.num_mixtures, plan.num_cells, plan.hidden)
        seen.setdefault(key, [names[layer], (shape[0], *x.shape[1:]), 0])[2] += 1

    hooks = [layer.register_forward_pre_hook(note) for layer in module.modules()
             if hasattr(layer, 'plan') and hasattr(layer, 'attention')]
    parameter = next(module.parameters())
    with torch.inference_mode():
        module.eval()(torch.zeros(1, 3, *shape[1:], device=parameter.device,
                                  dtype=parameter.dtype))
    for hook in hooks:
        hook.remove()
    return [tuple(entry) for entry in seen.values()]


def compare_layers(subject: Subject, workload: Workload, rates: Rates,
                   memory_budget: int | None = None, **timing: Any) -> Iterator[dict[str, Any]]:
    """Measures layer by layer, inference and training.

    Before its figures each layer is compared with plain torch on the very input it is timed with;
    the network as a whole is for ``check`` to compare.

    Args:
        subject: The backbone.
        workload: Its shape and setting.
        rates: Of the machine, for the floor.
        memory_budget: For the optimised network.
        **timing: Options of ``time_in_turns``.

    Yields:
        A row of the report for each layer, plain data.

    Raises:
        ParityError: If a layer differs.
    """
    setting = workload.setting
    network = subject.build()
    randomise_(network, make_images(*SHAPE))
    network = setting.place(network)
    fast, _ = optimised(network, memory_budget)
    for name, shape, count in distinct_layers(network, workload.shape):
        kw, plan = network.get_submodule(name), network.plan.layers[name]
        static = setting.place(nn.Conv2d(
            kw.in_channels, kw.out_channels, kw.kernel_size, kw.stride, kw.padding, kw.dilation,
            kw.groups, kw.bias is not None))
        # As after a ReLU.
        x = setting.place(torch.randn(shape).relu())
        with torch.inference_mode(), setting.autocast():
            raise_on_failure([compare_outputs(f'outputs of {name}', kw.eval()(x),
                                              plain_conv(kw, x))])
        row = dict(
            layer=name, count=count, input=list(shape), weight=list(plan.spec.weight_shape),
            stride=list(kw.stride), groups=kw.groups, mixtures=plan.num_mixtures,
            cells=plan.num_cells, hidden=plan.hidden, budget=subject.budget,
            setting=setting.describe())
        assembly = Assembly.of(plan, workload.batch, setting.compute_dtype.itemsize)
        for kind, programs, ways in (
                ('inference', {STATIC: inference(static, x, setting), KW: inference(
                    kw, x, setting), OPTIMISED: inference(fast.get_submodule(name), x, setting)},
                 floor.INFERENCE),
                ('training', {STATIC: training_pass(static, x, setting),
                              KW: training_pass(kw, x, setting)},
                 dict(cells=floor.training))):
            times = time_in_turns(programs, setting.device, **timing)
            base = times[STATIC].median()
            row[kind] = dict(summarise(times), floors={
                way: 1 + function(assembly, rates) / base for way, function in ways.items()})
        yield row
