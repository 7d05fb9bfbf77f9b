"""The decode mode `compile`: a static step whose layers are compiled, then recorded.

Importing this module looks up every private part of torch that the mode needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from schemas.frames import SetUp
from workers.generation.compilation import CompiledStep, compiler, forget_compiled
from workers.generation.opaque_linears import opaque_linears
from workers.generation.prompts import Batch
from workers.generation.repeated_layers import repeated_layers
from workers.generation.steppers import StaticStepper
from workers.protocol.backend import LoadedModel


@contextmanager
def compiled(stepper: StaticStepper, loaded: LoadedModel, batch: Batch) -> Iterator[SetUp]:
    """Compile and record `stepper`'s step for batches of this shape; usable within the context."""
    device = stepper.device
    compile_function = compiler(device, gemv=batch.ids.shape[0] <= loaded.max_gemv_batch)
    # Layers with other attention may share keys and values, so they are compiled as part of the step.
    separate = repeated_layers(loaded.model, compile_function) if stepper.state.grouped else nullcontext()
    with opaque_linears(loaded.model, loaded.opaque), separate as learn:
        compile_step = partial(CompiledStep, device=device, compile_function=compile_function)
        try:
            yield stepper.record(batch, learn, compile_step)
        finally:
            forget_compiled()
