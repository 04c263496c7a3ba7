"""Where the time goes, by part of a layer and by kernel; and what a GPU is asked to start."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from .gpu_cases import NETWORKS, SHAPE, triton
from .launches import count_launches
from .networks import Subject, make_images, optimised
from .programs import inference, run_once, training
from .schedule import Findings
from .setting import Setting

NUM_KERNELS = 10
RANGE = 'kw: attention and assembly'
# What an event belongs to: the first of these that it, or else what called it, has in its name.
PLACES = (
    ('assembly', ('kw_mm::', 'kw_mm_assemble', 'kw_mm_mix', '_AssembleCollected', 'CellGradients')),
    ('attention', (RANGE, 'kw_mm_')),
    ('convolution', ('convolution', 'Convolution', 'aten::bmm', 'BmmBackward', 'aten::baddbmm')),
    ('norms', ('batch_norm', 'BatchNorm', 'layer_norm')),
    ('optimizer', ('Optimizer.step',)),
)
OTHER = 'everything else'


def place_of(event: Any) -> str:
    """The part of a layer that an event of the profiler belongs to."""
    while event is not None:
        for place, words in PLACES:
            if any(word in event.name for word in words):
                return place
        event = event.cpu_parent
    return OTHER


def mark_kernels_(module: nn.Module) -> None:
    """Has every KW layer tell the profiler when it makes its kernels."""
    for layer in module.modules():
        if callable(getattr(layer, 'kernel', None)):
            layer.kernel = _marked(layer.kernel)


def _marked(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def marked(x: Tensor) -> Tensor:
        with record_function(RANGE):
            return function(x)
    return marked


def record(program: Any, device: str) -> Any:
    """A profile of one run, after one to warm up."""
    on_cuda = torch.device(device).type == 'cuda'
    for _ in range(3 if on_cuda else 1):
        run_once(program)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    with torch.profiler.profile(activities=activities) as found:
        run_once(program)
        if on_cuda:
            torch.cuda.synchronize(device)
    return found


def _microseconds(event: Any, on_cuda: bool) -> float:
    if not on_cuda:
        return event.self_cpu_time_total
    # torch 2.5 and older call it by the one kind of device.
    return getattr(event, 'self_device_time_total', None) or getattr(
        event, 'self_cuda_time_total', 0)


def profile(subject: Subject, kind: str, x: Tensor, setting: Setting, findings: Findings) -> None:
    """Adds what a training step, an inference or an optimised one spends its time on.

    Args:
        subject: The backbone.
        kind: ``'training'``, ``'inference'`` or ``'optimised'``.
        x: Images, on the CPU.
        setting: Where to run them.
        findings: Gets a row for the run, and one for each of its longest kernels.
    """
    module = setting.place(subject.build_trained())
    if kind == 'optimised':
        module, _ = optimised(module)
    mark_kernels_(module)
    make = training if kind == 'training' else inference
    found = record(make(module, setting.place(x), setting), setting.device)
    places: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    num_kernels: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == DeviceType.CPU:
            places[place_of(event)] += _microseconds(event, setting.on_cuda)
        if (event.device_type == DeviceType.CUDA) == setting.on_cuda:
            kernels[event.name] += (event.time_range.elapsed_us() if setting.on_cuda
                                    else event.self_cpu_time_total)
            num_kernels[event.name] += 1
    total = sum(places.values()) or 1
    name = f'{kind}, b={subject.budget:g}'
    findings.add('by part of a layer', run=name, ms=total / 1e3, kernels=sum(num_kernels.values()),
                 **{f'{place} %': f'{100 * places[place] / total:.1f}'
                    for place in (*(place for place, _ in PLACES), OTHER)})
    for kernel, microseconds in kernels.most_common(NUM_KERNELS):
        findings.add(f'kernels, {name}', kernel=f'`{kernel[:90]}`', times=num_kernels[kernel],
                     ms=microseconds / 1e3)


def compare_launches(device: str, findings: Findings, with_triton: bool) -> None:
    """Kernels that a GPU starts, beside those counted on the meta device.

    Libraries may start more than one for a product or a convolution, so that the counts need not be
    equal; ours must not start more than they declare, which is checked by name.
    """
    net = NETWORKS['resnet']().eval()
    x = make_images(*SHAPE)[:1]
    counted = count_launches(net.to('meta'), x.to('meta'), with_triton)
    setting = Setting(device)
    net = setting.place(NETWORKS['resnet']().eval())
    with triton(with_triton):
        found = record(inference(net, setting.place(x), setting), device)
    events = [e for e in found.events() if e.device_type == DeviceType.CUDA]
    ours = Counter(e.name for e in events if e.name in TRITON_KERNELS)
    findings.add('kernels of one inference', triton=with_triton, counted=counted.total,
                 started=len(events), ours=dict(ours))
    declared = sum(n for name, n in counted.counts.items() if name.startswith('kw_mm::'))
    if with_triton and sum(ours.values()) > declared:
        raise AssertionError(f'operators declare {declared} Triton kernels, {dict(ours)} started')


TRITON_KERNELS = ('_assemble_kernel', '_mix_bases_kernel', '_grad_alpha_kernel',
                  '_grad_cells_kernel')


def check_synchronisation(device: str, findings: Findings) -> None:
    """Inference and a training step, in mixed precision, that must not wait for a result.

    Raises:
        RuntimeError: If one does; the message of torch says where.
    """
    setting = Setting(device, torch.bfloat16, amp=True, channels_last=True)
    for name in ('resnet', 'convnext'):
        x = setting.place(make_images(*SHAPE))
        module = setting.place(NETWORKS[name]())
        fast, _ = optimised(module)
        for kind, program in (('inference', inference(module, x, setting)),
                              ('optimised', inference(fast, x, setting)),
                              ('training', training(module, x, setting))):
            run_once(program)
            torch.cuda.synchronize(device)
            torch.cuda.set_sync_debug_mode('error')
            try:
                run_once(program)
            finally:
                torch.cuda.set_sync_debug_mode('default')
            findings.add('synchronisation', network=name, run=kind, result='none')
