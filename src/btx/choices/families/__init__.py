"""Which dense class becomes which MoE class. Plain Python, no torch; one entry a family, all in `table.py`."""

from btx.choices.families.context import context_length, refuse_longer_sequences
from btx.choices.families.family import Config, Family
from btx.choices.families.lookup import family_of, family_table, moe_family_of
from btx.choices.families.table import FAMILIES

__all__ = [
    "FAMILIES", "Config", "Family", "context_length", "family_of", "family_table", "moe_family_of",
    "refuse_longer_sequences",
]  # fmt: skip
