"""The generated shapes data set: COCO instance segmentation that needs no download."""
from .drawing import SHAPE_CLASSES, SPLITS, ShapeInstance, draw_scene
from .shapes import ShapesFiles, describe_shapes, write_shapes

__all__ = [
    'SHAPE_CLASSES', 'SPLITS', 'ShapeInstance', 'ShapesFiles', 'describe_shapes', 'draw_scene',
    'write_shapes'
]
