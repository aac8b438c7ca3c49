"""Settings of the model to train."""

from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.config.expand import Expanded
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.lora import LoraConfig
from a2tgpo.io.errors import require

Dtype = Literal["bfloat16", "float32"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model with which training begins. The reference model is a copy of it."""

    path: Expanded
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors and tokenizer.json."""
    dtype: Dtype = "bfloat16"
    """Number format of weights and activations in training; optimizer state is always float32. On GPUs, float32 needs
    layer_spec=cpu, because Transformer Engine refuses float32."""
    layer_spec: Literal["auto", "cpu", "transformer_engine"] = "auto"
    """Implementation of the layers. `cpu` computes the same layers without Transformer Engine. `auto`:
    `transformer_engine` if the machine has a GPU, otherwise `cpu`."""
    recompute: Recompute = "none"
    """Activations that are not stored, but computed again in the backward pass. `selective`: the activations of core
    attention. `full`: the activations of every layer."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(
            not self.fp8.enabled or self.dtype == "bfloat16",
            "model.fp8.format",
            self.fp8.format,
            f"none with model.dtype {self.dtype}; FP8 needs bfloat16 around it",
        )
        require(
            not self.fp8.enabled or self.layer_spec != "cpu",
            "model.fp8.format",
            self.fp8.format,
            "none with model.layer_spec cpu; FP8 is Transformer Engine's",
        )
        require(
            not self.fp8.enabled or not self.lora.enabled,
            "model.lora.rank",
            self.lora.rank,
            f"0 with model.fp8.format {self.fp8.format}; adapters need model.fp8.format none",
        )
