"""The program that runs every precision: startup, measurement, profiling."""
