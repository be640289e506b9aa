"""Train on your own images, a folder for each class, with the influence-balanced loss or without.

    python folder_train.py --data_dir DIR -a resnet50 --loss_type IB --train_rule IBReweight --start_ib_epoch 100
    python folder_train.py --data_dir DIR --val_fraction 0.1 -a mobilenet_v3_small --pretrained imagenet
    python folder_train.py --data_dir ROOT --train_list train.txt --val_list val.txt
    python folder_train.py --data_dir DIR --resume checkpoint/NAME/ckpt.best.pth.tar -e

DIR holds train/<class>/* and val/<class>/* (or test/), as torchvision's ImageFolder reads them; without val/,
--val_fraction holds out two parts of train/, one to choose the best epoch and one to test on. Lists have lines
'path label'. The imbalance is the one that the data have, unless --imb_type makes another. Any of torchvision's
classifiers (-a). Logs and figures go to log/<name>, checkpoints to checkpoint/<name>. `--dry_run` prints the recipe.
"""

import dataclasses
import functools

import torch

import imbalance_folder
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
    settings = parse("folder_train.py", argv, __doc__)
    recipe = Recipe.from_settings(settings)
    models.check_image_size(settings.arch, settings.image_size)
    if settings.dry_run:
        return print(recipe.table())

    if not settings.evaluate:
        share = imbalance_folder.share_to_test(
            settings.data_dir, settings.val_fraction, settings.test_fraction, settings.train_list, settings.val_list
        )
        settings = dataclasses.replace(settings, test_fraction=share)
    with open_run(settings) as run:  # device, ranks, folders, lock, seed, where the run starts
        settings = run.settings

        # data, read from files while training
        train_set, test_set = imbalance_folder.load(
            settings.data_dir, settings.imb_type, settings.imb_factor, settings.rand_number, settings.test_fraction,
            settings.train_list, settings.val_list, settings.check_images, settings.workers, settings.skip_damaged,
            settings.exif, settings.mean, settings.std, run.start.classes if settings.evaluate else None,
        )  # fmt: skip
        if not train_set.targets:  # -e on test images of their own: nothing is held out of them
            run.settings = dataclasses.replace(settings, val_fraction=0.0, test_fraction=0.0)
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
