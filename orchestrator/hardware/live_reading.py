"""One reading of a watched program's memory."""

import msgspec


class LiveReading(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of all processes of a program at one moment, in bytes; None if unknown."""

    at_ns: int
    process_bytes: int | None = None
    """NVML's figure, summed over all GPUs."""
    reason: str | None = None
    """Why `process_bytes` is None."""
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None

    @property
    def outside_torch_bytes(self) -> int | None:
        """Also None if torch reported before memory was freed: it can't hold more than NVML counts."""
        if self.process_bytes is None or self.reserved_bytes is None:
            return None
        outside_bytes = self.process_bytes - self.reserved_bytes
        return outside_bytes if outside_bytes >= 0 else None
