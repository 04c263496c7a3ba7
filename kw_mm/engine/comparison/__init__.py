"""Trains configs that differ in their backbone alike, and tells whether it made a difference."""
from .arms import Arm, list_differences, prepare_arms, use_own_data_
from .processes import LocalTrainer, lock_folder
from .report import write_report
from .runs import Failure, Run, run_all
from .widths import widen

__all__ = ['Arm', 'Failure', 'LocalTrainer', 'Run', 'list_differences', 'lock_folder',
           'prepare_arms', 'run_all', 'use_own_data_', 'widen', 'write_report']
