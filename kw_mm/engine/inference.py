"""Predictions of trained detectors and segmentors, of both in one process if need be."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope

from ..layers.loading import strict_loading

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


# OpenMMLab looks names up in the toolbox that was used last in the process. Which one that is
# decides, for one, what LoadAnnotations means: after a segmentor was built, a detector's pipeline
# is built from MMSegmentation's transforms, and fails.

def scope_of(cfg: Mapping[str, Any]) -> AbstractContextManager:
    """A context in which names mean what they mean in the toolbox of a config.

    Around whatever builds or runs part of a model, where a process uses more than one toolbox;
    after it names mean what they meant before. A ``Runner`` needs none for itself: it takes over
    the scope of its config, and leaves it behind.

    Args:
        cfg: A config with ``default_scope``, for instance ``model.cfg``.

    Raises:
        ValueError: If the toolbox is neither MMDetection nor MMSegmentation.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmseg'):
        raise ValueError(f"default_scope must be 'mmdet' or 'mmseg', got {scope!r}")
    return DefaultScope.overwrite_default_scope(scope)


class Predictor:
    """Draws what a trained model finds in images, with the inferencer of its toolbox.

    Args:
        cfg: Of a detector or segmentor.
        checkpoint: Path or URL of its weights.
        device: Where to run, for instance ``'cpu'`` or ``'cuda:1'``; None for mmengine's choice.

    Raises:
        ValueError: If the config is of another toolbox, or the checkpoint of another model.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None) -> None:
        self.cfg = cfg
        with scope_of(cfg):
            if cfg.default_scope == 'mmdet':
                from mmdet.apis import DetInferencer as Inferencer
            else:
                from mmseg.apis import MMSegInferencer as Inferencer
            with strict_loading():
                self.inferencer = Inferencer(cfg, checkpoint, device=device,
                                             scope=cfg.default_scope)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, as the checkpoint has them."""
        return tuple(self.inferencer.model.dataset_meta['classes'])

    def __call__(self, images: Sequence[str], out_dir: str, score_thr: float = 0.3) -> list[Path]:
        """Writes a picture for each image, of the same name, to ``out_dir/vis``.

        Segmentors also write their label maps, to ``out_dir/pred``.

        Args:
            images: Paths of images, no two of one name.
            out_dir: Folder, made if missing.
            score_thr: Objects below this score are not drawn; for detectors alone.

        Returns:
            The pictures.

        Raises:
            ValueError: If two images have the same name.
        """
        names = [Path(image).name for image in images]
        double = sorted(name for name, num in Counter(names).items() if num > 1)
        if double:
            raise ValueError(f'images must have names of their own, as their pictures will; got '
                             f'more than one {double[0]!r}')
        options = dict(pred_score_thr=score_thr) if self.cfg.default_scope == 'mmdet' else {}
        with scope_of(self.cfg):
            self.inferencer(list(images), out_dir=out_dir, **options)
        return [Path(out_dir, 'vis', name) for name in names]


def find_images(paths: Sequence[str]) -> list[str]:
    """Replaces folders by the images in them, in the order of their names.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a folder has no image in it.
    """
    images = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f'image {str(path)!r} does not exist')
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f'folder {str(path)!r} must have images in it, files ending in '
                                 f'{", ".join(IMAGE_SUFFIXES)}')
        images += map(str, found)
    return images
