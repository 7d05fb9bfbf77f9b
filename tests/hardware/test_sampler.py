"""The memory sampler: samples, edges, its cost, and its end.

With the fake driver library, in fresh processes, as in test_nvml.
"""

import json
from typing import Any

import msgspec
import pytest
from analyses import warnings_of
from fake_nvml import (
    COUNTERS,
    ONE_GPU,
    START_WATCHED,
    STATE,
    FakeNvml,
    answer_of,
)
from golden_text import Golden
from sample_records import edge, make_cell, make_run, torch_memory

from schemas.record import CellRecord, SamplerStats


def test_edges_add_process_bytes_and_counters_to_what_samples_hold(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "process 4242 300\n")
    script = """\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=4242), period_s=0.02) as sampler:
    wait_until(lambda: len(sampler.samples) >= 3)
    answer = [sampler.samples[0], sampler.edge(), sampler.latest.device_bytes]
"""
    sample, edge, latest_bytes = answer_of(fake_nvml, script)
    assert (sample["process_bytes"], sample["device_bytes"]) == (None, 1_000_000)
    assert (edge["process_bytes"], edge["device_bytes"], edge["reason"]) == (300, 1_000_000, None)
    assert (sample["gpu"], edge["gpu"]) == (STATE, STATE | COUNTERS)
    assert latest_bytes == 1_000_000
    assert edge["at_ns"] > sample["at_ns"]


def test_a_gpu_lost_while_sampling_gives_a_reason(golden: Golden, fake_nvml: FakeNvml) -> None:
    script = f"""\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=1), period_s=0.02) as sampler:
    wait_until(lambda: sampler.latest)
    write_state({ONE_GPU + "lost 1"!r})
    wait_until(lambda: sampler.latest.reason)
    answer = [sampler.samples[0], sampler.latest, sampler.edge()]
"""
    before, after, edge = answer_of(fake_nvml, script)
    assert before["device_bytes"] == 1_000_000
    assert after["device_bytes"] is None
    assert edge["reason"] == after["reason"]
    golden(after["reason"])


@pytest.mark.slow
def test_the_sampler_sleeps_between_samples(fake_nvml: FakeNvml) -> None:
    script = """\
with Nvml.open() as nvml:
    sources = [NvmlSource(nvml, UUID, pid=1), ResidentSetSource(os.getpid())]
    with MemorySampler(sources[0]) as first, MemorySampler(sources[1]) as second:
        time.sleep(2.05)
    answer = [first.stats(), second.stats()]
"""
    answers = answer_of(fake_nvml, script)
    assert [stats["source"] for stats in answers] == ["nvml", "resident-set"]
    for stats in answers:
        assert 2 <= stats["samples"] <= stats["wall_s"] / 0.1 + 1
        assert stats["period_s"] >= 0.1
        assert 0 < stats["cpu_s"] < 0.05 * stats["wall_s"]


def test_the_resident_set_shows_what_a_worker_allocates(golden: Golden, fake_nvml: FakeNvml) -> None:
    script = """\
with worker, MemorySampler(ResidentSetSource(worker.pid), period_s=0.02) as sampler:
    wait_until(lambda: len(sampler.samples) >= 3)
    worker.stdin.write(b"\\n")
    worker.stdin.flush()
    worker.stdout.readline()
    edge, seen = sampler.edge(), len(sampler.samples)
    wait_until(lambda: len(sampler.samples) > seen + 1)
    answer = [sampler.samples[0], edge, sampler.latest]
    worker.kill()
"""
    before, edge, after = answer_of(fake_nvml, START_WATCHED + script)
    for reading in (edge, after):
        assert reading["gpu"] is None
        assert 64_000_000 <= reading["process_bytes"] - before["process_bytes"] < 128_000_000
        assert reading["device_bytes"] is None
    golden(edge["reason"])
    assert after["reason"] is None


def test_sampling_stops_when_the_worker_ends_even_before_it_is_waited_for(
    golden: Golden, fake_nvml: FakeNvml
) -> None:
    script = """\
with worker, MemorySampler(ResidentSetSource(worker.pid), period_s=0.02) as sampler:
    wait_until(lambda: sampler.latest)
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    zombie = sampler.edge()
    wait_until(lambda: all(thread.name != "memory-sampler" for thread in threading.enumerate()))
    worker.wait()
    least_bytes = min(sample.process_bytes for sample in sampler.samples)
    answer = [zombie, sampler.edge(), least_bytes]
"""
    zombie, gone, least_bytes = answer_of(fake_nvml, START_WATCHED + script)
    assert zombie["reason"] == gone["reason"]
    golden(gone["reason"])
    assert zombie["process_bytes"] is None
    assert least_bytes > 0


def test_slow_calls_are_timed_and_missed_samples_counted(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "slow_us 200000\n")
    script = """\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=1), period_s=0.05) as sampler:
    wait_until(lambda: len(sampler.samples) >= 3)
    sampler.edge()
    sampler.edge()
    answer = sampler.stats()
"""
    stats = answer_of(fake_nvml, script)
    assert 0.2 <= stats["median_call_s"] <= stats["longest_call_s"]
    assert stats["missed"] >= 2 * 4
    assert stats["enumerations"] == 2


def test_there_are_at_most_twenty_samples_a_second(fake_nvml: FakeNvml) -> None:
    script = """\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=1), period_s=0.001) as sampler:
    wait_until(lambda: len(sampler.samples) >= 4)
    answer = sampler.stats()
"""
    assert answer_of(fake_nvml, script)["period_s"] >= 0.05


def test_a_resident_set_lists_no_processes(fake_nvml: FakeNvml) -> None:
    script = """\
with MemorySampler(ResidentSetSource(os.getpid())) as sampler:
    wait_until(lambda: sampler.latest)
    reading = sampler.edge()
    answer = [sampler.stats(), reading.others]
"""
    stats, others = answer_of(fake_nvml, script)
    assert (stats["enumerations"], others) == (0, None)


def stats(**fields: Any) -> SamplerStats:
    return SamplerStats(source="nvml", samples=100, period_s=0.1, cpu_s=0.0, wall_s=10.0, **fields)


@pytest.mark.parametrize(
    ("fields", "warned"),
    [({}, False), ({"missed": 10}, False), ({"missed": 11, "longest_call_s": 0.5}, True)],
)
def test_many_missed_samples_give_a_warning(golden: Golden, fields: dict[str, Any], warned: bool) -> None:
    lines = warnings_of(make_run(make_cell(sampler=stats(**fields))))
    assert len(lines) == warned
    if warned:
        golden(lines)


def test_records_without_the_newer_fields_still_decode() -> None:
    cell = make_cell(edges=[edge("load", 0, torch=torch_memory(1), device=5)], sampler=stats())
    plain = json.loads(msgspec.json.encode(cell))
    for name in ("leftover", "nvml_uuid"):
        del plain[name]
    for name in ("cuda_visible_devices", "cuda_device_order"):
        del plain["ready"][name]
    for name in ("median_call_s", "longest_call_s", "missed", "enumerations"):
        del plain["sampler"][name]
    del plain["edges"][0]["reading"]["others"]
    assert msgspec.convert(plain, CellRecord) == cell
    assert warnings_of(make_run(cell)) == []
