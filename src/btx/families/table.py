"""The families: one entry each. To add one, add an entry; the tests of tests/test_families.py then cover it."""

from __future__ import annotations

from btx.families import configs
from btx.families.family import Config, Family

LAYER = "model.layers.{layer}."
PLAIN_FF = {role: f"{LAYER}mlp.{role}_proj.weight" for role in ("gate", "up", "down")}
MIXTRAL_EXPERTS = {
    f"{LAYER}block_sparse_moe.experts.{{expert}}.{name}.weight": (role,)
    for name, role in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
}
MIXTRAL_ROUTER = f"{LAYER}block_sparse_moe.gate.weight"


def _refuse_llama(dense: Config) -> str | None:
    if dense.get("attention_bias"):
        return "attention_bias: Mixtral's attention has no biases"
    if dense.get("mlp_bias"):
        return "mlp_bias: Mixtral's experts have no biases"
    return None


FAMILIES: tuple[Family, ...] = (
    Family(
        dense="llama",
        moe="mixtral",
        feed_forward=PLAIN_FF,
        experts=MIXTRAL_EXPERTS,
        router=MIXTRAL_ROUTER,
        moe_config=configs.mixtral,
        refuse=_refuse_llama,
    ),
)
