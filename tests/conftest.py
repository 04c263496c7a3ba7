"""Spares all tests what mmengine does again and again, each time with the same result."""
import functools


def format_once(format_code):
    """Formats each text once: a runner asks for that of its config five times."""
    @functools.cache
    def formatted(text, style):
        return format_code(text, style_config=dict(style))

    return lambda text, style_config: formatted(text, tuple(style_config.items()))


try:
    from mmengine.config import config, utils
    from mmengine.runner import runner
except ModuleNotFoundError:  # the tests of the core go without
    pass
else:
    # For every `mmdet::` base of a config it reads all metafiles of the package, a hundred.
    utils.load = functools.cache(utils.load)
    # It asks compilers for their versions whenever a runner is built.
    runner.collect_env = functools.cache(runner.collect_env)
    config.FormatCode = format_once(config.FormatCode)
