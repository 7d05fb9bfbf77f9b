"""Memory over time: the series agree with the records, and the plot shows them on one scale.

First the data, from runs on an H100 that the README quotes; then every format is drawn and read back.
"""

import builtins
import io
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from analyses import memory_of
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from sample_records import MIB, edge, make_cell, make_ready, make_run, sample, torch_memory

from orchestrator.analysis.memory.phases import phase_memory
from orchestrator.analysis.memory.timeline import Timeline, timelines
from orchestrator.cli.memory import show_memory
from orchestrator.errors import BadInput
from orchestrator.records.store import read_run
from orchestrator.report.label_layout import Label, spread
from orchestrator.report.plot import as_html, as_png, title
from schemas.frames import Failed
from schemas.record import CellRecord, MemoryReading, Run

SEVEN_B = ROOT / "tests/golden/h100-precisions-7b"
HALF_B = ROOT / "tests/golden/h100-random-0.5b"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "firefox")
S = 10**9


@pytest.fixture(scope="module")
def seven_b() -> Run:
    return read_run(SEVEN_B)


@pytest.fixture(scope="module", params=[SEVEN_B, HALF_B], ids=lambda folder: folder.name)
def recorded(request: pytest.FixtureRequest) -> Run:
    return read_run(request.param)


def drawn(run: Run) -> list[Timeline]:
    return timelines(run, run.cells)


def cpu_run() -> Run:
    """One cell on a CPU: 300 MiB after load, 350 while it decodes."""
    sizes = {1: 10, 2: 200, 3: 300, 4: 300, 5: 350, 6: 340}
    cell = make_cell(
        ready=make_ready(uuid=None),
        edges=[
            edge("start", 1 * S, process=10 * MIB),
            edge("load", 2 * S, process=200 * MIB),
            edge("prefill", 4 * S, process=300 * MIB, trial=0),
            edge("decode", 5 * S, process=350 * MIB, trial=0),
            edge("end", 6 * S, process=340 * MIB),
        ],
        samples=[sample(at * S + S // 2, process=size * MIB) for at, size in sizes.items()],
    )
    return make_run(cell, gpu_reason="no driver")


# The series


def test_cells_of_one_worker_share_a_clock(seven_b: Run) -> None:
    lines = drawn(seven_b)
    assert [line.precision for line in lines] == ["fp16", "int8", "int8-t0", "awq"]
    named = [[cell.name for cell in line.cells] for line in lines]
    assert named == [[name, f"{name} graph"] for name in ("fp16", "int8", "int8-t0", "awq")]
    assert [cell.name for line in lines for cell in line.cells if cell.failed] == ["int8 graph"]
    fp16 = lines[0]
    assert fp16.cells[0].start_s == 0
    assert fp16.cells[0].end_s == fp16.cells[1].start_s == pytest.approx(35.12, abs=0.01)
    assert fp16.cells[1].end_s == fp16.end_s == pytest.approx(37.65, abs=0.01)
    # The worker's startup phases are in both cells' records, but appear once here.
    phases = [span.phase for span in fp16.phases]
    assert phases[:3] == ["start", "context", "load"]
    assert phases.count("load") == 1
    assert phases.count("setup") == 2
    assert phases.count("prefill") == phases.count("decode") == 4


def test_series_contain_every_recorded_reading(recorded: Run) -> None:
    for line in drawn(recorded):
        cells = [cell for cell in recorded.cells if cell.precision == line.precision]
        edges = {one.phase.at_ns: one for cell in cells for one in cell.edges}
        read = [one for one in edges.values() if one.reading]
        assert len(line.sampled) == sum(len(cell.samples) for cell in cells) + len(read)
        assert len(line.process) == len(read) == len(edges) - 2  # not at start and context
        assert len(line.allocated) == len(line.reserved) == len(read)
        assert len(line.phases) == len(edges)
        assert line.on_gpu


def test_series_are_in_order_and_within_the_workers_lifetime(recorded: Run) -> None:
    for line in drawn(recorded):
        for series in (line.sampled, line.process, line.reserved, line.allocated):
            times = [point.at_s for point in series]
            assert times == sorted(times)
            assert times[0] >= line.first_known_s > 10
            assert times[-1] <= line.end_s


def test_phases_have_no_gaps_or_overlaps(recorded: Run) -> None:
    for line in drawn(recorded):
        assert line.phases[0].start_s == line.cells[0].start_s == 0
        for spans in (line.phases, line.cells):
            assert all(span.start_s <= span.end_s for span in spans)
            assert all(one.end_s == after.start_s for one, after in pairwise(spans))
        assert line.phases[-1].end_s == line.cells[-1].end_s


def test_torchs_highest_peak_is_that_of_the_table(recorded: Run) -> None:
    for line in drawn(recorded):
        cells = [cell for cell in recorded.cells if cell.precision == line.precision]
        own = {"load", "prepare", "context", "start", "profile"}
        marks = [span.peak_allocated_bytes or 0 for span in line.phases if span.phase not in own]
        assert max(marks) == max(memory_of(cell).peak_bytes or 0 for cell in cells)
        # The device holds everything that torch does, and more.
        assert line.highest_bytes == max(point.held_bytes or 0 for point in line.sampled)


def test_known_figures_of_an_h100(seven_b: Run) -> None:
    fp16, int8, *_ = drawn(seven_b)
    (load,) = [span for span in int8.phases if span.phase == "load"]
    (from_phases,) = [phase for phase in phase_memory(seven_b.cells[2]) if phase.phase == "load"]
    assert load.peak_allocated_bytes == from_phases.peak_allocated_bytes
    assert (load.peak_allocated_bytes or 0) // MIB == 8538
    assert (fp16.process[-1].held_bytes or 0) // MIB == 15392
    assert (fp16.reserved[-1].held_bytes or 0) // MIB == 14628
    # The failed cell did not reach the end of its phase, so torch reported no peak.
    assert int8.phases[-1].phase == "setup"
    assert int8.phases[-1].peak_allocated_bytes is None


def test_on_a_cpu_there_is_only_the_resident_set() -> None:
    (line,) = drawn(cpu_run())
    assert not line.on_gpu
    assert line.process == line.reserved == line.allocated == []
    assert [round(point.at_s, 1) for point in line.sampled] == [0, 0.5, 1, 1.5, 2.5, 3, 3.5, 4, 4.5, 5, 5.5]
    assert line.highest_bytes == 350 * MIB
    assert line.end_s == 5.5


def test_a_failed_reading_is_a_gap_not_zero() -> None:
    silent = MemoryReading(at_ns=3 * S, reason="GPU is lost")
    cell = make_cell(
        edges=[
            edge("start", 0),
            edge("load", 1 * S, torch=torch_memory(0), device=500 * MIB, reason="pid is hidden"),
            edge("end", 4 * S, torch=torch_memory(90 * MIB), device=600 * MIB, reason="pid is hidden"),
        ],
        samples=[sample(2 * S, device=550 * MIB), silent],
    )
    (line,) = drawn(make_run(cell))
    assert [point.held_bytes for point in line.sampled[1:]] == [500 * MIB, 550 * MIB, None, 600 * MIB]
    assert line.process == []
    assert line.first_known_s == 1
    assert as_png([line], "gap")


def test_a_reused_pid_is_another_worker() -> None:
    def cell(precision: str, at_ns: int) -> CellRecord:
        return make_cell(precision, edges=[edge("start", at_ns), edge("load", at_ns + 5, device=MIB)])

    run = make_run(cell("fp16", 0), cell("awq", 100), make_cell("int8", edges=[]))
    assert [line.precision for line in drawn(run)] == ["fp16", "awq"]


def test_a_worker_that_failed_immediately_can_be_drawn() -> None:
    failed = Failed(kind="missing-package", message="no torch")
    (line,) = drawn(make_run(make_cell(ready=None, outcome=failed, edges=[edge("start", 5)])))
    assert (line.end_s, line.highest_bytes, line.first_known_s) == (0, 0, 0)
    assert as_png([line], "nothing")


# Labels don't overlap

labels = st.lists(st.builds(Label, st.just("x"), st.floats(0, 10), st.floats(0.1, 1)), max_size=12)


@given(labels)
def test_labels_never_overlap(wanted: list[Label]) -> None:
    wanted = sorted(wanted, key=lambda label: label.preferred)
    places = spread(wanted, 0, 10)
    for (one, at), (after, later) in pairwise(zip(wanted, places, strict=True)):
        assert later - at >= (one.room + after.room) / 2 - 1e-9
    if sum(label.room for label in wanted) <= 10:
        ends = [(at - label.room / 2, at + label.room / 2) for label, at in zip(wanted, places, strict=True)]
        assert all(low >= -1e-9 and high <= 10 + 1e-9 for low, high in ends)


def test_labels_with_enough_space_are_not_moved() -> None:
    assert spread([Label("a", 2, 1), Label("b", 5, 1)], 0, 10) == [2, 5]
    assert spread([Label("a", 5, 1), Label("b", 5, 1)], 0, 10) == [4.5, 5.5]
    assert spread([Label("a", 10, 1)], 0, 10) == [9.5]


# The plot


def colors(png: bytes) -> int:
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(png), format="png")
    assert pixels.shape[1] > 1000
    return len({tuple(pixel) for row in pixels[::3] for pixel in row[::3].tolist()})


@pytest.mark.parametrize("get_run", [lambda: read_run(HALF_B), cpu_run], ids=["gpu", "cpu"])
def test_a_png_shows_curves(get_run: Callable[[], Run]) -> None:
    png = as_png(drawn(get_run()), "heading")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert colors(png) > 8


def texts(page: bytes) -> list[str]:
    """Texts of an HTML page that is also well-formed XML."""
    root = ElementTree.fromstring(page)
    return [text.strip() for text in root.itertext() if text.strip()]


def test_a_page_names_every_curve_phase_cell_and_unit(seven_b: Run) -> None:
    page = as_html(drawn(seven_b), title(seven_b, "h100-precisions-7b"))
    shown = texts(page)
    heading = "Memory of random-qwen2.5-7b on NVIDIA H100 80GB HBM3, run h100-precisions-7b"
    assert shown.count(heading) == 2  # of the page, and in the picture
    assert {"FP16", "INT8 (LLM.int8)", "INT8 (threshold 0)", "AWQ INT4 (AutoAWQ)"} <= set(shown)
    assert {"fp16", "fp16 graph", "int8 graph, failed", "awq graph"} <= set(shown)
    assert {"start", "context", "load", "warmup", "setup", "profile", "prefill, decode ×2"} <= set(shown)
    assert "seconds since the worker started" in shown
    assert shown.count("GiB") == 4
    assert "NVML, whole device 15.04 GiB" in shown
    assert "○ NVML, process 9.18 GiB" in shown
    assert "torch allocated 5.31 GiB" in shown
    assert "torch peak 8.34 GiB, in load" in shown


def test_all_panels_share_a_scale(seven_b: Run) -> None:
    shown = texts(as_html(drawn(seven_b), "heading"))
    assert shown.count("10") == shown.count("15") == 4
    assert shown.count("50") == 1  # seconds, below the last panel


def test_a_page_of_a_cpu_run_shows_the_resident_set() -> None:
    run = cpu_run()
    shown = texts(as_html(drawn(run), title(run, "run")))
    assert "Memory of tiny on a CPU, run run" in shown
    assert "resident set 340 MiB" in shown
    assert not any("NVML" in text or "torch" in text for text in shown)


def test_a_page_is_self_contained(seven_b: Run) -> None:
    page = as_html(drawn(seven_b), "<heading> & $more$").decode()
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    for word in ("http", "<script", "<link", "@import", "//"):
        assert word not in outside
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert "<title>&lt;heading&gt; &amp; $more$</title>" in page
    assert texts(page.encode()).count("<heading> & $more$") == 2
    assert len(page) < 500_000


def test_drawing_is_reproducible(seven_b: Run) -> None:
    assert as_html(drawn(seven_b), "heading") == as_html(drawn(seven_b), "heading")


@pytest.mark.slow
def test_a_browser_shows_the_page(seven_b: Run, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no headless browser on this machine")
    page, shot = tmp_path / "memory.html", tmp_path / "shot.png"
    page.write_bytes(as_html(drawn(seven_b), "heading"))
    own = [f"--user-data-dir={tmp_path / 'profile'}", "--no-sandbox", "--disable-gpu"]
    if "firefox" in browser:
        own = ["--profile", str(tmp_path), "--window-size=1200,1100"]
    command = [browser, "--headless", *own, f"--screenshot={shot}", "--window-size=1200,1100", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert colors(shot.read_bytes()) > 8


# The option


def memory(*arguments: object) -> str:
    result = CliRunner().invoke(show_memory, [str(one) for one in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def test_the_file_extension_decides_the_format(tmp_path: Path) -> None:
    for name, begin in (("a.png", b"\x89PNG"), ("b.HTML", b"<!DOCTYPE html>")):
        output = memory(HALF_B, "--plot", tmp_path / name)
        assert f"plotted: {tmp_path / name}" in output
        assert "MiB at the end of decode" in output
        assert (tmp_path / name).read_bytes().startswith(begin)


def test_only_the_selected_precision_is_drawn(tmp_path: Path) -> None:
    memory(HALF_B, "-p", "awq", "--plot", tmp_path / "awq.html")
    shown = texts((tmp_path / "awq.html").read_bytes())
    assert "awq" in shown
    assert "fp16" not in shown


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("memory.pdf", "has no known file extension. Use .html or .png."),
        ("memory", "has no known file extension"),
        ("nowhere/memory.png", "can't be written: No such file or directory. Name another file."),
    ],
)
def test_an_impossible_file_is_a_one_line_error(name: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        memory(HALF_B, "--plot", tmp_path / name)
    assert str(caught.value).startswith(f"--plot {tmp_path / name}: {problem}")


def test_without_matplotlib_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInput) as caught:
        memory(HALF_B, "--plot", tmp_path / "memory.png")
    assert str(caught.value).endswith(
        "memory.png: needs matplotlib, which is not installed. Run: pip install 'matplotlib>=3.8'."
    )
    assert not (tmp_path / "memory.png").exists()
    assert "MiB at the end of decode" in memory(HALF_B)
