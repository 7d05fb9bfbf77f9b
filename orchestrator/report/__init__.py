"""A run as people and programs read it: tables, lists, JSON. Nothing here measures or decides."""
