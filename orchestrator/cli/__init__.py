"""The commands, one module each, and the edge between typed options and the rest."""
