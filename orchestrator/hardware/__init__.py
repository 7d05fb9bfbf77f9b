"""What the machine says: GPUs, memory in use, data sheets."""
