"""The generated shapes data set, which needs no download, and checks of anyone's data sets."""
from .checking import Findings, check_data
from .drawing import SHAPE_CLASSES, SPLITS, ShapeInstance, draw_scene
from .shapes import ShapesFiles, describe_shapes, write_shapes

__all__ = [
    'SHAPE_CLASSES', 'SPLITS', 'Findings', 'ShapeInstance', 'ShapesFiles', 'check_data',
    'describe_shapes', 'draw_scene', 'write_shapes'
]
