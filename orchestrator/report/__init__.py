"""Output for people and programs: tables, lists, JSON. Nothing here measures or decides."""
