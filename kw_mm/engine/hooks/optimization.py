"""A model made faster for one test."""
from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper

from ...inference import optimize_for_inference_


class OptimizeForTestHook(Hook):
    """Makes the model of a test faster in place, see ``optimize_for_inference_``.

    It acts when the weights are loaded and other hooks have done what they do to them. The model
    cannot be trained afterwards, so this is for runners that only test.
    """

    priority = 'LOWEST'

    def before_test_epoch(self, runner: Any) -> None:
        """Optimises the model that is tested."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.eval()
        report = optimize_for_inference_(model)
        print_log(f'Optimised {len(report.layers)} KW layers and folded {report.num_folded} norms '
                  f'({report.num_bytes / 2**20:,.1f} MiB of bases)', logger='current')
        # The averaged weights are in the model by now; they would be swapped back after the test,
        # into layers that are no more.
        runner._hooks = [hook for hook in runner._hooks if not isinstance(hook, EMAHook)]
