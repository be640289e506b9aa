"""Recipes of the published settings, but for what a test changes."""

import types

from training.recipe import Recipe

CONSTANTS = {
    "alpha": 7.0, "epsilon": 1e-2, "ib_norm": "l2", "detach_ib": True, "auto_target": "gradient", "auto_ratio": 3.0,
    "gamma": 2.0, "focal_scale": 3.0, "max_m": 0.4, "s": 20.0, "la_tau": 0.9, "vs_gamma": 0.1, "vs_tau": 0.6,
    "beta": 0.99,
}  # fmt: skip
#: As published, CIFAR.
PUBLISHED = {
    "loss_type": "CE", "train_rule": "None", "epochs": 200, "lr": 0.1, "start_ib_epoch": 100, "warmup_epochs": 5,
    "milestones": (160, 180), "lr_factors": (0.01, 0.01), "ib_lr_factor": 0.01, "keep_warmup": False, "drw_epoch": 160,
    "schedule": "step",
}  # fmt: skip


def recipe(loss_type="CE", train_rule="None", constants=CONSTANTS, **fields):
    own = {"loss_type": loss_type, "train_rule": train_rule, **fields}
    return Recipe(types.SimpleNamespace(**{**PUBLISHED, **constants, **own}))
