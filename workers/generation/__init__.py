"""Making tokens: decode modes, and how they are timed."""
