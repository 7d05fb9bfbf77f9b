"""A fake GPU worker that follows a script of frames, without torch, and a parent that measures it.

The worker sends what a worker on a GPU would, and changes what the fake NVML reports meanwhile.
"""

import subprocess
import sys
from pathlib import Path

import msgspec
from fake_nvml import GPU_UUID, ONE_GPU, FakeNvml

from schemas.record import CellRecord

ROOT = Path(__file__).parents[1]

# The parent: measures one cell and prints its record. argv: interpreter, folder with `workers/`, run.
PARENT = f"""
import sys
from pathlib import Path
import msgspec
from rich.console import Console
from orchestrator.precisions.interpreter import Interpreter
from orchestrator.hardware.nvml import Nvml
from orchestrator.planning.plan import Cell
from orchestrator.precisions.catalog import Precision
from orchestrator.execution.cell_worker import CellWorker, RunContext
from orchestrator.execution.idle_gpu import IdleGpu
from orchestrator.execution.progress import Watcher
from orchestrator.records.store import RunFolder
sys.path.insert(0, {str(Path(__file__).parent)!r})
from sample_records import make_job

python, lent, run = sys.argv[1:]
Path(run, "logs").mkdir(parents=True)
precision = Precision(
    name="fp16", module="workers.fake", path=Path(lent) / "workers/fake.py", label="FP16",
    bits_per_weight=16, devices=["cuda"], requirements=[], summary="a fake worker",
)
cell = Cell(precision, Interpreter(python, own=True), make_job(device="cuda:0"), None)
watcher, folder = Watcher(Console(stderr=True), 1), RunFolder(Path(run))
with Nvml.open() as nvml:
    context = RunContext(folder, watcher, nvml, IdleGpu(None), Path(lent), timeout_s=30)
    with CellWorker(cell, context) as worker:
        record = worker.measure(cell)
print(msgspec.json.encode(record).decode())
assert "torch" not in sys.modules
"""

# The worker: no torch, but the frames of a CUDA worker, and `show`, which changes what the fake NVML reports.
WORKER = f"""
import json, os, sys, time
from pathlib import Path

MIB = 2**20
GPU = {ONE_GPU.replace("used 1000000", "")!r}

def show(used, process=None, more=""):
    state = Path(os.environ["FAKE_NVML_STATE"])
    draft = state.with_suffix(".worker-draft")
    line = "" if process is None else f"process {{os.getpid()}} {{process}}\\n"
    draft.write_text(f"{{GPU}}used {{used}}\\n{{line}}{{more}}")
    draft.replace(state)

def say(frame, **fields):
    sys.stdout.write(json.dumps({{"frame": frame, **fields}}) + "\\n")
    sys.stdout.flush()

def enter(name, allocated=None, reserved=None, peak=None, trial=None):
    torch = None
    if allocated is not None:
        torch = dict(
            requested_bytes=allocated, allocated_bytes=allocated, active_bytes=allocated,
            inactive_split_bytes=0, reserved_bytes=reserved, peak_allocated_bytes=peak or allocated,
            peak_reserved_bytes=reserved,
        )
    say("phase", name=name, at_ns=time.monotonic_ns(), trial=trial, torch=torch)
    sys.stdin.readline()

def ready():
    say("ready", pid=os.getpid(), at_ns=time.monotonic_ns(), python="3.12", versions={{"torch": "2"}},
        device="cuda:0", device_name="Fake H100 80GB", device_uuid={GPU_UUID!r})

def trial(index):
    say("trial", index=index, batch_size=1, prompt_tokens=8, new_tokens=3, prefill_s=0.1, decode_s=0.2,
        token_s=[0.1, 0.1], enqueue_s=0.1, token_ids=[1, 2, 3])

def done():
    say("done", at_ns=time.monotonic_ns(), trials_planned=1, trials_measured=1, sample_text=None)

job = json.loads(sys.stdin.readline())
time.sleep(0.3)  # instead of imports; the parent reads the idle GPU meanwhile
enter("start")
enter("context")
"""

FULL_RUN = """
show(600 * MIB, 512 * MIB)
ready()
enter("load", 0, 0)
show(9000 * MIB, 8900 * MIB)  # a short peak while loading
time.sleep(0.4)
show(1600 * MIB, 1500 * MIB)
enter("warmup", 900 * MIB, 1000 * MIB, peak=1200 * MIB)
show(1700 * MIB, 1600 * MIB)
enter("prefill", 910 * MIB, 1050 * MIB, trial=0)
enter("decode", 920 * MIB, 1050 * MIB, peak=1020 * MIB, trial=0)
trial(0)
enter("end", 915 * MIB, 1050 * MIB, peak=940 * MIB)
done()
"""


def run_fake_worker(fake: FakeNvml, folder: Path, script: str, python: str = sys.executable) -> CellRecord:
    """Run a worker with this `script` as one cell, in a parent that sees the fake GPU."""
    (folder / "workers").mkdir()
    (folder / "workers" / "__init__.py").touch()
    (folder / "workers" / "fake.py").write_text(WORKER + script)
    argv = [sys.executable, "-c", PARENT, python, str(folder), str(folder / "run")]
    done = subprocess.run(argv, cwd=ROOT, env=fake.env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + (folder / "run/logs/fp16.log").read_text()
    return msgspec.json.decode(done.stdout, type=CellRecord)
