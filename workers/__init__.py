"""One file per precision, and what the precisions share.

Each worker runs in a fresh process, `python -P -m workers.<file>`, so that the CUDA allocator and
every watermark start clean. Nothing heavy is imported before a worker has set its stdout aside.
"""
