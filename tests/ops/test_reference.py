"""The reference, to which fast paths are compared, equals numbers computed by hand."""
import torch

from kw_mm.ops import reference


def test_mixing_weights_of_two_mixtures_and_two_cells():
    logits = torch.tensor([[[3., -1., 1.], [0., 0., 2.]]], dtype=torch.float64)
    beta = torch.eye(2, dtype=torch.float64)
    alpha = reference.mixing_weights(logits, beta, torch.tensor(0.25, dtype=torch.float64))
    expected = torch.tensor([[[0.75 * 3 / 5.001 + 0.25, -0.75 / 5.001], [0, 0.25]]])
    torch.testing.assert_close(alpha, expected.double(), rtol=0, atol=1e-7)


def test_means_and_norms():
    x = torch.tensor([[[[1., 2.], [3., 6.]], [[-1., 0.], [0., 0.]]]])
    assert reference.mean_positions(x).tolist() == [[3., -0.25]]
    logits = torch.tensor([[[3., -1., 1.], [0., 0., 2.]]], dtype=torch.float64)
    assert reference.logit_norms(logits).tolist() == [[5.001, 2.001]]


def test_kernel_of_two_mixtures_and_two_cells():
    # A 1-d kernel of two positions: w_0 = 2 e_0 + e_1 and w_1 = -e_0.
    cells = torch.tensor([[[[1.], [2.]]], [[[10.], [20.]]]])  # (2, c_out=1, c_in=2, 1)
    alpha = torch.tensor([[[2., 1.], [-1., 0.]]])
    kernel = reference.assemble_kernel(alpha, cells, (2, 1, 1), (2,))
    assert kernel.tolist() == [[[[12., -1.], [24., -2.]]]]


def test_rows_are_ordered_position_then_out_group_then_in_group():
    # One cell per mixture, filled with the mixture's number.
    cells = torch.arange(12.).view(12, 1, 1, 1, 1)
    kernel = reference.assemble_kernel(torch.eye(12)[None], cells, (3, 2, 2), (1, 3))
    for position in range(3):
        assert kernel[0, :, :, 0, position].tolist() == [
            [4 * position, 4 * position + 1], [4 * position + 2, 4 * position + 3]]


def test_whole_cells_without_spatial_partition():
    cells = torch.arange(18.).view(2, 1, 1, 3, 3)
    kernel = reference.assemble_kernel(torch.eye(2)[None], cells, (1, 2, 1), (3, 3))
    assert torch.equal(kernel[0, :, 0], cells[:, 0, 0])


def test_basis_logits_put_own_cells_in_their_place():
    # local = 1 (cell 1), basis = 2, nonlocal = 2 (cells 0 and 2).
    rows = torch.tensor([[[5., 1., 2., 7.]]])
    fc3 = torch.tensor([[1., 1.], [10., -1.]])
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = reference.basis_logits(rows, fc3, bias, first_cell=1)
    torch.testing.assert_close(logits, torch.tensor([[[3.1, 5.2, 8.3, 7.4]]]))


def test_each_sample_meets_its_own_kernel():
    x = torch.tensor([[[1., 2., 3.]], [[1., 2., 3.]]])
    kernel = torch.tensor([[[[1., 1.]]], [[[0., 2.]]]])
    y = reference.dynamic_conv(x, kernel, torch.tensor([0.5]), (1,), (0,), (1,), 1)
    assert y.tolist() == [[[3.5, 5.5]], [[4.5, 6.5]]]
