"""For all tests."""
import functools

from mmengine.config import utils

# For every `mmdet::` base of a config mmengine reads all of the package's metafiles, a hundred.
utils.load = functools.cache(utils.load)
