"""For all tests: default scopes, packages that are not installed, repeated work of mmengine.

If OpenMMLab is not installed, the tests of the core run and the others are skipped.
"""
import copy
import functools
import gc
import importlib.util
import traceback
from pathlib import Path

import pytest
import torch

# Imported here, so that tests fail, and are not skipped, if the core cannot be imported.
import kw_mm

GPU_TESTS = pytest.StashKey()


def pytest_collection_modifyitems(config, items):
    """Leaves tests of GPUs out where there is none, rather than skipping each by itself."""
    left_out = [] if torch.cuda.is_available() else [
        item for item in items if item.get_closest_marker('gpu')]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    config.stash[GPU_TESTS] = left_out


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash.get(GPU_TESTS, [])
    if left_out:
        names = ', '.join(dict.fromkeys(item.nodeid.partition('[')[0] for item in left_out))
        terminalreporter.write_line(
            f'{len(left_out)} tests left out, torch finds no CUDA device: {names}')


MISSING = [name for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg')
           if not importlib.util.find_spec(name)]


def missing_package(error):
    """Returns the package of OpenMMLab that a test could not import, None if it failed otherwise.

    If a function of kw_mm imports it when called, that is a failure, because the core must work
    without.
    """
    name = (getattr(error, 'name', None) or '').partition('.')[0]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)
             if 'importlib' not in frame.filename]
    asked = Path(__file__).parent in files[-1].parents or files[-1] == Path(kw_mm.__file__)
    return name if name in MISSING and asked else None


def pytest_collection_finish():
    """Spares every later garbage collection the million objects of imports and collected tests."""
    gc.collect()
    gc.freeze()


if MISSING:
    class TestFile(pytest.Module):
        """A file of tests that is skipped if it imports a missing package."""

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
    import mmengine
    from mmengine.config import config, utils
    from mmengine.registry import DefaultScope
    from mmengine.runner import runner
    from yapf.yapflib import yapf_api

    @pytest.fixture(autouse=True)
    def own_scope():
        """Resets the default scope after each test."""
        before = dict(DefaultScope._instance_dict)
        yield
        DefaultScope._instance_dict.clear()
        DefaultScope._instance_dict.update(before)

    def format_once(format_code):
        """Formats each text once, because a runner formats its config five times."""
        @functools.cache
        def formatted(text, style):
            return format_code(text, style_config=dict(style))

        return lambda text, style_config: formatted(text, tuple(style_config.items()))

    # Configs of OpenMMLab and of ours, which no test changes.
    READ_ONLY = Path(mmengine.__file__).parents[1], Path(__file__).parents[1] / 'configs'

    def read_once(read):
        """Reads each file once, because configs share most of their dozen bases."""
        cached = functools.cache(read)

        def file2dict(filename, *args, **kwargs):
            path = Path(filename).resolve()
            if not any(folder in path.parents for folder in READ_ONLY):
                return read(filename, *args, **kwargs)
            return copy.deepcopy(cached(str(path), *args, **kwargs))

        return staticmethod(file2dict)

    # What follows gives the same result each time. Upstream takes the function from yapf once, the
    # fork whenever it formats.
    config.Config._file2dict = read_once(config.Config._file2dict)
    yapf_api.FormatCode = config.FormatCode = format_once(yapf_api.FormatCode)
    # For every `mmdet::` base of a config mmengine reads all metafiles of the package, a hundred.
    utils.load = functools.cache(utils.load)
    # It imports pkg_resources anew to learn whether a package is there.
    config.is_installed = functools.cache(config.is_installed)
    # It asks compilers for their versions whenever a runner is built.
    runner.collect_env = functools.cache(runner.collect_env)
