"""Runs an exported detector or segmentor on images: onnxruntime, numpy and OpenCV, no torch.

    python tools/deployment/runner.py FILE.onnx IMAGE...

The file says itself what it wants (its metadata ``kw_mm``), so that this module can be copied to
wherever the file goes. OpenVINO's files (``.xml``) run too where openvino is installed instead.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np


class Runner:
    """A detector or segmentor in a file.

    Args:
        path: Of the file, ``.onnx`` or ``.xml``.
        threads: How many the runtime uses; None for its own choice.

    Attributes:
        info: What the file says about itself.
        classes: Names of the classes.

    Raises:
        ValueError: If the file is none that ``export.py`` wrote for a whole model, or takes
            several images at a time.
    """

    def __init__(self, path: str, threads: int | None = None) -> None:
        text, self._run = (_open_openvino if path.endswith('.xml') else _open_onnx)(path, threads)
        self.info: dict[str, Any] = json.loads(text or '{}')
        if self.info.get('kind') not in ('detector', 'segmentor'):
            raise ValueError(f'{path!r} must be the file of a whole detector or segmentor, as '
                             f'tools/deployment/export.py writes it; its metadata are {self.info}')
        if self.info.get('batch_size') not in (None, 1):
            raise ValueError(f'{path!r} must take one image at a time, but it was written with '
                             f'--batch-size {self.info["batch_size"]}')
        self.classes: list[str] = self.info['classes']

    def __call__(self, image: np.ndarray) -> Any:
        """What the model finds in an image ``(H, W, 3)``, BGR, uint8, as ``cv2.imread`` reads it.

        Returns:
            Of a detector a dict: ``scores (K,)``, falling; ``boxes (K, 4)``, corners in pixels of
            the image; ``labels (K,)``; and ``masks (K, H, W)``, bool, if it has any. Of a segmentor
            the label map, ``(H, W)``.
        """
        ready, scale, size = self.prepare(image)
        if self.info['kind'] == 'segmentor':
            return self.logits(ready, size, image.shape[:2]).argmax(0)
        sizes = np.array([size], np.float32)
        scores, boxes, labels, *masks = (y[0] for y in self._run(ready[None], sizes))
        found = labels >= 0
        boxes = boxes[found] / np.array([*scale, *scale], np.float32)
        result = dict(scores=scores[found], boxes=boxes, labels=labels[found])
        if masks:
            info = self.info['masks']
            paste = _paste_boxes if info['of'] == 'boxes' else _resize_masks
            result['masks'] = paste(masks[0][found], boxes, image.shape[:2], scale, info)
        return result

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float], tuple[int, int]]:
        """Resizes, pads and normalises an image.

        Returns:
            The input ``(3, H, W)``; by how much x and y were scaled; height and width without what
            was padded after normalisation.
        """
        want = self.info['input']
        height, width = image.shape[:2]
        if want['resize']:
            new = _new_size((width, height), **want['resize'])
            image = cv2.resize(image, new, interpolation=cv2.INTER_LINEAR)
        scale = image.shape[1] / width, image.shape[0] / height
        if want['pad_image']:
            image = _pad(image, want['pad_image']['size'][::-1], want['pad_image']['value'])
        size = image.shape[:2]
        if want['channel_order'] == 'RGB':
            image = image[..., ::-1]
        ready = (image.astype(np.float32) - np.float32(want['mean'])) / np.float32(want['std'])
        pad = want['pad']
        least = pad['size'] or size
        target = [math.ceil(max(side, fixed) / pad['divisor']) * pad['divisor']
                  for side, fixed in zip(size, least)]
        ready = _pad(ready, target, [pad['value']] * 3)
        return np.ascontiguousarray(ready.transpose(2, 0, 1)), scale, size

    def logits(self, ready: np.ndarray, size: tuple[int, int],
               image_size: tuple[int, int]) -> np.ndarray:
        """A segmentor's logits ``(classes, H, W)`` in the size of the image."""
        slide = self.info.get('slide')
        found = self._slide(ready, **slide) if slide else self._run(ready[None])[0][0]
        return _resize(found[:, :size[0], :size[1]], image_size, self.info['align_corners'])

    def _slide(self, ready: np.ndarray, crop: Sequence[int], stride: Sequence[int]) -> np.ndarray:
        """Means of the logits of windows that overlap."""
        total: Any = 0
        count = np.zeros(ready.shape[1:], np.float32)
        starts = []
        for side, length, step in zip(ready.shape[1:], crop, stride):
            steps = max(side - length + step - 1, 0) // step + 1
            starts.append([max(min(i * step + length, side) - length, 0) for i in range(steps)])
        for y in starts[0]:
            for x in starts[1]:
                window = slice(y, y + crop[0]), slice(x, x + crop[1])
                found = self._run(np.ascontiguousarray(ready[(None, slice(None), *window)]))[0][0]
                if not count.any():
                    total = np.zeros((len(found), *count.shape), np.float32)
                total[(slice(None), *window)] += found
                count[window] += 1
        return total / count


def _new_size(size: tuple[int, int], scale: Sequence[int], keep_ratio: bool) -> tuple[int, int]:
    """Width and height after a resize, as OpenMMLab rounds them."""
    if not keep_ratio:
        return scale[0], scale[1]
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return int(size[0] * float(factor) + 0.5), int(size[1] * float(factor) + 0.5)


def _pad(image: np.ndarray, size: Sequence[int], value: Sequence[float]) -> np.ndarray:
    """Pads ``(H, W, 3)`` at its right and lower ends; what is larger stays."""
    below, right = (max(new - old, 0) for new, old in zip(size, image.shape))
    if not below and not right:
        return image
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=list(value))


def _resize(maps: np.ndarray, size: tuple[int, int], align_corners: bool = False) -> np.ndarray:
    """Bilinear interpolation of ``(C, H, W)``, as torch has it."""
    if maps.shape[1:] == tuple(size):
        return maps
    for axis, length in ((1, size[0]), (2, size[1])):
        old = maps.shape[axis]
        if align_corners:
            place = np.arange(length) * ((old - 1) / max(length - 1, 1))
        else:
            place = np.maximum((np.arange(length) + 0.5) * (old / length) - 0.5, 0)
        low = np.minimum(place.astype(np.int64), old - 1)
        high = np.minimum(low + 1, old - 1)
        part = (place - low).astype(np.float32)
        part = part[:, None] if axis == 1 else part
        maps = maps.take(low, axis) * (1 - part) + maps.take(high, axis) * part
    return maps


def _resize_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int],
                  scale: tuple[float, float], info: dict[str, Any]) -> np.ndarray:
    """Masks ``(K, H, W)`` of logits of the whole input at a fraction of its size."""
    height, width = (side * info['stride'] for side in masks.shape[1:])
    # MMDetection takes the factor of x for heights and that of y for widths.
    last = math.ceil(height * (1 / scale[0])), math.ceil(width * (1 / scale[1]))
    logit = math.log(info['threshold'] / (1 - info['threshold']))
    result = np.zeros((len(masks), *size), bool)
    for i, mask in enumerate(masks):
        full = _resize(_resize(mask[None], (height, width)), last)[0, :size[0], :size[1]]
        result[i, :full.shape[0], :full.shape[1]] = full > logit
    return result


def _paste_boxes(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int],
                 scale: tuple[float, float], info: dict[str, Any]) -> np.ndarray:
    """Masks ``(K, H, W)`` of probabilities within boxes ``(K, h, w)``."""
    result = np.zeros((len(masks), *size), bool)
    for mask, (x0, y0, x1, y1), full in zip(masks, boxes, result):
        # The interpolation is separable: a matrix for rows and one for columns.
        left, right = max(math.floor(x0) - 1, 0), min(math.ceil(x1) + 1, size[1])
        top, bottom = max(math.floor(y0) - 1, 0), min(math.ceil(y1) + 1, size[0])
        rows = _sampling(top, bottom, y0, y1, mask.shape[0])
        columns = _sampling(left, right, x0, x1, mask.shape[1])
        full[top:bottom, left:right] = rows @ mask @ columns.T >= info['threshold']
    return result


def _sampling(first: int, last: int, start: float, stop: float, count: int) -> np.ndarray:
    """Weights ``(pixels, count)`` of samples that divide [start, stop], zero beyond them."""
    with np.errstate(divide='ignore', invalid='ignore'):
        place = (np.arange(first, last, dtype=np.float32) + 0.5 - start) / (stop - start)
    place = np.where(np.isfinite(place), place, 0.5) * count - 0.5
    return np.maximum(1 - np.abs(place[:, None] - np.arange(count)), 0).astype(np.float32)


def _open_onnx(path: str, threads: int | None) -> tuple[str, Callable]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    names = [entry.name for entry in session.get_inputs()]
    return (session.get_modelmeta().custom_metadata_map.get('kw_mm', ''),
            lambda *inputs: session.run(None, dict(zip(names, inputs))))


def _open_openvino(path: str, threads: int | None) -> tuple[str, Callable]:
    import openvino
    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info(['kw_mm']).astype(str) if model.has_rt_info(['kw_mm']) else ''
    settings = dict(INFERENCE_PRECISION_HINT='f32')
    if threads:
        settings['INFERENCE_NUM_THREADS'] = str(threads)
    request = core.compile_model(model, 'CPU', settings).create_infer_request()
    return text, lambda *inputs: [np.array(y) for y in request.infer(list(inputs)).values()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', metavar='FILE', help='as tools/deployment/export.py writes it')
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='paths of images')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='least score of objects to print (default: %(default)s)')
    args = parser.parse_args(argv)
    run = Runner(args.file)
    for path in args.images:
        image = cv2.imread(path)
        if image is None:
            sys.exit(f'not an image that can be read: {path}')
        found = run(image)
        if isinstance(found, np.ndarray):
            counts = np.bincount(found.flatten(), minlength=len(run.classes))
            shares = [f'{name} {count / found.size:.1%}' for name, count in
                      zip(run.classes, counts) if count]
            print(path, ', '.join(shares))
            continue
        for score, box, label in zip(found['scores'], found['boxes'], found['labels']):
            if score >= args.score_thr:
                corners = ' '.join(f'{corner:.1f}' for corner in box)
                print(f'{path} {run.classes[label]} {score:.3f} {corners}')


if __name__ == '__main__':
    main()
