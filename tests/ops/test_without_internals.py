"""torch without what has no public name: slower paths, the same numbers, one line in the log."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Run in a new process, for the operators are registered once, at import.
SCRIPT = """
import logging
import torch
import torch.autograd.function
from torch._functorch import autograd_function

logging.basicConfig(format='LOG %(message)s')
place, name = LACKS
delattr(place, name)

import copy
from torch import nn
from kw_mm import KWConv2d, optimize_for_inference_
from kw_mm.ops import operators
print('operators', operators.ARE_REGISTERED)
torch.manual_seed(0)
net = nn.Sequential(KWConv2d(8, 32, 3, kw_cfg=dict(attn_norm='LN')), nn.BatchNorm2d(32),
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


@pytest.mark.parametrize('lacks, has_operators, names', [
    ("torch.library, 'register_fake'", False, ['register_fake']),
    ("torch.autograd.function, '_SingleLevelFunction'", False, ['_SingleLevelFunction']),
    ("torch._C, '_current_graph_task_id'", True, ['_current_graph_task_id']),
    ("torch._C, '_will_engine_execute_node'", True, ['_will_engine_execute_node'])])
def test_what_is_missing_closes_the_fast_path(lacks, has_operators, names):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT.replace('LACKS', lacks)], capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[2])})
    assert done.returncode == 0, done.stderr
    assert f'operators {has_operators}' in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith('LOG torch ')]
    assert len(lines) == 1 and all(name in lines[0] for name in names), done.stderr
