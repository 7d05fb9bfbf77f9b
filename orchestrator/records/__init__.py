"""Runs on disk, and the identity of their cells."""
