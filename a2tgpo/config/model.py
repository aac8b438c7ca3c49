"""The model to train, and its number formats."""

from dataclasses import dataclass, field
from typing import Literal

from a2tgpo.config.expand import Expanded
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.io.errors import require

Dtype = Literal["bfloat16", "float32"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy (and the reference, which starts from the same weights)."""

    path: Expanded
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer.json."""
    dtype: Dtype = "bfloat16"
    """Number format of weights and activations in training. Transformer Engine refuses float32, so on GPUs it needs
    layer_spec=cpu. Optimizer state is float32."""
    layer_spec: Literal["auto", "cpu", "transformer_engine"] = "auto"
    """Implementation of the layers; auto: Transformer Engine if there is a GPU, else its CPU twin."""
    recompute: Recompute = "none"
    """Activations to recompute in the backward pass: none, core attention (selective), or every layer (full)."""
    fp8: Fp8Config = field(default_factory=Fp8Config)

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
