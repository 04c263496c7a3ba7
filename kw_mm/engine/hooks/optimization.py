"""Makes a model faster for one test."""
from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper

from ...inference import optimize_for_inference_


class OptimizeForTestHook(Hook):
    """Makes the model of a test faster in place, see ``optimize_for_inference_``.

    It acts after the weights are loaded and other hooks have changed them. The model cannot be
    trained afterwards, so this hook is for runners that only test.
    """

    priority = 'LOWEST'

    def before_test_epoch(self, runner: Any) -> None:
        """Optimises the model that is tested."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.eval()
        report = optimize_for_inference_(model)
        print_log(f'Optimised {len(report.layers)} KW layers and folded {report.num_folded} norms '
                  f'({report.num_bytes / 2**20:,.1f} MiB of bases)', logger='current')
        # By now the averaged weights are in the model. After the test the hook would swap them with
        # the others, but the layers have been replaced.
        runner._hooks = [hook for hook in runner._hooks if not isinstance(hook, EMAHook)]
