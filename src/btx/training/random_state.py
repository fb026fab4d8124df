"""Random numbers of a step, the same on any number of processes.

A step's numbers (dropout, Sample Top-1's noise) are drawn from torch's generators, seeded from (rng_seed, step) and
nothing else, by one micro-batch after the other. A process that computes the later micro-batches alone leaves out what
those before them draw: as many numbers each, for they have the same shape.
"""

from __future__ import annotations

import torch

BLOCK = 624
"""Numbers that the CPU's generator makes at once (Mersenne Twister, Matsumoto and Nishimura 1998)."""
FIRST, LAST = 24, 24 + 8 * BLOCK
"""Where such a block lies in the bytes of `torch.get_rng_state()`; before it, the place of the next number in it."""

ROOM = 1 << 20
"""Numbers that are drawn into memory at a time."""


def seed_step(rng_seed: int, step: int, device: torch.device) -> None:
    """Seed the generators that computing on `device` draws from, for a step: resuming needs no saved generator."""
    seed = (rng_seed << 32) + step
    if device.type == "cpu":  # torch.manual_seed also notes a stack trace for each kind of GPU that is not in use
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def numbers_drawn(device: torch.device) -> tuple[int, int]:
    """How many numbers the CPU's generator has given since it was seeded, and by how much the one of `device`, if that
    is a GPU, has moved."""
    again = torch.Generator().manual_seed(torch.initial_seed())
    now, drawn = torch.get_rng_state(), 0
    while not torch.equal(_block(now), _block(again.get_state())):
        _draw(BLOCK if drawn else 1, again)
        drawn += BLOCK
    place, start = (int(state[16:FIRST].view(torch.int64)) for state in (now, again.get_state()))
    on_device = torch.cuda.default_generators[torch.cuda.current_device()].get_offset() if device.type == "cuda" else 0
    return (max(0, drawn - BLOCK + 1) + place - start if drawn else 0), on_device


def leave_out(times: int, numbers: tuple[int, int]) -> None:
    """Move the generators on as if what has given `numbers_drawn` had been done so many times more."""
    on_cpu, on_device = numbers
    _draw(times * on_cpu, None)
    if on_device:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.set_offset(generator.get_offset() + times * on_device)


def _block(state: torch.Tensor) -> torch.Tensor:
    return state[FIRST:LAST]


def _draw(count: int, generator: torch.Generator | None) -> None:
    """A number of 32 bits for each element."""
    room = torch.empty(min(count, ROOM), dtype=torch.int32)
    for start in range(0, count, ROOM):
        room[: count - start].random_(0, 2, generator=generator)
