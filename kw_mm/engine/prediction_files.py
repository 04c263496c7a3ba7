"""Writes predictions as files for other programs."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..files import write_json


class CocoPredictions:
    """Detections of many images, as one file in COCO's format.

    Images are numbered from 1 in the order in which they are added, and categories from 1 in the
    order of the classes. Each annotation has a ``score``; masks are run-length encoded. Annotation
    programs and ``pycocotools.coco.COCO`` can read the file.

    Args:
        classes: Names of the classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.categories = [dict(id=index, name=name) for index, name in enumerate(classes, 1)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, file_name: str, sample: Any) -> None:
        """Adds what MMDetection found in an image, with any score.

        Args:
            file_name: Name of the image in the file.
            sample: A ``DetDataSample``.
        """
        from mmdet.structures.mask import encode_mask_results, mask2bbox

        height, width = sample.ori_shape[:2]
        image = len(self.images) + 1
        self.images.append(dict(id=image, file_name=file_name, width=width, height=height))
        found = sample.pred_instances.cpu()
        masks = found.get('masks')
        boxes = found.get('bboxes')
        if boxes is None or (masks is not None and not boxes.any()):
            boxes = mask2bbox(masks)  # for models that predict masks only
        encoded = encode_mask_results(masks.numpy()) if masks is not None else None
        for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            annotation = dict(
                id=len(self.annotations) + 1, image_id=image, iscrowd=0,
                category_id=int(found.labels[index]) + 1, score=float(found.scores[index]),
                bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1))
            if encoded is not None:
                mask = encoded[index]
                annotation['area'] = float(masks[index].sum())
                annotation['segmentation'] = dict(
                    size=[int(side) for side in mask['size']], counts=_text(mask['counts']))
            self.annotations.append(annotation)

    def write(self, path: Path) -> None:
        """Writes the file completely or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(images=self.images, annotations=self.annotations,
                              categories=self.categories))


def write_label_map(path: Path, labels: np.ndarray) -> None:
    """Writes the class of each pixel, counted from 0, as a PNG with one channel.

    It has 8 bits, or 16 where there are more than 256 classes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint8 if labels.max(initial=0) < 256 else np.uint16
    cv2.imwrite(str(path), labels.astype(dtype))


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
