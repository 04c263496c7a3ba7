"""Run by test_triton.py: the compiler, with ptxas, takes every kernel. No GPU is needed for that.

The interpreter runs Python and knows neither types, nor shared memory, nor what the assembler
refuses.
"""
import math
import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kw_mm.ops import triton_assembly, triton_attention

TYPES = {torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.float32: 'fp32',
         torch.float64: 'fp64'}

# The least that any GPU of capability 8.0 or more offers to a block.
SHARED_MEMORY = 99 * 1024


class Compiler:
    """Stands for a kernel: a launch compiles it for what it is given, and keeps the result."""

    def __init__(self, kernel, capability, results):
        self.kernel, self.capability, self.results = kernel, capability, results

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *arguments, num_warps, num_stages, **constants):
        signature, attributes = {}, {}
        # As the launcher does: an integer 1 is a constant, multiples of 16 are known as such.
        for i, (parameter, value) in enumerate(zip(self.kernel.params, arguments)):
            name = parameter.name
            if value is None or (isinstance(value, int) and value == 1
                                 and not parameter.do_not_specialize):
                constants[name] = value
            elif isinstance(value, int):
                signature[name] = 'i32' if value < 2**31 else 'i64'
            else:
                signature[name] = '*' + TYPES[value.dtype]
            if name not in constants and (not isinstance(value, int) or (
                    value % 16 == 0 and not parameter.do_not_specialize)):
                attributes[i,] = [['tt.divisibility', 16]]
        signature.update((name, 'constexpr') for name in constants)
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, GPUTarget('cuda', self.capability, 32),
                                  dict(num_warps=num_warps, num_stages=num_stages))
        assert compiled.metadata.shared <= SHARED_MEMORY
        self.results[self.kernel.__name__] = compiled.asm['ptx']


# Capability of the GPU, dtype of the products, of the parameters: all of both, not all pairs.
@pytest.fixture(params=[
    (80, torch.bfloat16, torch.bfloat16), (90, torch.float16, torch.float32),
    (90, torch.float32, torch.float32), (80, torch.float64, torch.float64),
], ids=lambda param: '-'.join(map(str, param)))
def target(request):
    return request.param


@pytest.fixture
def ptx(target, monkeypatch):
    """The code of every kernel that is launched."""
    results = {}
    for module in (triton_assembly, triton_attention):
        for name, kernel in list(vars(module).items()):
            if name.endswith('_kernel') and isinstance(kernel, triton.runtime.JITFunction):
                monkeypatch.setattr(module, name, Compiler(kernel, target[0], results))
    return results


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device='meta')


def test_assembly(ptx, target):
    _, dtype, parameters = target
    # A 3x3 convolution of 48 to 96 channels.
    sizes = (9, 2, 1), (3, 3)
    alpha, cells = meta(1, 18, 27, dtype=dtype), meta(27, 48, 48, 1, 1, dtype=parameters)
    kernel = triton_assembly._assemble(alpha, cells, *sizes, dtype)
    triton_assembly._grad_cells(kernel, alpha, cells.shape, sizes[0], parameters)
    triton_assembly._grad_alpha(kernel, cells, sizes[0], dtype)
    assert len(ptx) == 3
    # Whole vectors: once a remainder hid from the compiler that columns are aligned, and every
    # element of the kernels was loaded and stored alone.
    stores = re.findall(r'st\.global\.(?:v(\d)\.)?b(\d+)', ptx['_assemble_kernel'])
    assert stores and all(int(vector or 1) * int(bits) == 128 for vector, bits in stores)
    assert all('cp.async.cg' in code for code in ptx.values())


@pytest.mark.parametrize('target', [(80, torch.bfloat16, torch.bfloat16)], indirect=True)
@pytest.mark.parametrize('sizes, cell_shape', [
    (((9, 6, 1), (3, 3)), (7, 1, 1, 1)),
    (((1, 2, 3), (3, 2)), (7, 5, 3, 2)),
])
def test_assembly_of_odd_sizes(ptx, target, sizes, cell_shape):
    _, dtype, _ = target
    alpha = meta(3, math.prod(sizes[0]), 1, dtype=dtype)
    cells = meta(1, *cell_shape, dtype=dtype)
    kernel = triton_assembly._assemble(alpha, cells, *sizes, dtype)
    triton_assembly._grad_cells(kernel, alpha, cells.shape, sizes[0], dtype)
    triton_assembly._grad_alpha(kernel, cells, sizes[0], dtype)
    assert len(ptx) == 3


def test_attention(ptx, target):
    _, dtype, parameters = target
    hidden, weight = meta(2, 16, dtype=dtype), meta(9 * 28, 16, dtype=parameters)
    bias, tau = meta(9 * 28, dtype=parameters), meta(dtype=torch.float64)
    alpha = triton_attention._mix(hidden, weight, bias, meta(9, 27, dtype=parameters), tau, dtype)
    triton_attention._mix_grad_logits(alpha, hidden, weight, bias, tau)
    assert len(ptx) == 2


@pytest.mark.parametrize('num_hidden, norm', [(17, False),
                                              (triton_attention.MAX_NORMED_UNITS, True)])
def test_hidden_units(ptx, target, num_hidden, norm):
    _, dtype, parameters = target
    pooled, weight = meta(2, 40, dtype=dtype), meta(num_hidden, 40, dtype=parameters)
    bias = meta(num_hidden, dtype=parameters)
    triton_attention._hidden_units(pooled, weight, bias, *(bias, bias) if norm else (None, None),
                                   1e-5, dtype)
    assert len(ptx) == 1
