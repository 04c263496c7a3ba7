"""The benchmark's library: time, memory and floors of KW networks beside their static twins.

From what to how: ``speed`` (the command), ``setting`` (what runs, and where), ``backbones``,
``layers`` and ``detectors`` (what is compared), ``parity`` and ``formulas`` (with what),
``networks`` and ``programs`` (what runs), ``timing``, ``memory`` and ``machine`` (how it is
measured, and what it cannot be less than), ``report``.
"""
