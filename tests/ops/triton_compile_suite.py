"""Run by test_triton.py: Triton's compiler and ptxas accept every kernel. That needs no GPU.

The interpreter runs Python, and does not check types, shared memory, or errors of the assembler.
"""
import math
import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kw_mm.ops import triton_assembly
from kw_mm.ops.layout import cut_kernel

TYPES = {torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.float32: 'fp32',
         torch.float64: 'fp64'}

# The smallest shared memory per block of GPUs with capability 8.0 or more.
SHARED_MEMORY = 99 * 1024


class Compiler:
    """Replaces a kernel: a launch compiles it for its arguments and keeps the result."""

    def __init__(self, kernel, capability, results):
        self.kernel, self.capability, self.results = kernel, capability, results

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *arguments, num_warps, num_stages, **constants):
        signature, attributes = {}, {}
        # Like the launcher: an integer 1 becomes a constant, and multiples of 16 are marked.
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


# Capability of the GPU, dtype of cells and of mixing weights. Each occurs, but not all pairs.
@pytest.fixture(params=[
    (80, torch.bfloat16, torch.bfloat16), (90, torch.float16, torch.float32),
    (90, torch.float32, torch.float32), (80, torch.float64, torch.float64),
    (100, torch.bfloat16, torch.float32), (100, torch.float32, torch.float32),
], ids=lambda param: '-'.join(map(str, param)))
def target(request):
    return request.param


@pytest.fixture
def ptx(target, monkeypatch):
    """The PTX code of every kernel that is launched."""
    results = {}
    for name, kernel in list(vars(triton_assembly).items()):
        if name.endswith('_kernel') and isinstance(kernel, triton.runtime.JITFunction):
            monkeypatch.setattr(triton_assembly, name, Compiler(kernel, target[0], results))
    return results


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device='meta')


def compile_assembly(target, grid, kernel_size, cell_shape, num_samples, num_cells):
    """Calls the three functions as the operators do."""
    _, dtype, alpha_dtype = target
    alpha = meta(num_samples, math.prod(grid), num_cells, dtype=alpha_dtype)
    cells = meta(num_cells, *cell_shape, dtype=dtype)
    kernel = triton_assembly.assemble(alpha, cells, grid, kernel_size, None, dtype)
    pieces = cut_kernel(kernel, grid, cell_shape)
    assert kernel.dtype == triton_assembly.assemble_grad_cells(pieces, alpha).dtype == dtype
    grad_alpha = triton_assembly.assemble_grad_alpha(pieces, cells)
    assert grad_alpha.dtype == torch.promote_types(dtype, torch.float32)


def check_vectors(ptx):
    """No element is loaded or stored alone."""
    for code in ptx.values():
        sizes = [int(vector or 1) * int(bits) for vector, bits in re.findall(
            r'(?:ld|st)\.global\.(?:v(\d)\.)?b(\d+)', code)]
        assert sizes and set(sizes) == {128}
        assert 'cp.async.cg' in code
        # There are few mixing weights, so a thread may load 8 bytes at a time.
        assert set(re.findall(r'cp\.async\.ca\.shared\.global.*?, (\w+)', code)) <= {'0x8'}


# Convolutions of 48 to 96 channels. Because of a remainder the compiler did not see that columns
# are aligned; because of a stride of 1, with one position or cells of all positions, it did not see
# it for pieces. Every element of the kernels was then loaded and stored alone.
@pytest.mark.parametrize('grid, kernel_size, cell_shape', [
    ((9, 2, 1), (3, 3), (48, 48, 1, 1)), ((1, 2, 1), (1, 1), (48, 48, 1, 1)),
    ((1, 2, 2), (3, 3), (48, 16, 3, 3)),
], ids=['3x3', '1x1', 'whole'])
def test_assembly(ptx, target, grid, kernel_size, cell_shape):
    compile_assembly(target, grid, kernel_size, cell_shape, 2, 32)
    assert len(ptx) == 3
    check_vectors(ptx)


def test_gathered_pieces(ptx, target):
    _, dtype, alpha_dtype = target
    gathered = meta(18, 48 * 48 + 64, dtype=dtype)[:, :-64]
    triton_assembly.assemble_grad_cells(gathered.view(1, 1, 18, 1, 1, 1, 48 * 48),
                                        meta(1, 18, 32, dtype=alpha_dtype))
    triton_assembly.assemble_grad_alpha(gathered.view(1, 9, 2, 1, 48, 48, 1),
                                        meta(32, 48, 48, 1, 1, dtype=dtype))
    assert len(ptx) == 2
    check_vectors(ptx)


@pytest.mark.parametrize('target', [(80, torch.bfloat16, torch.bfloat16)], indirect=True)
@pytest.mark.parametrize('grid, kernel_size, cell_shape', [
    ((9, 6, 1), (3, 3), (7, 1, 1, 1)), ((1, 2, 3), (3, 2), (7, 5, 3, 2)),
])
def test_assembly_of_odd_sizes(ptx, target, grid, kernel_size, cell_shape):
    compile_assembly(target, grid, kernel_size, cell_shape, 3, 1)
    assert len(ptx) == 3


@pytest.mark.parametrize('tied', [False, True])
def test_logits_and_bases(ptx, target, tied):
    _, dtype, alpha_dtype = target
    grid, cells = (9, 2, 1), meta(32, 48, 48, 1, 1, dtype=dtype)
    tie = (meta(18, 32, dtype=alpha_dtype), meta(1, dtype=torch.float64)) if tied else (None, None)
    triton_assembly.assemble_logits(meta(2, 18, 33, dtype=alpha_dtype), *tie, cells, grid, (3, 3),
                                    meta(96, dtype=alpha_dtype), dtype)
    triton_assembly.mix_bases(meta(2, 16, dtype=alpha_dtype), meta(2, 18, 33, dtype=alpha_dtype),
                              meta(864, 17, 48, dtype=dtype), grid, (96, 48, 3, 3), dtype)
    assert set(ptx) == {'_assemble_kernel', '_mix_bases_kernel'}
    # Bases, all that is large there, come in whole vectors.
    assert 'cp.async.cg' in ptx['_mix_bases_kernel']
