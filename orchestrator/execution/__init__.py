"""A run as it happens: processes started, watched, recorded."""
