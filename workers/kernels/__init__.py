"""Our own matrix products for quantized weights."""
