import pytest

from kw_mm import ConvSpec, WarehouseConfig, plan_warehouses


def conv(name, in_channels, out_channels, k=3, groups=1, warehouse=0, bias=False):
    return ConvSpec(name, in_channels, out_channels, (k, k), groups, bias, warehouse)


def test_sizes_by_hand():
    # gcd(out) = gcd(64, 128) = 64, gcd(in) = gcd(64, 32) = 32; 1x1 cells.
    plan = plan_warehouses([conv('a', 64, 64, 3), conv('b', 32, 128, 1)], dict(cell_num_ratio=2))
    a, b = plan.layers['a'], plan.layers['b']
    assert a.cell_shape == (64, 32, 1, 1)
    assert (a.grid, a.num_mixtures) == ((9, 1, 2), 18)
    assert (b.grid, b.num_mixtures) == ((1, 2, 1), 2)
    assert a.num_cells == b.num_cells == 40
    assert plan.num_cell_parameters == 40 * 64 * 32
    # fc1 64 * 16, norm 2 * 16, fc2 (16 + 1) * 18 * 41; and 32 * 16 + 2 * 16 + 17 * 2 * 41.
    assert a.num_attention_parameters == 1024 + 32 + 17 * 18 * 41
    assert b.num_attention_parameters == 512 + 32 + 17 * 2 * 41
    assert plan.num_static_parameters == 64 * 64 * 9 + 128 * 32


def test_layer_norm_attention_has_a_bias_in_fc1():
    spec = conv('a', 8, 8, 1)
    batch, layer = (plan_warehouses([spec], dict(attn_norm=norm)).num_attention_parameters
                    for norm in ('BN1d', 'LN'))
    assert layer - batch == 16


def test_spatial_partition_off_keeps_whole_kernels():
    plan = plan_warehouses([conv('a', 8, 8, 3), conv('b', 8, 16, 3)],
                           dict(spatial_partition=False))
    assert plan.layers['b'].cell_shape == (8, 8, 3, 3)
    assert plan.layers['b'].grid == (1, 2, 1)
    with pytest.raises(ValueError, match=r'spatial_partition=False .*\(1, 1\), \(3, 3\)'):
        plan_warehouses([conv('a', 8, 8, 3), conv('b', 8, 8, 1)], dict(spatial_partition=False))


def test_depthwise_cells_span_one_input_channel():
    plan = plan_warehouses([conv('a', 32, 32, 3, groups=32), conv('b', 96, 96, 3, groups=96)])
    assert plan.layers['b'].cell_shape == (32, 1, 1, 1)
    assert (plan.layers['a'].num_mixtures, plan.layers['b'].num_mixtures) == (9, 27)


def test_warehouses_are_numbered_by_first_use_and_take_their_own_entry():
    plan = plan_warehouses([conv('a', 8, 8, warehouse='x'), conv('b', 8, 8, warehouse='y'),
                            conv('c', 8, 8, warehouse='x')],
                           WarehouseConfig(cell_num_ratio=(1, 2)))
    assert [w.key for w in plan.warehouses] == ['x', 'y']
    assert [w.num_cells for w in plan.warehouses] == [18, 18]
    assert plan.layers['c'].warehouse == 0


def test_non_local_basis():
    specs = [conv(n, 64, 64) for n in 'abcd']
    plan = plan_warehouses(specs, dict(cell_num_ratio=1, nonlocal_basis_ratio=0.5))
    layer = plan.layers['b']
    # 9 own cells of 36: max(int(27 * 0.5), 16) = 16 basis entries.
    assert layer.num_basis == 16
    assert layer.num_attention_parameters == (
        64 * 16 + 2 * 16 + 16 * 9 * (9 + 16 + 1) + 27 * 16 + 9 * 37)
    # A layer that owns the whole warehouse has no cells of others.
    assert plan_warehouses(specs[:1], dict(nonlocal_basis_ratio=0.5)).layers['a'].num_basis == 0


def test_print_shows_who_shares_what():
    text = str(plan_warehouses([conv('layer1.conv1', 64, 64), conv('layer1.conv2', 64, 128, 1)]))
    assert text.splitlines() == [
        'warehouse  cells           layer         weight      mixtures  own cells  attention',
        '---------  --------------  ------------  ----------  --------  ---------  ---------',
        '0          11 x 64x64x1x1  layer1.conv1  64x64x3x3          9  0..8           2,892',
        '                           layer1.conv2  128x64x1x1         2  9..10          1,464',
        '2 layers share 1 warehouse: 49,412 parameters (45,056 in cells, 4,356 in attention); '
        'static: 45,056']


def test_errors():
    with pytest.raises(ValueError, match="unique names, got 'a' twice"):
        plan_warehouses([conv('a', 8, 8), conv('a', 8, 8)])
    with pytest.raises(ValueError, match=r'cell_outplane_ratio .* 0.4 gives 3 channels .*the 8 '
                                         "of layer 'b'"):
        plan_warehouses([conv('b', 8, 8)], dict(cell_outplane_ratio=0.4))
    with pytest.raises(ValueError, match='cell_num_ratio .*1 warehouses, got 2 entries'):
        plan_warehouses([conv('a', 8, 8)], dict(cell_num_ratio=(1, 2)))
    with pytest.raises(ValueError, match='as many spatial dimensions'):
        plan_warehouses([conv('a', 8, 8), ConvSpec('b', 8, 8, (3,))])
    with pytest.raises(ValueError, match="groups of layer 'a' must divide in_channels=8, got 3"):
        conv('a', 8, 9, groups=3)
    with pytest.raises(ValueError, match='in_channels .*positive integer, got 0'):
        conv('a', 0, 8)
    with pytest.raises(ValueError, match='kernel_size .*1 to 3 positive integers'):
        ConvSpec('a', 8, 8, (3, 3, 3, 3))
