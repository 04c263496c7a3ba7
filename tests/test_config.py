import math

import pytest

from kw_mm import WarehouseConfig


def test_from_cfg_takes_dict_object_and_none():
    expected = WarehouseConfig(cell_num_ratio=4)
    assert WarehouseConfig.from_cfg(dict(cell_num_ratio=4)) == expected
    assert WarehouseConfig.from_cfg(expected) is expected
    assert WarehouseConfig.from_cfg(None) == WarehouseConfig()


def test_from_cfg_takes_a_dict_of_mmengine():
    from mmengine.config import ConfigDict
    cfg = ConfigDict(cell_num_ratio=4)
    assert WarehouseConfig.from_cfg(cfg) == WarehouseConfig(cell_num_ratio=4)


def test_defaults_fill_what_a_dict_leaves_out_and_nothing_else():
    config = WarehouseConfig.from_cfg(dict(reduction=0.5), attn_norm='LN', reduction=1 / 32)
    assert (config.attn_norm, config.reduction) == ('LN', 0.5)


def test_dict_round_trip_and_lists_become_tuples():
    config = WarehouseConfig(cell_num_ratio=[1, 0.5], spatial_partition=[True, False])
    assert config.cell_num_ratio == (1, 0.5)
    assert config.spatial_partition == (True, False)
    assert WarehouseConfig.from_cfg(config.to_dict()) == config
    hash(config)


def test_for_warehouse_picks_entries():
    config = WarehouseConfig(cell_num_ratio=(1, 0.5), reduction=0.25)
    single = config.for_warehouse(1, 2)
    assert (single.cell_num_ratio, single.reduction) == (0.5, 0.25)


@pytest.mark.parametrize('field', ['cell_num_ratio', 'cell_inplane_ratio', 'cell_outplane_ratio',
                                   'reduction', 'nonlocal_basis_ratio'])
@pytest.mark.parametrize('value, error', [
    (0, ValueError), (-1, ValueError), (math.nan, ValueError), (math.inf, ValueError),
    ('1x', TypeError), (True, TypeError), (None, TypeError), ((1, 0), ValueError),
    ((), ValueError), (('a',), TypeError)])
def test_bad_ratio_names_field_value_and_expectation(field, value, error):
    with pytest.raises(error, match=rf'{field} must .*got') as info:
        WarehouseConfig(**{field: value})
    bad = value[-1] if isinstance(value, tuple) and value else value
    assert 'empty' in str(info.value) if value == () else repr(bad) in str(info.value)


@pytest.mark.parametrize('field', ['cell_inplane_ratio', 'cell_outplane_ratio',
                                   'nonlocal_basis_ratio'])
def test_shares_stop_at_one(field):
    with pytest.raises(ValueError, match=rf'{field} must be a number in \(0, 1\].*got 2'):
        WarehouseConfig(**{field: 2})


def test_other_bad_values():
    with pytest.raises(TypeError, match='spatial_partition must be True or False.*got 1'):
        WarehouseConfig(spatial_partition=1)
    with pytest.raises(ValueError, match="attn_norm must be one of .*got 'BN2d'"):
        WarehouseConfig(attn_norm='BN2d')
    with pytest.raises(TypeError, match="kw_cfg must be a dict.*got '4x'"):
        WarehouseConfig.from_cfg('4x')
    with pytest.raises(ValueError, match=r"unknown key\(s\) \['cell_ratio'\].*cell_num_ratio"):
        WarehouseConfig.from_cfg(dict(cell_ratio=1))
    with pytest.raises(ValueError, match='cell_num_ratio .*each of the 4 warehouses.*2 entries'):
        WarehouseConfig(cell_num_ratio=(1, 2)).for_warehouse(0, 4)
