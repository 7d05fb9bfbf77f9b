"""A worker's memory as NVML and torch report it, term by term."""
