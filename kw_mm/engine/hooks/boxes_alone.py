"""Leaves the masks out of one test."""
from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log


class BoxesAloneHook(Hook):
    """Takes the mask heads off the model of a test, whose weights have been loaded by then.

    MMDetection's test-time augmentation merges boxes alone, and refuses predictions with masks.
    """

    def before_test_epoch(self, runner: Any) -> None:
        """Takes off every mask head of a RoI head."""
        for module in runner.model.modules():
            if getattr(module, 'with_mask', False) and hasattr(module, 'mask_roi_extractor'):
                module.mask_head = None
                print_log('Boxes alone are tested: MMDetection cannot merge masks of augmented '
                          'images', logger='current')
