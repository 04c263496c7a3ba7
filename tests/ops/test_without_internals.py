"""Without torch's internal functions: slower paths, the same numbers, one line in the log."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kw_mm.ops import operators

# Run in a new process, for the operators are registered once, at import.
SCRIPT = """
import contextlib
import copy
import logging
import torch
from torch import nn
from torch._functorch import autograd_function
with contextlib.suppress(ImportError):
    import mmengine.runner  # imports what of torch needs the name itself

logging.basicConfig(format='LOG %(message)s')
place, name = LACKS
value = getattr(place, name)
delattr(place, name)
from kw_mm import KWConv2d, optimize_for_inference_
from kw_mm.ops import cell_gradients, operators
cell_gradients._has_internals()
setattr(place, name, value)
print('operators', operators.ARE_REGISTERED)
torch.manual_seed(0)
net = nn.Sequential(KWConv2d(8, 32, 3, bias=False, kw_cfg=dict(attn_norm='LN')), nn.BatchNorm2d(32),
                    KWConv2d(32, 16, 1, kw_cfg=dict(cell_num_ratio=4, attn_norm='LN')))
twin = copy.deepcopy(net).double()
x = torch.randn(3, 8, 7, 7)
for module, image in ((net, x), (twin, x.double())):
    module(image).square().sum().backward()
for ours, exact in zip(net.parameters(), twin.parameters()):
    assert (ours.grad - exact.grad).norm() < 1e-4 * exact.grad.norm() + 1e-5
net.eval()
with torch.no_grad():
    before = net(x)
    optimize_for_inference_(net)
    assert (net(x) - before).norm() < 1e-5 * before.norm()
"""


@pytest.mark.slow
@pytest.mark.parametrize('lacks, has_operators, name', [
    ("torch.autograd.function, '_SingleLevelFunction'", False, '_SingleLevelFunction'),
    # Torch below 2.4 registers no operators whatever it has.
    ("torch._C, '_current_graph_task_id'", operators.ARE_REGISTERED, '_current_graph_task_id')])
def test_what_is_missing_closes_the_fast_path(lacks, has_operators, name):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT.replace('LACKS', lacks)], capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[2])})
    assert done.returncode == 0, done.stderr
    assert f'operators {has_operators}' in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith('LOG torch ')]
    assert sum(name in line for line in lines) == 1, done.stderr
