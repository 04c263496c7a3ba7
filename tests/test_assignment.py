import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kw_mm.assignment import assign_cells
from kw_mm.plan import ConvSpec, plan_warehouses


def test_integer_budget_takes_every_bth_cell():
    first, second = assign_cells([2, 3], num_cells=10, budget=2)
    assert (first.first_cell, first.num_cells, first.columns) == (0, 4, (0, 2))
    assert (second.first_cell, second.num_cells, second.columns) == (4, 6, (4, 6, 8))


def test_half_budget_ties_the_diagonal():
    # By hand from t % 2 == (t // 2) % 2: t = 0, 3, 4, 7.
    first, second = assign_cells([4, 4], num_cells=4, budget=0.5)
    assert first.columns == (0, None, None, 1)
    assert second.columns == (2, None, None, 3)


def test_budget_of_one_and_a_half_gives_spare_cells_to_the_layer_they_follow():
    first, second = assign_cells([2, 2], num_cells=6, budget=1.5)
    assert (first.columns, first.label) == ((0, 1), '0..2')
    assert (second.columns, second.label) == ((3, 4), '3..5')


def test_a_mixture_count_that_the_authors_rule_cannot_divide():
    # Their rule would tie 0, 3 and 4 of each 5: six cells of five. Ours gives the layers 2 and 3;
    # runs [0, 3) [3, 5) and [0, 2) [2, 4) [4, 5), tied at offset i % length.
    first, second = assign_cells([5, 5], num_cells=5, budget=0.5)
    assert first.columns == (0, None, None, None, 1)
    assert second.columns == (2, None, None, 3, 4)


def test_small_layers_keep_a_cell_while_there_are_enough():
    big, small = assign_cells([98, 2], num_cells=10, budget=0.1)
    assert small.num_cells == 1
    assert [a.label for a in assign_cells([3, 3], 1, 0.2)] == ['none', '0..0']


budgets = st.one_of(st.floats(0.02, 8), st.sampled_from([0.25, 0.5, 1 / 3, 1, 2, 4, 0.3, 1.5]))


@settings(deadline=None, max_examples=300)
@given(mixtures=st.lists(st.integers(1, 40), min_size=1, max_size=6), budget=budgets)
def test_every_cell_belongs_to_one_layer_and_no_two_mixtures_share_one(mixtures, budget):
    num_cells = max(int(budget * sum(mixtures) + 1e-9), 1)
    assignments = assign_cells(mixtures, num_cells, budget)
    start = 0
    tied = []
    for assignment, count in zip(assignments, mixtures):
        assert assignment.first_cell == start
        assert len(assignment.columns) == count
        own = [column for column in assignment.columns if column is not None]
        assert all(start <= column < assignment.stop_cell for column in own)
        tied += own
        start = assignment.stop_cell
    assert start == num_cells
    assert tied == sorted(set(tied))
    if num_cells >= sum(mixtures):
        assert len(tied) == sum(mixtures)
    else:
        assert tied == list(range(num_cells))
        if num_cells >= len(mixtures):
            assert all(assignment.num_cells for assignment in assignments)


@pytest.mark.parametrize('ratio', [1, 2, 4, 0.5, 0.25])
def test_authors_rule_holds_in_a_stage_of_resnet18(ratio):
    names = ['0.conv1', '0.conv2', '1.conv1', '1.conv2']
    plan = plan_warehouses([ConvSpec(n, 64, 64, (3, 3)) for n in names],
                           dict(cell_num_ratio=ratio, cell_inplane_ratio=0.5,
                                cell_outplane_ratio=0.5))
    start = 0
    for layer in plan.layers.values():
        for t, column in enumerate(layer.assignment.columns):
            if ratio >= 1:
                assert column == layer.assignment.first_cell + t * ratio
            else:
                r = int(1 / ratio)
                is_tied = t % r == (t // r) % r
                assert column == (start if is_tied else None)
                start += is_tied
