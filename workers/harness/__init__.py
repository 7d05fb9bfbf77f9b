"""What every precision runs in: the worker's program, measuring, profiling."""
