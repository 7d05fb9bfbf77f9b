"""The parent: plans a run, starts one worker at a time, watches its memory, stores and reports.

Nothing here imports torch or touches CUDA: the parent must not appear in the figures it takes.
"""

__version__ = "0.2.0"
