"""Memory for kernels is reused, but never while it is still referenced."""
import gc
import math

import pytest
import torch
from in_threads import run_in_threads

from kw_mm.ops import memory

SHAPE = 3, memory.MIN_KEPT // 4 + 1


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory._free.clear()


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again():
    first = memory.reused_empty(SHAPE, torch.float32)
    assert first.shape == SHAPE and first.is_contiguous() and first.dtype == torch.float32
    where = address(first)
    del first
    # A smaller tensor of another dtype also fits.
    again = memory.reused_empty((2 * SHAPE[1],), torch.bfloat16)
    assert address(again) == where


@pytest.mark.parametrize('hold', [lambda t: t, lambda t: t[1:], lambda t: t.detach(),
                                  lambda t: t.view(torch.int32), lambda t: [t.transpose(0, 1)]])
def test_held_memory_is_not(hold):
    # A traced graph kept a workspace of the model as a constant.
    tensor = memory.reused_empty(SHAPE, torch.float32).fill_(1)
    where, held = address(tensor), hold(tensor)
    del tensor
    others = [memory.reused_empty(SHAPE, torch.float32).fill_(2) for _ in range(3)]
    assert where not in map(address, others)
    assert held is not None


def test_a_graph_holds_memory():
    x = torch.ones(SHAPE, requires_grad=True)
    kernel = memory.reused_empty(SHAPE, torch.float32).fill_(3)
    y = (x * kernel).sum()
    del kernel
    memory.reused_empty(SHAPE, torch.float32).fill_(math.nan)
    y.backward()
    assert torch.equal(x.grad, torch.full(SHAPE, 3.0))


def test_few_and_large_pieces_are_kept():
    tensors = [memory.reused_empty((factor, *SHAPE), torch.float32) for factor in (2, 1, 3, 1)]
    sizes = sorted(t.nbytes for t in tensors)
    del tensors
    assert sorted(map(len, memory._free.values())) == sizes[-memory.MAX_PIECES:]


def test_small_tensors_are_left_to_torch():
    memory.reused_empty((4,), torch.float32)
    assert not memory._free


def test_threads_have_memory_of_their_own():
    def work(thread):
        for _ in range(50):
            tensor = memory.reused_empty(SHAPE, torch.float32).fill_(thread)
            if not (tensor == thread).all():
                return False
            del tensor
        return True

    assert run_in_threads(work, 4) == [True] * 4


def test_inference_tensors_stay_in_inference():
    with torch.inference_mode():
        memory.reused_empty(SHAPE, torch.float32)
    assert len(memory._free) == 1
    # torch would refuse this in the memory of an inference tensor.
    memory.reused_empty(SHAPE, torch.float32).fill_(1).requires_grad_().sum().backward()


def test_large_tensors_get_all_that_they_ask_for():
    shape = 3, memory.MIN_LARGE // 8 + 1
    for _ in range(2):
        out = memory.large_empty(shape, torch.float32)
        assert out.shape == shape and out.dtype == torch.float32 and out.is_contiguous()
        out.fill_(1)
        assert out.sum(dtype=torch.float64) == out.numel()
