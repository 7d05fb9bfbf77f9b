"""How a worker talks to the parent, and what a precision has to be for it."""
