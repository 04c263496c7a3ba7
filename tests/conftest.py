"""For all tests: a scope of their own, mmengine's repeated work done once, what is not installed.

Where OpenMMLab is not installed the tests of the core run, and the others are skipped.
"""
import functools
import importlib.util
import traceback
from pathlib import Path

import pytest

# Here, so that no test is skipped because the core itself cannot be imported.
import kw_mm

MISSING = [name for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg')
           if not importlib.util.find_spec(name)]


def missing_package(error):
    """Returns the package of OpenMMLab for which a test asked in vain, None if that is not it.

    What a module of kw_mm imports when it is called is not what the test asked for: the core must
    do without.
    """
    name = (getattr(error, 'name', None) or '').partition('.')[0]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)
             if 'importlib' not in frame.filename]
    asked = Path(__file__).parent in files[-1].parents or files[-1] == Path(kw_mm.__file__)
    return name if name in MISSING and asked else None


if MISSING:
    class TestFile(pytest.Module):
        """A file of tests that is skipped as a whole if it imports what is missing."""

        def _getobj(self):
            try:
                return super()._getobj()
            except self.CollectError as failure:
                name = (getattr(failure.__cause__, 'name', None) or '').partition('.')[0]
                if name not in MISSING:
                    raise
                pytest.skip(f'{name} is not installed', allow_module_level=True)

    def pytest_pycollect_makemodule(module_path, parent):
        return TestFile.from_parent(parent, path=module_path)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_pyfunc_call():
        error = (yield).excinfo
        name = missing_package(error[1]) if error and isinstance(error[1], ImportError) else None
        if name:
            pytest.skip(f'{name} is not installed')

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
