"""KW networks timed beside their static twins; ``tools/analysis_tools/benchmark.py`` runs it.

From what to how: ``suite`` (workloads and goals), ``session`` (parity first, then figures),
``backbones``, ``layers`` and ``whole`` (what is compared), ``parity`` and ``literal`` (with what),
``networks``, ``programs`` and ``setting`` (what runs, and where), ``timing``, ``memory`` and
``machine`` (how it is measured), ``floor`` (what it cannot be less than), ``report``.
"""
