"""A run on disk, and what a cell of it is called."""
