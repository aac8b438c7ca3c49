"""Which model is trained, and in which number formats."""

from dataclasses import dataclass, field

from a2tgpo.config.expand import Expanded
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.io.errors import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy (and the reference, which starts from the same weights)."""

    path: Expanded
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer.json."""
    dtype: str = "bfloat16"
    """Number format of weights and activations in training: bfloat16 | float32 (refused with Transformer Engine, so
    on GPUs only with layer_spec cpu). Optimizer state is float32."""
    layer_spec: str = "auto"
    """transformer_engine | cpu | auto (Transformer Engine where a GPU is seen, its CPU twin elsewhere)."""
    recompute: str = "none"
    """Activations recomputed in the backward pass: none | selective (core attention) | full (every layer)."""
    fp8: Fp8Config = field(default_factory=Fp8Config)

    def __post_init__(self) -> None:
        require(self.dtype in ("bfloat16", "float32"), "model.dtype", self.dtype, "bfloat16 | float32")
        require(
            self.layer_spec in ("auto", "cpu", "transformer_engine"),
            "model.layer_spec",
            self.layer_spec,
            "auto | cpu | transformer_engine",
        )
        require(
            self.recompute in ("none", "selective", "full"),
            "model.recompute",
            self.recompute,
            "none | selective | full",
        )
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
