"""The machine a run was measured on."""

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One NVIDIA GPU as NVML describes it."""

    index: int
    """NVML's index; torch may number devices differently, so they are matched by `uuid`."""
    uuid: str
    name: str
    memory_bytes: int
    """In MIG mode, that of the largest slice: reading the whole GPU's requires privileges."""
    compute_capability: tuple[int, int]
    memory_info_version: int
    """2 if NVML reports driver-reserved memory separately, 1 if it counts it as used."""
    mig: bool = False
    """In MIG mode: partitioned into slices, each of which CUDA sees as a GPU."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Host, driver and GPUs. Package versions are in the workers' own records."""

    qbench: str
    commit: str | None
    """The project's commit, with `-dirty` appended if the working tree had changes."""
    python: str
    platform: str
    cpu: str
    cpu_count: int | None
    """None, like `memory_bytes`, if records were read without their environment."""
    memory_bytes: int | None
    gpus: list[Gpu]
    gpu_reason: str | None = None
    """Why `gpus` is empty."""
    driver: str | None = None
