"""What to say when a training runs out of memory: what takes it, and which settings save how much."""

from __future__ import annotations

from dataclasses import asdict

from btx.number_texts import bytes_text
from btx.system_errors import first_line
from btx.training.memory import MemoryNeeds


def memory_advice(error: BaseException, needs: MemoryNeeds) -> str:
    """What takes the memory of a training, and what makes it less, the largest saving first."""
    memory, less = needs.memory, needs.savings()
    parts = ", ".join(f"{part} {bytes_text(count)}" for part, count in asdict(memory).items() if count)
    savings = [f"{variant} saves about {bytes_text(saved)}" for variant, saved in less]
    if not any("micro_batch_tokens" in variant.changed for variant, _ in less):
        savings.append("micro_batch_tokens is one sequence already: a smaller data.sequence_length saves more")
    return (
        f"out of memory: {first_line(error)}. This training takes about {bytes_text(memory.peak)} ({parts}). "
        f"{'; '.join(savings)}; with a smaller launch.jobs fewer trainings share the memory"
    )
