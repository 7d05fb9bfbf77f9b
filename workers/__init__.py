"""One file per precision, and the code that precisions share.

Each worker runs in a fresh process, `python -P -m workers.<file>`, so that the CUDA allocator and all peak
counters start at zero. Nothing heavy is imported before a worker has redirected its stdout.
"""
