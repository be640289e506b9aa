"""Train on your own images, a folder for each class, with the influence-balanced loss or without.

    python folder_train.py --data_dir DIR --val_fraction 0.1 -a resnet18 --pretrained imagenet --lr 0.01 \\
        --epochs 20 --milestones 12 17 --lr_factors 0.1 0.1
    python folder_train.py --data_dir DIR --val_fraction 0.1 --loss_type IB --train_rule IBReweight --start_ib_epoch 100
    python folder_train.py --data_dir ROOT --train_list train.txt --val_list val.txt
    python folder_train.py --data_dir DIR --resume checkpoint/NAME/ckpt.best.pth.tar -e

DIR holds train/<class>/* and val/<class>/* (or test/), as torchvision's ImageFolder reads them; without val/,
--val_fraction holds out two parts of train/, one to choose the best epoch and one to test on. Lists have lines
'path label'. The imbalance is the one that the data have, unless --imb_type makes another. -a is any of torchvision's
classifiers that end in a linear layer. Logs and figures go to log/<name>, checkpoints to checkpoint/<name>. `--dry_run`
prints the recipe.
"""

import dataclasses

import torch

import imbalance_folder
import models
from experiment import data
from experiment.checks import check_last_batch
from experiment.evaluation import evaluate_checkpoint
from experiment.parser import parse
from experiment.predict import predict
from experiment.run import open_run
from loaders.image_folder import ImageFileBatches
from training.cuda_graph import step_graph
from training.ema import Ema
from training.gradients import match_gradient
from training.loop import evaluate, train_one_epoch
from training.mixup import Mixup
from training.optimizer import make_optimizer
from training.precision import Precision, on_device
from training.recipe import Recipe
from training.stages import Stages
from utils import command


@command
def main(argv=None):
    settings = parse("folder_train.py", argv, __doc__)
    recipe = Recipe(settings)
    models.check_image_size(settings.arch, settings.image_size)
    if settings.dry_run:
        return print(recipe.table())

    if not settings.evaluate:  # the test part follows from the folders, and belongs to the settings
        share = imbalance_folder.share_to_test(
            settings.data_dir, settings.val_fraction, settings.test_fraction, settings.train_list, settings.val_list
        )
        settings = dataclasses.replace(settings, test_fraction=share)
    with open_run(settings) as run:  # device, ranks, folders, lock, seed, where the run starts
        settings = run.settings
        if settings.predict:
            return predict(run)

        # data, read from files while training
        long_tailed, test_set = imbalance_folder.load(
            settings.data_dir, settings.imb_type, settings.imb_factor, settings.rand_number, settings.test_fraction,
            train_list=settings.train_list, val_list=settings.val_list, check_images=settings.check_images,
            workers=settings.workers, skip_damaged=settings.skip_damaged, exif=settings.exif, mean=settings.mean,
            std=settings.std, classes=run.start.checkpoint.get("classes") if settings.evaluate else None,
        )  # fmt: skip
        train_set, val_set = data.split_validation(long_tailed, settings)
        run.use_data(data.describe(long_tailed, train_set, test_set))  # refused if it is not the checkpoint's
        loading = {**run.loading, "image_size": settings.image_size, "workers": settings.workers}
        test_batches = ImageFileBatches(test_set, **loading)
        val_batches = ImageFileBatches(val_set, **loading) if val_set else None

        # model
        torch.manual_seed(run.seed)
        model = models.torchvision_model(settings.arch, train_set.num_classes, settings.use_norm, settings.feature_norm)
        model = on_device(model, run.device, settings.batch_norm)
        ema = Ema(model, settings.ema) if settings.ema else None
        tested = ema.module if ema else model
        precision = Precision(settings.amp, run.device.type)
        if settings.evaluate:
            run.restore(model=model, ema=ema)
            return evaluate_checkpoint(run, tested, test_batches, val_batches, precision)

        # training batches, optimizer, loss, schedule
        train_batches = ImageFileBatches(train_set, augment=settings.augment, **loading)
        optimizer = make_optimizer(settings.optimizer, model, settings.lr, vars(settings))
        stages = Stages(recipe, model, optimizer, run.class_counts, run.seed, ema, settings.sync_bn, settings.compile)
        mixed = Mixup(train_batches, settings.mixup, train_set.num_classes, run.seed)
        graph = step_graph(run.device, settings.amp, settings.cuda_graph)
        check_last_batch(model, train_batches, settings.sync_bn)
        run.restore(model=model, optimizer=optimizer, criterion=stages, scaler=precision.scaler, ema=ema)

        for epoch in run.epochs():
            stage = recipe.stage(epoch)
            criterion, trained = stages.begin(epoch)  # with its lr; cRT: a new head
            rates = recipe.image_rates(stage, run.class_counts, train_batches.targets)
            gradient = None
            if criterion.needs_alpha:  # --alpha auto, before its first epoch
                gradient = match_gradient(stages.part, mixed.train_epoch(epoch, rates), criterion, precision)
            train = train_one_epoch(
                trained, mixed.train_epoch(epoch, rates), criterion, optimizer, train_set.num_classes, precision,
                run.on_batch(len(train_batches), stage.lr), graph, after_step=ema.update if ema else None,
            )  # fmt: skip
            test = evaluate(tested, test_batches.eval_epoch(), run.class_counts, precision)
            val = evaluate(tested, val_batches.eval_epoch(), run.class_counts, precision) if val_batches else None
            run.save(stage, train, test, val, criterion, gradient)
        run.report(tested, test_batches, precision)


if __name__ == "__main__":
    main()
