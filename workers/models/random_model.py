"""Random weights in a published architecture: a model's speed and memory without downloading it.

Speed and memory of a precision depend only on shapes, so any GPU can be measured without access to a hub.
Random weights can't show quality; and since they have none of the outlier features of trained models, they
flatter LLM.int8, whose slow path handles outliers, unless some are planted.

Weights are drawn one at a time, on the device, when transformers' loader asks for them. So a 7B model that
loads as INT8 is never in memory as FP16, just as when it is read from safetensors.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from workers.models.planted_outliers import outlier_channels, plant_outliers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIGS_FOLDER = Path(__file__).parent / "configs"

SAFETENSORS_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class RandomTensor:
    """A tensor to be drawn later, with the part of a safetensors slice's interface that the loader uses.

    Its values depend only on `seed` and `name`, not on the order of loading or the loader's threads. A CPU
    and a GPU draw different values from the same seed.
    """

    name: str
    shape: tuple[int, ...]
    device: str
    dtype: "torch.dtype"
    seed: int
    std: float
    outliers: tuple[int, ...] = ()
    """Channels of the hidden state in which outlier features are planted."""

    def __getitem__(self, index: EllipsisType) -> "torch.Tensor":
        """Draw the whole tensor; `tensor[...]` is the only index the loader uses."""
        import torch

        weight = torch.empty(self.shape, device=self.device, dtype=self.dtype)
        if len(self.shape) > 1:
            weight.normal_(0.0, self.std, generator=self._generator())
        else:
            # A transformer's vectors are biases and norm scales. Neutral values, as before training, keep
            # activations within FP16's range.
            weight.fill_(0.0 if self.name.endswith("bias") else 1.0)
        plant_outliers(self.name, weight, self.outliers)
        return weight

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return SAFETENSORS_DTYPE[str(self.dtype).removeprefix("torch.")]

    def _generator(self) -> "torch.Generator":
        import torch

        digest = hashlib.blake2b(f"{self.seed}/{self.name}".encode(), digest_size=8).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest) >> 1)


def random_config(name: str) -> "PreTrainedConfig":
    """The published config of the architecture `random:NAME`, or the config file of `random:PATH.json`.

    Raises FileNotFoundError if there is none.
    """
    from transformers import AutoConfig

    path = Path(name) if name.endswith(".json") else CONFIGS_FOLDER / f"{name}.json"
    return AutoConfig.for_model(**json.loads(path.read_text()))


def random_state_dict(
    config: "PreTrainedConfig", device: str, dtype: "torch.dtype", seed: int, outliers: int = 0
) -> dict[str, RandomTensor]:
    """The weights of `config`'s causal language model by name, to be drawn later.

    `outliers` is the number of outlier features to plant; see `workers/models/planted_outliers.py`.

    A weight tied to another, such as the output head of a small model, is omitted: transformers ties it
    itself, and would warn about a checkpoint that has both.
    """
    import torch

    with torch.device("meta"):
        skeleton = _model_class(config)(config)
    channels = outlier_channels(outliers, config.hidden_size, seed)
    return {
        name: RandomTensor(name, tuple(weight.shape), device, dtype, seed, config.initializer_range, channels)
        for name, weight in skeleton.state_dict().items()
        if name not in skeleton.all_tied_weights_keys
    }


def load_random_model(
    name: str, device: str, dtype: "torch.dtype", seed: int, outliers: int = 0, **options: Any
) -> "PreTrainedModel":
    """The model `random:NAME` on `device`, in eval mode; see `build_random_model`."""
    return build_random_model(random_config(name), device, dtype, seed, outliers, **options)


def build_random_model(
    config: "PreTrainedConfig",
    device: str,
    dtype: "torch.dtype",
    seed: int,
    outliers: int = 0,
    **options: Any,
) -> "PreTrainedModel":
    """A model of `config`'s architecture with random weights on `device`, in eval mode.

    `options` are passed to `from_pretrained`, e.g. `quantization_config`; weights are quantized one by one as
    they are drawn. Their values are the same for every precision loaded with the same `dtype`.
    """
    model: PreTrainedModel = _model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=random_state_dict(config, device, dtype, seed, outliers),
        dtype=dtype,
        device_map={"": device},
        **options,
    )
    return model


def random_prompt_ids(vocab_size: int, length: int, seed: int) -> list[int]:
    """`length` token ids below `vocab_size`, a prompt for a model without a tokenizer."""
    return random.Random(seed).choices(range(vocab_size), k=length)


def _model_class(config: "PreTrainedConfig") -> Any:
    # A concrete class, because the Auto classes need a name or a folder to load from.
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
