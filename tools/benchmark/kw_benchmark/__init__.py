"""The benchmark's library: time, memory and lower bounds of KW networks and static twins.

``speed`` is the command; ``setting`` says what runs and where. ``backbones``, ``layers`` and
``detectors`` compare KW with static; ``parity`` and ``formulas`` check results before. ``networks``
and ``programs`` build what runs; ``timing`` and ``memory`` measure it, ``machine`` gives lower
bounds, and ``report`` prints.
"""
