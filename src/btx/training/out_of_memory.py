"""What to say when a training runs out of memory: what takes it, and which setting saves how much."""

from __future__ import annotations

from btx.models.cost import ModelCost
from btx.recipe.training import Training
from btx.system_errors import first_line


def memory_advice(error: BaseException, settings: Training, sequence_length: int, cost: ModelCost) -> str:
    """What takes the memory of a training, and what makes it less."""

    def size(count: float) -> str:
        return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

    tokens, checkpointed = max(settings.micro_batch_tokens, sequence_length), settings.gradient_checkpointing
    activations = cost.activation_bytes(tokens, checkpointed=checkpointed)
    half = size(activations - cost.activation_bytes(tokens // 2, checkpointed=checkpointed))
    micro = f"micro_batch_tokens: {tokens // 2} (now {settings.micro_batch_tokens}) saves about {half}"
    if tokens // 2 < sequence_length:
        micro = f"micro_batch_tokens is one sequence already; half the data.sequence_length saves {half} or more"
    saved = size(activations - cost.activation_bytes(tokens, checkpointed=True))
    recompute = "" if checkpointed else f"; gradient_checkpointing: true saves about {saved}"
    return (
        f"out of memory: {first_line(error)}. Weights, gradients and AdamW's moments take "
        f"{size(cost.training_bytes())}, activations about {size(activations)}: {micro}{recompute}; with a "
        f"smaller launch.jobs fewer trainings share the memory"
    )
