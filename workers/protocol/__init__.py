"""Communication with the parent, and the interface that a precision implements."""
