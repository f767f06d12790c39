"""Example plugin: a shop, registered when this module is imported by its entry point."""

from reopold_agent.envs import register_env

register_env(
    "shop",
    id="reopold_shop/Shop-v0",
    # As text, so that listing environments does not import what this one needs.
    entry_point="reopold_shop.env:ShopEnv",
    # Settings of the run: searching, looking at a few items, putting one into the cart, buying.
    config={
        "rollout": {"max_turns": 8, "max_response_tokens": 640},
        "evaluation": {"max_turns": 8},
    },
)
