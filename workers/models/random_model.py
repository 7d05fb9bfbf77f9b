"""Random weights in a published architecture: speed and memory of a model that nobody had to download.

How fast a precision runs and how much it holds depends on the shapes alone, so any GPU can be measured
without a hub. What random weights can't show is quality; and since they have none of the outlier features
that trained models grow, they flatter LLM.int8, whose slow path handles outliers, unless some are planted.

Weights are drawn one at a time, on the device, when the loader of transformers asks for them. A 7B model
that loads as INT8 therefore never stands in memory as FP16, just as when it is read from safetensors.
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
    """A tensor yet to be drawn, with as much of a safetensors slice's face as the loader looks at.

    Its values follow from `seed` and `name` alone, so that neither the order of loading nor the loader's
    threads can change them. A CPU and a GPU draw different values from the same seed.
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
            # The vectors of a transformer are biases and the scales of its norms: left neutral, as at the
            # start of a training, they keep activations in a range that FP16 can hold.
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
    """The published config of the architecture `random:NAME`, or that of a file, `random:PATH.json`.

    Raises FileNotFoundError where there is none.
    """
    from transformers import AutoConfig

    path = Path(name) if name.endswith(".json") else CONFIGS_FOLDER / f"{name}.json"
    return AutoConfig.for_model(**json.loads(path.read_text()))


def random_state_dict(
    config: "PreTrainedConfig", device: str, dtype: "torch.dtype", seed: int, outliers: int = 0
) -> dict[str, RandomTensor]:
    """Name → tensor to be drawn, for every weight of `config`'s causal language model.

    `outliers` is the number of outlier features to plant; see `workers/models/planted_outliers.py`.

    A weight that is tied to another, like the output head of a small model, is left out: transformers
    ties it by itself, and would warn of a checkpoint that holds both.
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

    `options` go to `from_pretrained`, e.g. `quantization_config`; weights are quantized one by one as
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
    """`length` token ids below `vocab_size`: the prompt of a model that has no tokenizer."""
    return random.Random(seed).choices(range(vocab_size), k=length)


def _model_class(config: "PreTrainedConfig") -> Any:
    # A concrete class, because the Auto classes want a name or a folder to load from.
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
