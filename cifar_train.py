"""Train on long-tailed CIFAR-10, CIFAR-100 or handwritten digits, with the influence-balanced loss or without.

    python cifar_train.py --dataset digits -a resnet20 -b 32 --epochs 40 --start_ib_epoch 20 --milestones 32 36 \\
        --loss_type IB --train_rule IBReweight
    python cifar_train.py --dataset cifar100 --loss_type IB --train_rule IBReweight --start_ib_epoch 100
    python cifar_train.py --resume checkpoint/NAME/ckpt.best.pth.tar -e

The first needs no download and takes a minute or two on a CPU; the second is the paper's main setting; the third
evaluates a checkpoint. Logs and figures go to log/<name>, checkpoints to checkpoint/<name>. `--dry_run` prints the
recipe.
"""

import functools

import torch

import imbalance_cifar
import models
from experiment.evaluation import evaluate_checkpoint
from experiment.fit import fit
from experiment.parser import parse
from experiment.run import open_run
from loaders.in_memory import InMemoryBatches
from training import distributed
from training.optimizer import sgd
from training.recipe import Recipe
from utils import command


@command
def main(argv=None):
    settings = parse("cifar_train.py", argv, __doc__)
    recipe = Recipe.from_settings(settings)
    if settings.dry_run:
        return print(recipe.table())

    with open_run(settings) as run:  # device, ranks, folders, lock, seed, where the run starts
        settings = run.settings

        # data
        train_set, test_set = imbalance_cifar.load(
            settings.dataset, settings.data_dir, settings.imb_type, settings.imb_factor, settings.rand_number
        )
        train_set, val_set = run.use_data(train_set, test_set)
        batches = functools.partial(
            InMemoryBatches, batch_size=settings.batch_size, device=run.device, seed=run.seed, flip=settings.flips,
            rank=distributed.rank(), world_size=distributed.world_size(),
        )  # fmt: skip
        train_batches, test_batches = batches(train_set), batches(test_set)
        val_batches = batches(val_set) if val_set else None

        # model
        torch.manual_seed(run.seed)
        build = models.CIFAR_MODELS[settings.arch]
        model = build(train_set.num_classes, use_norm=settings.use_norm, feature_norm=settings.feature_norm)
        model = model.to(run.device).to(memory_format=torch.channels_last)
        if settings.evaluate:
            return evaluate_checkpoint(run, model, test_batches, val_batches)

        # optimizer, training
        optimizer = sgd(model, settings.lr, settings.momentum, settings.weight_decay)
        run.restore(model, optimizer)
        fit(run, model, optimizer, recipe, train_batches, test_batches, val_batches)


if __name__ == "__main__":
    main()
