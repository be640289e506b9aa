"""Recipes of the default settings, but for constants that are none and what a test changes."""

from experiment.settings import Settings
from training.recipe import Recipe

CONSTANTS = {
    "alpha": 7.0, "epsilon": 1e-2, "ib_norm": "l2", "detach_ib": True, "auto_target": "gradient", "auto_ratio": 3.0,
    "gamma": 2.0, "focal_scale": 3.0, "max_m": 0.4, "s": 20.0, "la_tau": 0.9, "vs_gamma": 0.1, "vs_tau": 0.6,
    "beta": 0.99,
}  # fmt: skip


def recipe(loss_type="CE", train_rule="None", **fields):
    return Recipe(Settings(loss_type=loss_type, train_rule=train_rule, **{**CONSTANTS, **fields}))
