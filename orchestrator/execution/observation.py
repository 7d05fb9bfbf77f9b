"""A worker's frames, combined with memory and clocks read from outside at the same instants."""

from contextlib import ExitStack

from orchestrator.execution.idle_gpu import idle_bytes
from orchestrator.hardware.nvml import Nvml
from orchestrator.hardware.sampler import MemorySampler, NvmlSource, ResidentSetSource
from schemas.frames import (
    AnyFrame,
    Done,
    Failed,
    Loaded,
    Phase,
    Profile,
    Ready,
    SetUp,
    Trial,
    WarmedUp,
)
from schemas.record import MemoryReading, PhaseEdge


class Observation:
    """Follows one worker over its cells; `begin_cell` discards the observations of the previous one."""

    def __init__(self, device: str, nvml: Nvml | None) -> None:
        self.on_gpu = device != "cpu"
        self.nvml = nvml
        self.ready: Ready | None = None
        self.loaded: Loaded | None = None
        self.sampler: MemorySampler | None = None
        self._edges_of_worker: list[PhaseEdge] = []
        self.nvml_uuid: str | None = None
        """The device to query in NVML, known once the worker has reported it."""
        self._idle_bytes = idle_bytes(nvml) if nvml and self.on_gpu else {}
        self._stack = ExitStack()
        self.begin_cell()

    def __enter__(self) -> "Observation":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def begin_cell(self) -> None:
        """From here on, observations belong to another cell."""
        # A cell's memory history includes how its worker got there: context and load.
        self.edges = list(self._edges_of_worker)
        self.setup: SetUp | None = None
        self.warmed_up: WarmedUp | None = None
        self.trials: list[Trial] = []
        self.profile: Profile | None = None
        self.outcome: Done | Failed = Failed(kind="crashed", message="the worker sent no result")
        self._first_sample = len(self.sampler.samples) if self.sampler else 0

    @property
    def is_loaded(self) -> bool:
        """Whether the worker got past loading; a failure before that would repeat for every workload."""
        return bool(self._edges_of_worker)

    @property
    def samples(self) -> list[MemoryReading]:
        """The samples of this cell."""
        return self.sampler.samples[self._first_sample :] if self.sampler else []

    @property
    def latest(self) -> MemoryReading | None:
        """The newest sample."""
        return self.sampler.latest if self.sampler else None

    @property
    def baseline_device_bytes(self) -> int | None:
        """Bytes in use on the GPU just before the worker was started."""
        return self._idle_bytes.get(self.nvml_uuid) if self.nvml_uuid else None

    def watch_resident_set(self, pid: int) -> None:
        """Sample the resident set of the process, unless the worker runs on a GPU."""
        if not self.on_gpu:
            self.sampler = self._stack.enter_context(MemorySampler(ResidentSetSource(pid)))

    def add(self, frame: AnyFrame) -> None:
        """Store a frame. At a phase edge the worker is paused, so memory is read too."""
        match frame:
            case Phase():
                self._add_edge(frame)
            case Ready():
                self.ready = frame
                # Only torch knows which GPU it uses, regardless of CUDA_VISIBLE_DEVICES; and only the worker
                # knows its own pid, since the process we started may be a launcher.
                if self.nvml is not None and frame.device_uuid is not None:
                    self.nvml_uuid = self.nvml.uuid_of(frame.device_uuid, frame.cuda_visible_devices)
                    source = NvmlSource(self.nvml, self.nvml_uuid, frame.pid)
                    self.sampler = self._stack.enter_context(MemorySampler(source))
            case Loaded():
                self.loaded = frame
            case SetUp():
                self.setup = frame
            case WarmedUp():
                self.warmed_up = frame
            case Trial():
                self.trials.append(frame)
            case Profile():
                self.profile = frame
            case Done() | Failed():
                self.outcome = frame

    def _add_edge(self, phase: Phase) -> None:
        reading = self.sampler.edge() if self.sampler else None
        self.edges.append(PhaseEdge(phase=phase, reading=reading))
        if phase.name == "setup" and not self.is_loaded:
            self._edges_of_worker = list(self.edges)
