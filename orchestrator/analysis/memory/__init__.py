"""What NVML and torch say of a worker's memory, term by term."""
