"""How long cells took to measure."""

from schemas.record import CellRecord


def measuring_s(record: CellRecord) -> float:
    """The cell's wall time without the prepare and build phases, whose results are kept for later runs."""
    wall_s = record.wall_s or 0.0
    began_ns = record.began_ns or 0
    setup = next((edge.phase for edge in record.edges if edge.phase.name in ("prepare", "build")), None)
    if setup is None or record.ready is None or setup.at_ns < began_ns:
        return wall_s
    return wall_s - (record.ready.at_ns - setup.at_ns) / 1e9
