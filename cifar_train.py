"""Train on long-tailed CIFAR-10, CIFAR-100 or handwritten digits, with the influence-balanced loss or without.

    python cifar_train.py --dataset digits -a resnet20 -b 32 --epochs 40 --start_ib_epoch 20 --milestones 32 36 \\
        --loss_type IB --train_rule IBReweight
    python cifar_train.py --dataset cifar100 --loss_type IB --train_rule IBReweight --start_ib_epoch 100
    python cifar_train.py --resume checkpoint/NAME/ckpt.best.pth.tar -e

The first needs no download and takes some minutes on a CPU; the second is the paper's main setting; the third
evaluates a checkpoint. Logs and figures go to log/<name>, checkpoints to checkpoint/<name>. `--dry_run` prints the
recipe.
"""

import torch

import imbalance_cifar
import models
from experiment import data
from experiment.checks import check_last_batch
from experiment.evaluation import evaluate_checkpoint
from experiment.parser import parse
from experiment.predict import predict
from experiment.run import open_run
from loaders.in_memory import InMemoryBatches
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
    settings = parse("cifar_train.py", argv, __doc__)
    recipe = Recipe(settings)
    if settings.dry_run:
        return print(recipe.table())

    with open_run(settings) as run:  # device, ranks, folders, lock, seed, where the run starts
        settings = run.settings
        if settings.predict:
            return predict(run)

        # data
        long_tailed, test_set = imbalance_cifar.load(
            settings.dataset, settings.data_dir, settings.imb_type, settings.imb_factor, settings.rand_number
        )
        train_set, val_set = data.split_validation(long_tailed, settings)
        run.use_data(data.describe(long_tailed, train_set, test_set))  # refused if it is not the checkpoint's
        test_batches = InMemoryBatches(test_set, **run.loading)
        val_batches = InMemoryBatches(val_set, **run.loading) if val_set else None

        # model
        torch.manual_seed(run.seed)
        build = models.CIFAR_MODELS[settings.arch]
        model: torch.nn.Module = build(train_set.num_classes, settings.use_norm, settings.feature_norm)
        model = on_device(model, run.device, settings.batch_norm)
        ema = Ema(model, settings.ema) if settings.ema else None
        tested = ema.module if ema else model
        precision = Precision(settings.amp, run.device.type)
        if settings.evaluate:
            run.restore(model=model, ema=ema)
            return evaluate_checkpoint(run, tested, test_batches, val_batches, precision)

        # training batches, optimizer, loss, schedule
        train_batches = InMemoryBatches(train_set, augment=settings.augment, **run.loading)
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
