"""uv, which resolves and installs packages."""

from orchestrator.errors import QbenchError


def uv_program() -> str:
    """Path of the program. Raises `QbenchError` if uv isn't installed, which most commands don't need."""
    try:
        import uv
    except ModuleNotFoundError:
        raise QbenchError("uv is not installed; install it with: pip install uv") from None
    return uv.find_uv_bin()
