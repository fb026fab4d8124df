"""What a device could compute at most, and what share of it a training reaches: MFU, model FLOPs utilisation.

MFU (PaLM, arXiv 2204.02311, appendix B) is tokens a second times the model's FLOPs a token over the peak of all
devices. The FLOPs are those of `btx.models.cost` with half of the attention: 6·N + 6·L·H·Q·S for N multiplied
parameters of which all train, 4·N + 2·M + 6·L·H·Q·S where M do; a causal mask leaves half of the products of a row of S
tokens. What documents of a packed row, recomputation and the optimiser need is not counted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from btx.models.cost import ModelCost

PEAK_TFLOPS: dict[str, tuple[float | None, float]] = {
    "H100 PCIe": (756, 51), "H100 NVL": (835, 60), "H100": (989, 67), "GH200": (989, 67),
    "H200 NVL": (835, 60), "H200": (989, 67), "B200": (2250, 75), "GB200": (2500, 80),
    "A100": (312, 19.5), "A30": (165, 10.3), "A10": (125, 31.2), "A40": (150, 37.4), "RTX A6000": (155, 38.7),
    "L4": (121, 30.3), "L40": (181, 90.5), "L40S": (362, 91.6),
    "RTX 3090": (71, 35.6), "RTX 4090": (165, 82.6), "RTX 5090": (209.5, 104.8),
    "V100-SXM2": (None, 15.7), "V100-PCIE": (None, 14.0), "T4": (None, 8.1),
}  # fmt: skip
"""GPU, as torch names it → dense TFLOP/s in bfloat16 with sums in float32 (None: no units) and in float32; the first
name that fits counts. From NVIDIA's data sheets, halved where they count sparsity; of GeForce from the whitepapers of
GA102, AD102 and GB202."""
OTHER_CHIPS = re.compile(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b", re.IGNORECASE)
"""In the name of a device that is another one than that whose name it begins with, or a part of it."""


def peak_flops(name: str, *, bfloat16: bool) -> float | None:
    """Dense FLOP/s of a device by its name; None: not known."""
    if OTHER_CHIPS.search(name):
        return None
    for gpu, (in_bfloat16, in_float32) in PEAK_TFLOPS.items():
        if re.search(rf"\b{gpu}\b", name):
            tflops = in_bfloat16 if bfloat16 else in_float32
            return None if tflops is None else tflops * 1e12
    return None


def peak_tokens_per_s(
    cost: ModelCost, sequence_length: int, device: torch.device, *, bfloat16: bool, processes: int = 1
) -> float | None:
    """Tokens a second that would be an MFU of 1; None where the peak of the device is not known, as on every CPU.

    Args:
        processes: that train the model, each on such a device.
    """
    import torch

    peak = peak_flops(torch.cuda.get_device_name(device), bfloat16=bfloat16) if device.type == "cuda" else None
    return None if peak is None else processes * peak / cost.training_flops_per_token(sequence_length / 2)


def mfu_fact(tokens: int, seconds: float, peak_tokens_per_s: float | None) -> dict[str, float]:
    """{"mfu": share of the peak}, nothing where that is not known."""
    return {} if peak_tokens_per_s is None else {"mfu": round(tokens / seconds / peak_tokens_per_s, 4)}
