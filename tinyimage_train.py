"""Train on long-tailed Tiny ImageNet, with the influence-balanced loss or without.

    python tinyimage_train.py --loss_type IB --train_rule IBReweight --start_ib_epoch 50
    python tinyimage_train.py --imb_factor 0.1 --image_size 32 --pretrained none --epochs 3 --loss_type CE
    python tinyimage_train.py --recipe ldam --loss_type LDAM --train_rule DRW --dry_run

The first is the paper's main setting (ImageNet's weights, 224 x 224, 100 epochs); the second is a small one for a
CPU; the third prints the LDAM paper's recipe. The data are data/tiny-imagenet-200.zip or the folder in it, put in
order by the first run; they are downloaded (248 MB) where there are none. Logs and figures go to log/<name>,
checkpoints to checkpoint/<name>.
"""

from typing import Any

import torch

import imbalance_tinyimagenet
import models
from experiment.evaluation import evaluate_checkpoint
from experiment.fit import fit
from experiment.parser import parse
from experiment.run import open_run
from loaders.image_folder import ImageFileBatches, decode
from loaders.in_memory import InMemoryBatches
from training import distributed
from training.optimizer import sgd
from training.recipe import Recipe
from utils import command


@command
def main(argv=None):
    settings = parse("tinyimage_train.py", argv, __doc__)
    recipe = Recipe.from_settings(settings)
    if settings.dry_run:
        return print(recipe.table())

    with open_run(settings) as run:  # device, ranks, folders, lock, seed, where the run starts
        settings = run.settings

        # data, decoded into memory
        train_set, test_set = imbalance_tinyimagenet.load(
            settings.data_dir, settings.imb_type, settings.imb_factor, settings.rand_number
        )
        train_set, val_set = run.use_data(train_set, test_set)

        def batches(images):
            how: dict[str, Any] = {
                "batch_size": settings.batch_size, "device": run.device, "seed": run.seed, "flip": settings.flips,
                "rank": distributed.rank(), "world_size": distributed.world_size(),
            }  # fmt: skip
            is_padded, size = settings.crop == "padded", settings.image_size
            paths = [path for path, _ in images.samples]
            images.data = decode(paths, size if is_padded else images.image_size, settings.workers)
            if is_padded:
                return InMemoryBatches(images, padding=size // 8, **how)
            return ImageFileBatches(images, image_size=size, workers=settings.workers, **how)

        train_batches, test_batches = batches(train_set), batches(test_set)
        val_batches = batches(val_set) if val_set else None

        # model
        torch.manual_seed(run.seed)
        build = models.IMAGENET_MODELS[settings.arch]
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
