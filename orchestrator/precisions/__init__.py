"""Which precisions exist, and the Python interpreter that each runs under."""
