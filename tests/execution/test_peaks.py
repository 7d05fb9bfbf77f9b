"""The device's peaks: measured by a real worker process, saved with the run, compared with published ones."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from conftest import ROOT
from sample_records import make_ready, make_run
from worker_runs import copy_packages

from orchestrator.analysis.peaks import bandwidth_bytes_per_s, matrix_flop_per_s
from orchestrator.execution.measure_peaks import PEAKS_WORKER, measure_peaks
from orchestrator.execution.worker_session import WorkerStart
from orchestrator.hardware.datasheet import find_datasheet
from orchestrator.precisions.catalog import find_precisions
from orchestrator.precisions.interpreter import lent_packages, own_interpreter
from orchestrator.records.store import RunFolder, read_run
from schemas.frames import Failed, Peaks
from schemas.record import PeaksRecord
from workers.generation.device import Device, StepTimes
from workers.harness import peak_rates
from workers.harness.peak_rates import DTYPES, bandwidths, matrix_rates

GIGA, TERA = 1e9, 1e12
TIMEOUT_S = 300

PEAKS = Peaks(
    read_bytes_per_s=3e12,
    copy_bytes_per_s=2e12,
    matrix_flop_per_s={"float16": 7e14},
    missing={"int8": "no such kernel"},
    measured_s=4.0,
)
MEASURED = PeaksRecord(
    outcome=PEAKS, wall_s=9.0, ready=make_ready(), datasheet=find_datasheet("NVIDIA H100 80GB HBM3")
)
FAILED = PeaksRecord(outcome=Failed(kind="unsupported", message="no GPU"), wall_s=1.0)

ALONE = """
import sys
from pathlib import Path
import msgspec
from orchestrator.precisions.interpreter import lent_packages, own_interpreter
from orchestrator.execution.measure_peaks import PEAKS_WORKER, measure_peaks
from orchestrator.execution.worker_session import WorkerStart
with lent_packages() as lent:
    record = measure_peaks(WorkerStart(own_interpreter(), PEAKS_WORKER, lent), "cpu", Path("cache"), 300)
assert not {"torch", "workers"} & set(sys.modules)
print(msgspec.json.encode(record).decode())
"""


def measure(device: str, folder: Path, lent: Path, timeout_s: float = TIMEOUT_S) -> PeaksRecord:
    start = WorkerStart(own_interpreter(), PEAKS_WORKER, lent, folder / "peaks.log")
    return measure_peaks(start, device, folder, timeout_s)


def outcome_of(record: PeaksRecord) -> Peaks:
    assert isinstance(record.outcome, Peaks), record.outcome
    return record.outcome


def failure_of(record: PeaksRecord) -> Failed:
    assert isinstance(record.outcome, Failed), record.outcome
    return record.outcome


@pytest.fixture(scope="module")
def on_cpu() -> PeaksRecord:
    """Measured on this machine by a new process without torch, like the real parent."""
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.json.decode(done.stdout, type=PeaksRecord)


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Path]:
    """Our packages, with a statement inserted before the imports of the worker."""

    def make(statement: str) -> Path:
        folder = copy_packages(tmp_path / "lent")
        worker = folder / "workers/peaks.py"
        before = '    channel.enter("start")\n'
        worker.write_text(worker.read_text().replace(before, before + f"    {statement}\n"))
        return folder

    return make


class Metronome(Device):
    """A CPU with a simulated clock, on which all intervals between two marks are equally long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interval_s: float) -> None:
        super().__init__("cpu")
        self.interval_s = interval_s
        self.now_s = 0.0
        monkeypatch.setattr(peak_rates, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def step_times(self) -> StepTimes:
        self.now_s += self.interval_s
        return Interval(self.interval_s)


class Interval:
    """The metronome's interval between two marks."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s

    def mark(self) -> None:
        pass

    def intervals_s(self) -> list[float]:
        return [self.interval_s]


# Measured


@pytest.mark.slow
def test_a_cpu_is_measured_and_every_rate_is_plausible(on_cpu: PeaksRecord) -> None:
    peaks = outcome_of(on_cpu)
    assert GIGA < peaks.read_bytes_per_s < 10 * TERA
    assert GIGA < peaks.copy_bytes_per_s < 10 * TERA
    assert peaks.matrix_flop_per_s["float32"] > GIGA
    assert all(0.01 * GIGA < rate < 1000 * TERA for rate in peaks.matrix_flop_per_s.values())


@pytest.mark.slow
def test_every_dtype_has_a_rate_or_a_reason(on_cpu: PeaksRecord) -> None:
    peaks = outcome_of(on_cpu)
    assert sorted([*peaks.matrix_flop_per_s, *peaks.missing]) == sorted(DTYPES)
    assert all(reason and "\n" not in reason for reason in peaks.missing.values())


@pytest.mark.slow
def test_the_record_has_its_duration(on_cpu: PeaksRecord) -> None:
    peaks = outcome_of(on_cpu)
    assert peak_rates.TIME_BOX_S * 3 < peaks.measured_s < on_cpu.wall_s


@pytest.mark.slow
def test_the_record_names_the_device_and_its_torch(on_cpu: PeaksRecord) -> None:
    assert on_cpu.ready is not None
    assert (on_cpu.ready.device, on_cpu.ready.device_uuid) == ("cpu", None)
    assert on_cpu.ready.versions == {"torch": torch.__version__}
    assert on_cpu.datasheet is None


def test_bytes_and_operations_are_counted_by_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Metronome(monkeypatch, interval_s=0.5)
    monkeypatch.setattr(peak_rates, "WEIGHT_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(peak_rates, "SIZES", {"cpu": (16, 32)})  # half a second is too long for a second size
    assert bandwidths(device) == (2**21, 2**21)
    rates, _ = matrix_rates(device, float("inf"))
    assert rates == dict.fromkeys(DTYPES, 2 * 2 * 16**3)


def test_a_rate_is_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Metronome(monkeypatch, interval_s=peak_rates.REPETITION_S / 4)
    monkeypatch.setattr(peak_rates, "SIZES", {"cpu": (16,)})
    rates, _ = matrix_rates(device, float("inf"))  # after the first call, an interval is of four
    assert rates == pytest.approx(dict.fromkeys(DTYPES, 2 * 16**3 / (device.interval_s / 4)))


@pytest.mark.parametrize(("interval_s", "at_most_s"), [(0.001, 5), (2, 3 * 2)])
def test_a_device_of_any_speed_is_measured_in_seconds(
    interval_s: float, at_most_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Metronome(monkeypatch, interval_s)
    monkeypatch.setattr(peak_rates, "WEIGHT_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(peak_rates, "SIZES", {"cpu": (16, 32)})
    peaks = peak_rates.measure_peaks(device)
    assert 0 < peaks.measured_s <= at_most_s
    assert len(peaks.matrix_flop_per_s) == (len(DTYPES) if interval_s < 1 else 0)


def test_unsupported_dtypes_are_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("scaled products need compute capability 8.9\nand a trace")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    monkeypatch.setattr(peak_rates, "TIME_BOX_S", 0.001)
    monkeypatch.setattr(peak_rates, "SIZES", {"cpu": (16, 32)})
    rates, missing = matrix_rates(Device("cpu"), float("inf"))
    assert missing == {"float8_e4m3fn": "scaled products need compute capability 8.9"}
    assert set(rates) == set(DTYPES) - set(missing)


def test_a_dtype_that_does_not_fit_is_measured_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    randn = torch.randn

    def limited(*size: int, **options: object) -> torch.Tensor:
        if max(size) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return randn(*size, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "randn", limited)
    for sizes, measured in (((16, 32), True), ((32, 64), False)):
        monkeypatch.setattr(peak_rates, "SIZES", {"cpu": sizes})
        rates, missing = matrix_rates(Device("cpu"), float("inf"))
        assert set(rates if measured else missing) == set(DTYPES)
        assert not (missing if measured else rates)


def test_no_dtype_is_started_after_the_limit() -> None:
    rates, missing = matrix_rates(Device("cpu"), latest_start_s=0)
    assert rates == {}
    assert set(missing) == set(DTYPES)


def test_the_peaks_worker_is_not_listed_as_a_precision() -> None:
    assert "workers.peaks" not in {precision.module for precision in find_precisions().values()}


# Failed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "kind", "message", "timeout_s"),
    [
        ("import no_such_package", "missing-package", "no_such_package", TIMEOUT_S),
        ("__import__('os').abort()", "crashed", "SIGABRT", TIMEOUT_S),
        ("__import__('time').sleep(600)", "timeout", "5 s", 5),
    ],
)
def test_a_failure_is_recorded(
    statement: str, kind: str, message: str, timeout_s: float, broken: Callable[[str], Path], tmp_path: Path
) -> None:
    record = measure("cpu", tmp_path, broken(statement), timeout_s)
    assert failure_of(record).kind == kind
    assert message in failure_of(record).message
    assert (record.ready, record.datasheet) == (None, None)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_a_gpu_that_torch_does_not_see_is_a_failure(tmp_path: Path) -> None:
    with lent_packages() as lent:
        record = measure("cuda:0", tmp_path, lent)
    assert failure_of(record).kind == "unsupported"
    assert "no CUDA GPU" in failure_of(record).message
    assert "no CUDA GPU" in (tmp_path / "peaks.log").read_text()


# Saved and used


@pytest.mark.parametrize("record", [MEASURED, FAILED])
def test_peaks_are_read_with_the_run(record: PeaksRecord, tmp_path: Path) -> None:
    run = make_run()
    folder = RunFolder.create(tmp_path, run.plan, run.environment)
    assert read_run(tmp_path).peaks is None
    folder.write_peaks(record)
    assert read_run(tmp_path).peaks == record


def test_a_peak_is_the_measured_one_or_unknown() -> None:
    assert bandwidth_bytes_per_s(MEASURED) == 3e12
    assert matrix_flop_per_s(MEASURED, "float16") == 7e14
    assert matrix_flop_per_s(MEASURED, "int8") is None
    for unknown in (FAILED, None):
        assert bandwidth_bytes_per_s(unknown) is None
        assert matrix_flop_per_s(unknown, "float16") is None


# Published


def test_published_figures_are_dense_rates_found_by_the_drivers_name() -> None:
    h100 = find_datasheet("NVIDIA H100 80GB HBM3")
    t4 = find_datasheet("Tesla T4")
    assert h100 is not None
    assert t4 is not None
    assert h100.read_bytes_per_s == pytest.approx(3.35e12)
    assert h100.matrix_flop_per_s["float16"] == pytest.approx(989.5e12)
    assert h100.matrix_flop_per_s["int8"] == pytest.approx(2 * 989.5e12)
    assert (t4.read_bytes_per_s, t4.matrix_flop_per_s["float16"]) == (320e9, 65e12)
    assert "float8_e4m3fn" not in t4.matrix_flop_per_s
    assert "data sheet" in h100.source


@pytest.mark.parametrize("name", ["", "CPU", "H100", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_an_unknown_gpu_has_no_published_figures(name: str) -> None:
    assert find_datasheet(name) is None


# On a GPU


@pytest.mark.gpu
def test_an_h100_is_close_to_its_data_sheet(tmp_path: Path) -> None:
    if "H100 80GB HBM3" not in torch.cuda.get_device_name():
        pytest.skip("the figures are an H100's")
    with lent_packages() as lent:
        record = measure("cuda:0", tmp_path, lent)
    peaks = outcome_of(record)
    assert 2.5 * TERA < peaks.read_bytes_per_s < 3.35 * TERA
    assert 2 * TERA < peaks.copy_bytes_per_s < 3.35 * TERA
    rates = peaks.matrix_flop_per_s
    assert peaks.missing == {}
    assert rates["float16"] > 400 * TERA
    assert rates["float32"] < rates["float16"] < min(rates["int8"], rates["float8_e4m3fn"])
    assert peaks.measured_s < 5
    assert record.datasheet is not None
    assert all(rate < record.datasheet.matrix_flop_per_s[dtype] for dtype, rate in rates.items())
