"""Every figure, as pure functions over records."""
