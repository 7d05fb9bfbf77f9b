"""A complete run with real weights: the embedded SmolLM2 in FP16, INT8 and AWQ, without a model hub."""

from pathlib import Path
from typing import NamedTuple

import pytest
from analyses import rows_of
from commands import command, environment, run

from orchestrator.analysis.metrics import CellMetrics
from orchestrator.errors import BadInput
from orchestrator.planning.embedded import fetch_embedded_model
from orchestrator.records.store import read_run
from schemas.frames import Done
from schemas.record import Run

pytestmark = pytest.mark.slow

NEW_TOKENS = 16


class Measured(NamedTuple):
    status: int
    stdout: str
    stderr: str
    run: Run
    rows: dict[str, CellMetrics]
    cache: Path


@pytest.fixture(scope="module")
def measured(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One run with an empty cache except for the GGUF, so that everything else is prepared."""
    try:
        gguf = fetch_embedded_model(cache)
    except BadInput as error:
        pytest.skip(f"the embedded model is unavailable: {error}")
    folder = tmp_path_factory.mktemp("end-to-end")
    own_cache = folder / "cache"
    own_cache.mkdir()
    (own_cache / gguf.name).hardlink_to(gguf)
    argv = command("orchestrate", "-p", "fp16", "-p", "int8", "-p", "awq", "--out", "run")
    # No warm-up: a decode step of AWQ takes seconds on a CPU, and no test here looks at speed.
    options = ["--new-tokens", str(NEW_TOKENS), "--budget", "60", "--warmup", "0"]
    # An empty Hub cache, since the default model would be measured if it were there.
    env = environment(own_cache, HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hub"))
    done = run([*argv, *options], folder, env, timeout_s=900)
    measured = read_run(folder / "run")
    rows = {row.precision: row for row in rows_of(measured)}
    return Measured(done.returncode, done.stdout, done.stderr, measured, rows, own_cache)


def test_the_run_succeeds_and_names_its_model(measured: Measured) -> None:
    assert measured.status == 0, measured.stderr
    assert "measured the embedded smollm2-135m-instruct instead" in measured.stdout
    assert "HF_HUB_OFFLINE is set" in measured.stdout


@pytest.mark.parametrize("precision", ["fp16", "int8", "awq"])
def test_every_precision_knows_the_capital_of_france(measured: Measured, precision: str) -> None:
    outcome = next(cell.outcome for cell in measured.run.cells if cell.precision == precision)
    assert isinstance(outcome, Done)
    assert "Paris" in str(outcome.sample_text)


def test_quantized_weights_save_memory(measured: Measured) -> None:
    assert (measured.rows["int8"].saved_versus_baseline or 0) > 0.30
    assert (measured.rows["awq"].saved_versus_baseline or 0) > 0.50


def test_every_row_has_its_figures(measured: Measured) -> None:
    for row in measured.rows.values():
        assert row.reason is None
        assert row.ttft_s
        assert row.decode_tok_s
        assert row.end_to_end_tok_s
        assert row.loaded_bytes
        assert row.peak_bytes
        assert row.peak_bytes >= row.loaded_bytes


def test_emitted_tokens_are_counted(measured: Measured) -> None:
    for cell in measured.run.cells:
        for trial in cell.trials:
            assert len(trial.token_ids) == trial.new_tokens == len(trial.token_s) + 1
            assert trial.cut_short == (trial.new_tokens < NEW_TOKENS)
            assert sum(trial.token_s) == pytest.approx(trial.decode_s, rel=0.05)


def test_awq_was_packed_from_the_shipped_recipe(measured: Measured) -> None:
    """Calibrating would have left a recipe in the cache."""
    assert not (measured.cache / "awq-recipes").exists()
    awq = next(cell for cell in measured.run.cells if cell.precision == "awq")
    assert awq.loaded is not None
    assert awq.loaded.linear_classes.get("WQLinear_GEMM") == 30 * 7


def test_the_gguf_was_converted_once(measured: Measured) -> None:
    preparing = [
        cell.precision
        for cell in measured.run.cells
        if any(edge.phase.name == "prepare" for edge in cell.edges)
    ]
    assert preparing == ["fp16", "awq"]  # fp16 converts for all precisions; awq packs the result
    assert len(list((measured.cache / "gguf").iterdir())) == 1
