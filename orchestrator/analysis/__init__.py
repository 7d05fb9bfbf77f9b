"""Every figure, computed by pure functions from records."""
