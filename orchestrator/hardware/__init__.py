"""The machine: its GPUs, memory in use, published figures."""
