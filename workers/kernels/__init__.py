"""Matrix products of ours for quantized weights."""
