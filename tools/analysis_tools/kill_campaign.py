"""Kills and resumes a small training again and again, and compares it with an undisturbed one.

    python tools/analysis_tools/kill_campaign.py CONFIG --kills 100

CONFIG must train in the same way each time: with a seed (randomness = dict(seed=0)) and the hook
RandomStateHook, see its docstring. Half of the kills come at random times, half while a file is
written. If a resume is refused, a result differs or unfinished files remain, the exit status is 1.
"""
from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from kw_mm.engine.killing import Outcome, run_campaign
from kw_mm.engine.launch import config_path
from kw_mm.table import format_table

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=config_path, help='path of the config, of a run of seconds')
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0, help='of the moments at which to kill')
    parser.add_argument('--work-dir', default='work_dirs/kill_campaign',
                        help='where to write; must not exist')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='settings that replace those of the config, as for tools/train.py')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if sys.platform == 'win32':
        parser.error('it needs a system that can fork processes, which Windows cannot')
    if Path(args.work_dir).exists():
        parser.error(f'--work-dir {args.work_dir!r} exists already')
    scope = Config.fromfile(args.config).get('default_scope')
    if scope in ('mmdet', 'mmseg'):
        # Checked once here, not in each of the runs.
        importlib.import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    spec = importlib.util.spec_from_file_location('train_tool', TRAIN)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []

    def train(work_dir: str) -> None:
        tool.main([args.config, '--work-dir', work_dir, '--resume', *options])

    outcome = run_campaign(train, args.work_dir, args.kills, args.seed,
                           functools.partial(print, flush=True))
    print(table(outcome))
    if not outcome.is_clean:
        sys.exit(1)


def table(outcome: Outcome) -> str:
    """A table with the counts of a campaign."""
    return '\n' + format_table(('kills', ''), [
        ('at random times', str(outcome.random)),
        *((f'while writing: {moment}', str(count))
          for moment, count in sorted(outcome.writing.items())),
        ('together', str(outcome.kills)),
        ('runs that came to their end', str(outcome.survivors)),
        ('  of which different', str(len(outcome.different))),
        ('runs that were refused', str(len(outcome.refused))),
        ('unfinished files left behind', str(len(outcome.left)))], right=(1,))


if __name__ == '__main__':
    main()
