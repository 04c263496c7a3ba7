"""Predictions of trained detectors and segmentors, of both in one process if need be."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import DefaultScope

from ..inference import optimize_for_inference_
from ..layers.loading import strict_loading
from .pictures import enlarge, enlarge_, zoom_of
from .prediction_files import CocoPredictions, write_label_map

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


# OpenMMLab looks names up in the toolbox that was used last in the process. For example, after a
# segmentor was built, LoadAnnotations in a detector's pipeline means MMSegmentation's, which fails.

def scope_of(cfg: Mapping[str, Any]) -> AbstractContextManager:
    """A context in which names are looked up in the toolbox of a config.

    It is needed around code that builds or runs a model or part of it, if a process uses more than
    one toolbox. A ``Runner`` does not need it, because it sets the scope of its config, which stays
    set afterwards.

    Args:
        cfg: A config with ``default_scope``, for instance ``model.cfg``.

    Raises:
        ValueError: If the toolbox is neither MMDetection nor MMSegmentation.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmseg'):
        raise ValueError(f"default_scope must be 'mmdet' or 'mmseg', got {scope!r}")
    return DefaultScope.overwrite_default_scope(scope)


@dataclass(frozen=True)
class Written:
    """What was written for a number of images.

    Attributes:
        pictures: Paths of the pictures.
        predictions: The COCO file of a detector, the folder of label maps of a segmentor.
        unreadable: Paths of files that cannot be read as images.
    """

    pictures: list[Path]
    predictions: Path
    unreadable: list[str]


class Predictor:
    """Predicts with a trained model, through the inferencer of its toolbox.

    Args:
        cfg: Config of a detector or segmentor.
        checkpoint: Path or URL of its weights.
        device: Where to run, for instance ``'cpu'`` or ``'cuda:1'``; None for mmengine's choice.
        optimize: Whether to make the model faster first, see ``optimize_for_inference_``.

    Raises:
        ValueError: If the config is of another toolbox, or the checkpoint of another model.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None,
                 optimize: bool = False) -> None:
        self.cfg = cfg
        with scope_of(cfg):
            if cfg.default_scope == 'mmdet':
                from mmdet.apis import DetInferencer as Inferencer
            else:
                from mmseg.apis import MMSegInferencer as Inferencer
            with strict_loading():
                self.inferencer = Inferencer(cfg, checkpoint, device=device,
                                             scope=cfg.default_scope)
        self.inferencer.show_progress = False  # it would show a bar for each image
        if optimize:
            optimize_for_inference_(self.inferencer.model)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, as the checkpoint has them."""
        return tuple(self.inferencer.model.dataset_meta['classes'])

    def __call__(self, images: Sequence[str], out_dir: str, score_thr: float = 0.3,
                 zoom: int | None = None,
                 progress: Callable[[Sequence[str]], Iterable[str]] = iter) -> Written:
        """Writes pictures, and predictions as files for other programs.

        A picture has the name of its image, and is in ``out_dir/vis``. The predictions of a
        detector are in ``out_dir/predictions.json``, all of them, in COCO's format (see
        ``CocoPredictions``). Those of a segmentor are label maps in ``out_dir/pred``, named after
        the images, with the ending ``.png``. Files that cannot be read as images are skipped.

        Args:
            images: Paths of images, all with different names.
            out_dir: Folder, made if missing.
            score_thr: Objects below this score are not drawn; only for detectors.
            zoom: Factor by which pictures are larger than images; None chooses one with which
                labels are readable.
            progress: Wraps the iteration over images, e.g. mmengine's ``track_iter_progress``.

        Raises:
            ValueError: If two images have the same name.
        """
        is_detector = self.cfg.default_scope == 'mmdet'
        _check_names(images, is_detector)
        pictures, unreadable = [], []
        coco = CocoPredictions(self.classes)
        predictions = Path(out_dir, 'predictions.json' if is_detector else 'pred')
        with scope_of(self.cfg):
            for path in progress(images):
                image = read_image(path)
                if image is None:
                    unreadable.append(path)
                    continue
                sample = self._predict(path)
                if is_detector:
                    coco.add(Path(path).name, sample)
                else:
                    labels = sample.pred_sem_seg.data[0].cpu().numpy()
                    write_label_map(predictions / f'{Path(path).stem}.png', labels)
                pictures.append(Path(out_dir, 'vis', Path(path).name))
                self._draw(image, sample, pictures[-1], score_thr, zoom or zoom_of(image))
        if is_detector:
            coco.write(predictions)
        return Written(pictures, predictions, unreadable)

    def _predict(self, path: str) -> Any:
        found = self.inferencer([path], return_datasamples=True)
        # MMDetection's inferencer returns a dict with a list of them.
        return found['predictions'][0] if isinstance(found, dict) else found

    def _draw(self, image: np.ndarray, sample: Any, picture: Path, score_thr: float,
              zoom: int) -> None:
        options = dict(pred_score_thr=score_thr) if self.cfg.default_scope == 'mmdet' else {}
        sample = sample.cpu()
        enlarge_(sample, zoom)
        self.inferencer.visualizer.add_datasample(
            picture.name, enlarge(image, zoom), sample, draw_gt=False, out_file=str(picture),
            **options)


def _check_names(images: Sequence[str], is_detector: bool) -> None:
    """Refuses images whose pictures, or label maps, would have the same name."""
    names = [Path(image).name if is_detector else Path(image).stem for image in images]
    double = sorted(name for name, num in Counter(names).items() if num > 1)
    if double:
        raise ValueError('images must have names of their own, as what is written of them will; '
                         f'got more than one {double[0]!r}')


def read_image(path: str, channel_order: str = 'rgb') -> np.ndarray | None:
    """An image, by default in RGB; None if it cannot be read."""
    try:
        return mmcv.imread(path, channel_order=channel_order)
    except (AttributeError, OSError, ValueError, cv2.error):
        return None


def find_images(paths: Sequence[str]) -> list[str]:
    """Replaces folders by the images in them, in the order of their names.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a folder has no image in it.
    """
    images: list[str] = []
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
