"""What cuDNN's attention costs at lengths it has not met: `python results/cudnn_attention.py`, on a GPU.

Prints tok/s of consecutive calls in one process, through our loop and through `model.generate()`.
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
