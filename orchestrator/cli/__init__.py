"""The commands, one module each, and how their options are read."""
