"""The machine a run was measured on."""

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One NVIDIA GPU as NVML describes it."""

    index: int
    """NVML's index; torch may count otherwise, so devices are matched by `uuid`."""
    uuid: str
    name: str
    memory_bytes: int
    """In MIG mode, where a user without privileges may not ask for it, the largest slice's."""
    compute_capability: tuple[int, int]
    memory_info_version: int
    """2 where NVML reports driver-reserved memory apart, 1 where it counts it as used."""
    mig: bool = False
    """Cut into slices, each of which is a GPU to CUDA (MIG mode)."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Host, driver and GPUs; the workers' package versions stand in their own records."""

    qbench: str
    commit: str | None
    """Commit of the project's checkout, `-dirty` appended where it was changed."""
    python: str
    platform: str
    cpu: str
    cpu_count: int | None
    """None, as the memory's size, where records were read without their machine."""
    memory_bytes: int | None
    gpus: list[Gpu]
    gpu_reason: str | None = None
    """Why `gpus` is empty."""
    driver: str | None = None
