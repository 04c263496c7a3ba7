"""The benchmark's library: time, memory and lower bounds of KW networks and static twins.

``speed``, ``gpu`` and ``tune`` are the commands; ``setting`` says what runs and where.
``backbones``, ``layers`` and ``detectors`` compare KW with static; ``parity``, ``formulas``,
``gpu_cases`` and ``path_cases`` check results before. ``networks`` and ``programs`` build what
runs; ``timing`` and ``memory`` measure it, ``machine`` gives lower bounds, and ``report`` prints.
"""
