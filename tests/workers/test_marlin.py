"""Marlin: building, caching, random weights, refusals, and on a GPU with GPTQModel, merged layers."""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from golden_text import Golden
from packaging.requirements import Requirement
from worker_runs import cpu_job

from orchestrator.precisions.catalog import find_precisions
from schemas.job import Job
from workers.harness import startup
from workers.models.random_int4 import DEVIATION_OF_INT4, random_int4_tensor
from workers.protocol.errors import Unsupported
from workers.quantization import awq_cache, awq_prepare, gptq_checkpoint, marlin_build
from workers.quantization.marlin_model import Layout, marlin_layer, merged_layer, with_atomic_adds

GROUP_SIZE = 128


@pytest.fixture
def job(tiny_llama: Path, tmp_path: Path) -> Job:
    return cpu_job("awq-marlin", tiny_llama, tmp_path)


def no_report(message: str, done: int, total: int) -> None:
    raise AssertionError(message)


def test_a_build_is_valid_for_the_installed_versions_only(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0+cu130", "gptqmodel": "7.6.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    assert not marlin_build.is_built(job)
    library = Path(job.cache_folder, "marlin.so")
    note = Path(job.cache_folder, "marlin", "marlin_fp16-2.11.0+cu130-7.6.0")
    note.parent.mkdir()
    note.write_text(str(library))
    assert not marlin_build.is_built(job)
    library.touch()
    assert marlin_build.is_built(job)
    versions["torch"] = "2.12.0+cu130"
    assert not marlin_build.is_built(job)


def test_without_nvcc_the_toolkit_is_suggested(
    job: Job, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(Unsupported) as refused:
        marlin_build.build(job, no_report)
    assert "CUDA_HOME" in (refused.value.hint or "")
    golden([str(refused.value), refused.value.hint or ""])


def test_without_autoawq_the_calibrating_command_is_suggested(
    job: Job, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not awq_cache.is_prepared(job)
    monkeypatch.setitem(sys.modules, "workers.quantization.awq_model", None)
    with pytest.raises(Unsupported) as refused:
        awq_prepare.prepare(job, no_report)
    command = f"qbench-worker awq --calibrate --model {job.model.location}"
    hint = refused.value.hint or ""
    assert command in hint
    golden([str(refused.value), hint.replace(job.model.location, "MODEL")])


def test_both_awq_precisions_share_their_weights(tiny_llama: Path, cache: Path) -> None:
    folders = {awq_cache.packed_folder(cpu_job(name, tiny_llama, cache)) for name in ("awq", "awq-marlin")}
    assert len(folders) == 1
    needs = {
        need.name: str(need.specifier) for need in map(Requirement, find_precisions()["awq"].requirements)
    }
    assert needs["autoawq"] == f"=={awq_cache.AUTOAWQ_VERSION}"


def test_gptq_adds_atomically_like_awq() -> None:
    asked = []
    product = with_atomic_adds(lambda **arguments: asked.append(arguments))
    product(input=1, use_atomics=False)
    assert asked == [{"input": 1, "use_atomics": True}]


def test_gptq_checkpoints_are_cached_by_content(
    tiny_llama: Path, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"gptqmodel": "7.6.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    job = cpu_job("gptq", tiny_llama, tmp_path)
    folder = gptq_checkpoint.packed_folder(job)
    assert folder.parent == tmp_path / "gptq"
    assert gptq_checkpoint.packed_folder(cpu_job("gptq", tiny_qwen2, tmp_path)) != folder
    assert not gptq_checkpoint.is_prepared(job)
    folder.mkdir(parents=True)
    assert gptq_checkpoint.is_prepared(job)
    versions["gptqmodel"] = "7.7.0"
    assert not gptq_checkpoint.is_prepared(job)
    assert gptq_checkpoint.is_prepared(cpu_job("gptq", tiny_llama, tmp_path, checkpoint="some/checkpoint"))
    assert gptq_checkpoint.is_prepared(cpu_job("gptq", "qwen2.5-0.5b", tmp_path))


def test_random_int4_weights_have_the_requested_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.empty(64, 32, dtype=torch.int32, device="meta")
    scales = torch.empty(1, 256, dtype=torch.float16, device="meta")
    integers = random_int4_tensor("up_proj.qweight", packed, 0.02, generator)
    zeros = random_int4_tensor("up_proj.qzeros", packed[:1], 0.02, generator)
    scale = random_int4_tensor("up_proj.scales", scales, 0.02, generator)
    assert {tensor.device.type for tensor in (integers, zeros, scale)} == {"cpu"}
    nibbles = torch.stack([integers >> shift & 15 for shift in range(0, 32, 4)]).float()
    assert nibbles.std().item() == pytest.approx(DEVIATION_OF_INT4, rel=0.02)
    assert {int(zeros[0, 0]) >> shift & 15 for shift in range(0, 32, 4)} == {8}
    assert (nibbles * scale[0, 0].float()).std().item() == pytest.approx(0.02, rel=0.02)


def test_packages_cannot_choose_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """gptqmodel would, by setting unset variables."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with startup.keep_cuda_defaults():
        seen = {name: os.environ[name] for name in startup.CUDA_DEFAULTS}
    assert seen == {"PYTORCH_ALLOC_CONF": "backend:native", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def fill_at_random(layer: torch.nn.Module) -> None:
    """Fill a layer like a checkpoint does before it is repacked."""
    shift = torch.iinfo(torch.int32).max
    for name, empty in [*layer.named_parameters(), *layer.named_buffers()]:
        values = torch.empty(empty.shape, dtype=empty.dtype, device="cuda:0")
        if name == "g_idx":
            values.copy_(torch.arange(values.numel()) // GROUP_SIZE)
        elif values.is_floating_point():
            values.uniform_(0.001, 0.01)
        else:
            values.random_(-shift, shift)
        set_module_tensor_to_device(layer, name, "cuda:0", values)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("module", "kind", "symmetric"),
    [("marlin_awq", "AwqMarlinLinear", False), ("marlin", "MarlinLinear", True)],
)
@pytest.mark.parametrize("rows", [1, 32])
def test_merged_layers_give_the_outputs_of_separate_ones(
    module: str, kind: str, symmetric: bool, rows: int
) -> None:
    pytest.importorskip("gptqmodel")
    kernels = importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}")
    layout = Layout(getattr(kernels, kind), {"desc_act": False, "sym": symmetric}, {})
    torch.manual_seed(0)
    layers = [marlin_layer([torch.nn.Linear(2048, width)], layout, GROUP_SIZE) for width in (2048, 256, 256)]
    for layer in layers:
        fill_at_random(layer)
    merged = merged_layer(layers, layout)
    x = torch.randn(rows, 2048, dtype=torch.float16, device="cuda:0")
    for layer in (*layers, merged):
        layer.post_init()
    separate = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(merged(x), separate, rtol=0.01, atol=0.01 * separate.abs().max().item())
