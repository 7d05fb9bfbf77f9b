"""Token generation: decode modes and their timing."""
