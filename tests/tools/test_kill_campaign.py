"""tools/analysis_tools/kill_campaign.py on a detector and a segmentor."""
import pytest
from forks import ROOT, finish, load_tool, start_tool
from toy_training import make_fast

from kw_mm.datasets import write_shapes

CONFIGS = ROOT / 'configs' / 'demo'
TOOL = 'analysis_tools/kill_campaign.py'

DETECTOR = """
_base_ = {base!r}
train_cfg = dict(max_epochs=3)
train_dataloader = dict(batch_size=4)
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]))
"""
# Iteration-based, as usual for segmentors.
SEGMENTOR = """
_base_ = {base!r}
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=6, val_interval=6)
train_dataloader = dict(batch_size=4, sampler=dict(type='InfiniteSampler'))
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=1e-4, begin=0, end=6, by_epoch=False)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))
log_processor = dict(by_epoch=False)
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32]))
"""


def changes(data, config):
    """Changes that point a config to the data."""
    loaders = [f'{split}_dataloader.dataset.data_root={data}/'
               for split in ('train', 'val', 'test')]
    metrics = [f'{split}_evaluator.ann_file={data}/annotations/instances_val.json'
               for split in ('val', 'test')] if 'mask' in config else []
    return ['--cfg-options', *loaders, *metrics]


@pytest.mark.slow
@pytest.mark.parametrize('base, text', [
    ('mask-rcnn_kw1x-r18_fpn_shapes.py', DETECTOR), ('fpn_kw1x-r18_shapes.py', SEGMENTOR)],
    ids=['detector', 'segmentor'])
def test_a_few_kills(tmp_path, base, text, capsys, monkeypatch):
    make_fast(monkeypatch)
    data = write_shapes(tmp_path / 'shapes', num_train=8, num_val=2, size=64).root
    config = tmp_path / 'small.py'
    config.write_text(text.format(base=str(CONFIGS / base)))
    argv = [str(config), '--work-dir', str(tmp_path / 'runs')]
    log = tmp_path / 'output.txt'
    output = finish(start_tool(TOOL, *argv, '--kills', '2', *changes(data, base), log=log), log)
    assert 'together' in output and ': the same; 2 kills so far' in output
    with pytest.raises(SystemExit) as exit_:
        load_tool(TOOL).main(argv)
    assert exit_.value.code == 2
    assert 'exists already' in capsys.readouterr().err
