"""The MoE layer: routers, dispatch, balancing."""
