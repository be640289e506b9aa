"""A small model with its optimizer, and criteria as the scripts build them, for steps without a script."""

import torch
from script_runner import tiny

from experiment.settings import Settings
from training.optimizer import sgd
from training.recipe import Recipe

LR = 0.1


def criterion_of(loss, alpha="auto"):
    """What a run with this loss and CB weights trains two classes of 3 and 1 images with."""
    settings = Settings(loss_type=loss, train_rule="CBReweight", start_ib_epoch=0, alpha=alpha)
    recipe = Recipe(settings)
    return recipe.criterion(recipe.stage(0), [3, 1])


def fresh(loss, alpha, device="cpu"):
    """A small model, its optimizer and criterion."""
    torch.manual_seed(0)
    model = tiny(2).to(device, memory_format=torch.channels_last)
    return model, sgd(model, LR, 0.9, 2e-4), criterion_of(loss, alpha).to(device)
