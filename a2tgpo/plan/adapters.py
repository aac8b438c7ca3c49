"""Count the parameters and operations of low-rank adapters, and the parameters that a run trains and saves."""

from __future__ import annotations

from a2tgpo.config.lora import LoraConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.plan.dimensions import ModelDimensions
from a2tgpo.plan.parameters import Parameters, checkpoint_parameters, stage_parameters


def adapter_fault(lora: LoraConfig, dimensions: ModelDimensions) -> str | None:
    """Return one line that says why the model cannot have the adapters, or None if it can (model.lora)."""
    if lora.enabled and not lora.targets_of(has_experts=bool(dimensions.experts)):
        return (
            f"model.lora.targets is {list(lora.targets)}; allowed: also attention projections, since the model has "
            "its feed-forward projections in experts, which get no adapters"
        )
    return None


def projection_sizes(dimensions: ModelDimensions) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of each adaptable projection of a layer."""
    d = dimensions
    sizes = {
        "q_proj": (d.hidden, d.query_width),
        "k_proj": (d.hidden, d.kv_width),
        "v_proj": (d.hidden, d.kv_width),
        "o_proj": (d.query_width, d.hidden),
    }
    if not d.experts:
        sizes |= {
            "gate_proj": (d.hidden, d.ffn),
            "up_proj": (d.hidden, d.ffn),
            "down_proj": (d.ffn, d.hidden),
        }
    return sizes


def layer_adapters(lora: LoraConfig, dimensions: ModelDimensions, tensor: int) -> Parameters:
    """Return the parameters of one layer's adapters on a rank. There are none if `lora` is off."""
    if not lora.enabled:
        return Parameters(0, 0)
    sizes, split, replicated = projection_sizes(dimensions), 0, 0
    for name in lora.targets_of(has_experts=bool(dimensions.experts)):
        inputs, outputs = sizes[name]
        # If the tensor-parallel ranks split a layer's inputs, they split A but not B. If they split its outputs, they
        # split B but not A.
        is_row_parallel = name in ("o_proj", "down_proj")
        split += lora.rank * (inputs if is_row_parallel else outputs) // tensor
        replicated += lora.rank * (outputs if is_row_parallel else inputs)
    return Parameters(split, replicated)


def stage_adapters(config: RunConfig, dimensions: ModelDimensions, stage: int) -> Parameters:
    """Return the parameters of all adapters on a rank of pipeline stage `stage`."""
    layers = config.parallel.stage_layers(dimensions.layers)[stage]
    return layer_adapters(config.model.lora, dimensions, config.parallel.tensor) * layers


def trained_parameters(config: RunConfig, dimensions: ModelDimensions, stage: int) -> Parameters:
    """Return the parameters on a rank of pipeline stage `stage` that the optimizer updates."""
    if config.model.lora.enabled:
        return stage_adapters(config, dimensions, stage)
    return stage_parameters(dimensions, config.parallel, stage)


def saved_parameters(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Return the number of parameters that a run's checkpoint has in Megatron's format."""
    if config.model.lora.enabled:
        return all_adapters(config, dimensions)
    return checkpoint_parameters(dimensions)


def all_adapters(config: RunConfig, dimensions: ModelDimensions) -> int:
    """Return the number of parameters of all adapters in the model, each counted once; 0 if there are none."""
    return dimensions.layers * layer_adapters(config.model.lora, dimensions, 1).total


def adapter_flops(config: RunConfig, dimensions: ModelDimensions) -> float:
    """Return the operations of the adapters in one token's forward pass, over all layers."""
    return 2.0 * all_adapters(config, dimensions)
