"""For all tests: a scope of their own, and mmengine's repeated work done once.

The tests of the core run without mmengine.
"""
import functools
import importlib.util

import pytest

if importlib.util.find_spec('mmengine'):
    from mmengine.config import config, utils
    from mmengine.registry import DefaultScope
    from mmengine.runner import runner

    @pytest.fixture(autouse=True)
    def own_scope():
        """The default scope that a test leaves is gone for the next one, whichever that is."""
        before = dict(DefaultScope._instance_dict)
        yield
        DefaultScope._instance_dict.clear()
        DefaultScope._instance_dict.update(before)

    def format_once(format_code):
        """Formats each text once: a runner asks for that of its config five times."""
        @functools.cache
        def formatted(text, style):
            return format_code(text, style_config=dict(style))

        return lambda text, style_config: formatted(text, tuple(style_config.items()))

    # What follows gives the same result each time.
    config.FormatCode = format_once(config.FormatCode)
    # For every `mmdet::` base of a config mmengine reads all metafiles of the package, a hundred.
    utils.load = functools.cache(utils.load)
    # It asks compilers for their versions whenever a runner is built.
    runner.collect_env = functools.cache(runner.collect_env)
