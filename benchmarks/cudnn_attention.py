"""The cost of cuDNN's attention at each new length.

    python benchmarks/cudnn_attention.py

Prints tok/s of consecutive calls in one process on a GPU, through our loop and through `model.generate()`.

On an H100 with torch 2.11.0 and cuDNN's attention allowed, torch's default, our loop ran at 14.0, 52.3,
61.1 and 45.9 tok/s after a prompt of 64 tokens. `generate()` then ran at 33.5, 40.1 and 36.7, as those
lengths were cached, but after a prompt of 300 tokens at 12.0 and 28.1. With it off, as in our workers, the
loop ran at 56.6, 55.2, 54.5 and 45.3, and `generate()` at 46.5, 54.9 and 48.9 (commit dcef6bdbeb42; only
the printed figures were kept).
"""

import time

import torch

from workers.generation.device import CudaDevice
from workers.generation.prompts import Batch
from workers.generation.steppers import EagerStepper
from workers.generation.timed_generation import Limits, generate_stepwise
from workers.models.random_model import load_random_model, random_prompt_ids

NEW_TOKENS = 64

device = CudaDevice("cuda:0")
model = load_random_model("qwen2.5-0.5b", "cuda:0", torch.float16, seed=0)


def prompt(length: int) -> torch.Tensor:
    return torch.tensor([random_prompt_ids(1000, length, seed=0)])


def ours(ids: torch.Tensor) -> float:
    stepper = EagerStepper(model, NEW_TOKENS, device)
    with torch.inference_mode():
        generation = generate_stepwise(stepper, device, Batch(ids, None), Limits(NEW_TOKENS))
    return round((NEW_TOKENS - 1) / generation.decode_s, 1)


def theirs(ids: torch.Tensor) -> float:
    ids = ids.cuda()
    torch.cuda.synchronize()
    start_s = time.monotonic()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
    )
    torch.cuda.synchronize()
    return round(NEW_TOKENS / (time.monotonic() - start_s), 1)


for allowed in (True, False):
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    state = "allowed" if allowed else "off"
    print(f"cuDNN {state}: ours", [ours(prompt(64)) for _ in range(4)])
    print(f"cuDNN {state}: generate()", [theirs(prompt(64)) for _ in range(3)])
torch.backends.cuda.enable_cudnn_sdp(True)
print("cuDNN allowed, 300 tokens: generate()", [theirs(prompt(300)) for _ in range(2)])
