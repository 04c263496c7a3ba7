"""Makes a checkpoint ready to be passed on: weights alone, under a name with its hash.

    python tools/model_converters/publish_model.py work_dirs/.../epoch_12.pth my-detector.pth

writes my-detector-0a1b2c3d.pth, without the optimizer and the log, which are most of the file. The
eight digits are the beginning of its SHA-256: who downloads the file can see that it arrived whole.
The config stays in it (inferencers read it there) unless --without-config is given.
"""
from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import kw_mm  # noqa: F401  (lets mmengine's checkpoints be read)
from kw_mm.checkpoint import check_checkpoint, check_destination, write_checkpoint


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='path of the checkpoint')
    parser.add_argument('dst', metavar='DST', help='path of the file to write, ending in .pth, '
                        'without the digits')
    parser.add_argument('--without-config', action='store_true',
                        help="leave the config out, and with it the paths of this machine's data")
    parser.add_argument('--force', action='store_true', help='overwrite the file')
    return parser


def publish(src: str, dst: str, with_config: bool = True, overwrite: bool = False) -> Path:
    """Writes weights and what describes them.

    Args:
        src: A checkpoint of mmengine. With a moving average, its weights are the averaged ones.
        dst: Where to write; the name gets the hash before its ``.pth``.
        with_config: Whether the config stays in the file.
        overwrite: Whether to replace a file.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If the file is there and not to be replaced.
        ValueError: If ``src`` is no checkpoint, or ``dst`` does not end in ``.pth``.
    """
    path = Path(dst).expanduser()
    if path.suffix != '.pth':
        raise ValueError(f'DST must end in .pth, got {dst!r}')
    checkpoint = check_checkpoint(src)
    if checkpoint is None or 'state_dict' not in checkpoint:
        raise ValueError(f'checkpoint {src!r} must be a file with a state_dict')
    meta = dict(checkpoint.get('meta') or {})
    if not with_config:
        meta.pop('cfg', None)
    unfinished = path.with_name(f'.{path.name}')
    write_checkpoint(dict(meta=meta, state_dict=checkpoint['state_dict']), str(unfinished),
                     overwrite=True)
    try:
        digits = hashlib.sha256(unfinished.read_bytes()).hexdigest()[:8]
        published = path.with_name(f'{path.stem}-{digits}.pth')
        check_destination(str(published), overwrite)
        unfinished.replace(published)
    finally:
        unfinished.unlink(missing_ok=True)
    return published


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        published = publish(args.src, args.dst, not args.without_config, args.force)
    except FileExistsError as error:
        parser.error(f'{error}; --force replaces it')
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print('written to', published)


if __name__ == '__main__':
    main()
