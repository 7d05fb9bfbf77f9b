"""Which precisions there are, and under which interpreter each runs."""
