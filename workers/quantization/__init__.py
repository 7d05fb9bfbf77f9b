"""Quantized weights: converted, calibrated, packed and cached."""
