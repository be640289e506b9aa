"""Train on iNaturalist 2018, whose long tail is natural, with the influence-balanced loss or without.

    python inat_train.py --data_dir data --loss_type IB --train_rule IBReweight
    torchrun --nproc_per_node 4 inat_train.py --data_dir data --loss_type IB --train_rule IBReweight
    python inat_train.py --data_dir data --resume checkpoint/NAME/ckpt.best.pth.tar -e

The data in their official layout (see imbalance_inat.py). The paper's recipe is the default: ResNet-50, 50 epochs of CE
and 150 of IB, lr 0.01, x 0.1 at 30 and 180, crops of 224. What the paper leaves unsaid is our choice, see
docs/datasets.md. Logs and figures go to log/<name>, checkpoints to checkpoint/<name>. `--dry_run` prints the recipe.
"""

import functools

import torch

import imbalance_inat
import models
from experiment.evaluation import evaluate_checkpoint
from experiment.fit import fit
from experiment.parser import parse
from experiment.run import open_run
from loaders.image_folder import ImageFileBatches
from training.optimizer import sgd
from training.recipe import Recipe
from utils import command


@command
def main(argv=None):
    settings = parse("inat_train.py", argv, __doc__)
    recipe = Recipe.from_settings(settings)
    models.check_image_size(settings.arch, settings.image_size)
    if settings.dry_run:
        return print(recipe.table())

    with open_run(settings) as run:  # device, ranks, folders, lock, seed, where the run starts
        settings = run.settings

        # data, read from files while training
        train_set, test_set = imbalance_inat.load(
            settings.data_dir, settings.imb_type, settings.imb_factor, settings.rand_number,
            settings.check_images, settings.workers, settings.skip_damaged,
        )  # fmt: skip
        train_set, val_set = run.use_data(train_set, test_set)
        batches = functools.partial(
            ImageFileBatches, image_size=settings.image_size, batch_size=settings.batch_size, device=run.device,
            seed=run.seed, flip=settings.flips, workers=settings.workers,
        )  # fmt: skip
        train_batches, test_batches = batches(train_set), batches(test_set)
        val_batches = batches(val_set) if val_set else None

        # model
        torch.manual_seed(run.seed)
        model = models.torchvision_model(
            settings.arch, train_set.num_classes, use_norm=settings.use_norm, feature_norm=settings.feature_norm
        )
        model = model.to(run.device).to(memory_format=torch.channels_last)
        if settings.evaluate:
            return evaluate_checkpoint(run, model, test_batches, val_batches)

        # optimizer, training
        optimizer = sgd(model, settings.lr, settings.momentum, settings.weight_decay)
        run.restore(model, optimizer)
        fit(run, model, optimizer, recipe, train_batches, test_batches, val_batches)


if __name__ == "__main__":
    main()
