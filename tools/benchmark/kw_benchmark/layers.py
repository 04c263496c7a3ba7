"""Compares each distinct KW layer of a backbone with a static convolution."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .formulas import plain_conv
from .machine import Rates, assembly_seconds, layer_costs
from .networks import Subject, distinct_layers, optimised
from .parity import compare_outputs, raise_on_failure
from .programs import KW, OPTIMISED, STATIC, inference, passes, run_once, summarise
from .setting import Workload
from .timing import time_in_turns


def compare_layers(subject: Subject, workload: Workload, rates: Rates,
                   memory_budget: int | None = None, **timing: Any) -> Iterator[dict[str, Any]]:
    """Measures inference of each layer, and training unless CUDA graphs are used.

    First each layer is compared with the plain formulas, for the same input as in timing;
    ``check_network`` compares the whole network. Arguments are those of ``compare``. Each layer
    gives a row of the report.

    Raises:
        ParityError: If a layer differs.
    """
    setting = workload.setting
    network = setting.place(subject.build_trained())
    fast, _ = optimised(network, memory_budget)
    for name, shape, count in distinct_layers(network, workload.shape):
        setting.forget_compiled()
        kw, plan = network.get_submodule(name), network.plan.layers[name]
        static = setting.place(nn.Conv2d(
            kw.in_channels, kw.out_channels, kw.kernel_size, kw.stride, kw.padding, kw.dilation,
            kw.groups, kw.bias is not None))
        x = setting.place(torch.randn(shape).relu())  # like the output of a ReLU
        modules = {STATIC: static, KW: kw, OPTIMISED: fast.get_submodule(name)}
        programs = {key: inference(module, x, setting) for key, module in modules.items()}
        with torch.inference_mode(), setting.autocast():
            expected = plain_conv(kw, x)
        raise_on_failure([compare_outputs(f'outputs of {name}', run_once(programs[KW]), expected)])
        row = dict(
            layer=name, count=count, input=list(shape), weight=list(plan.spec.weight_shape),
            stride=list(kw.stride), groups=kw.groups, mixtures=plan.num_mixtures,
            cells=plan.num_cells, hidden=plan.hidden, budget=subject.budget,
            setting=setting.describe())
        costs = layer_costs(plan, workload.batch, setting.dtype.itemsize)
        for kind in ('inference', 'training')[:1 if setting.cuda_graphs else 2]:
            if kind == 'training':
                programs = {key: passes(modules[key].train(), x, setting) for key in (STATIC, KW)}
            times = time_in_turns(programs, setting.device, **timing)
            row[kind] = summarise(times, assembly_seconds([costs], rates, kind == 'training'))
        yield row
