"""The influence-balanced loss in a LightningModule: python -m examples.lightning_example

`alpha="auto"` measures the loss in its first 20 batches and gives it the size of the cross entropy that it replaces.
What it finds is a buffer of the criterion, so Lightning's checkpoints keep it.
"""

import logging
import warnings

import lightning
import torch
import torchvision

from examples.digits import class_mean, digits
from losses import CrossEntropyLoss, IBLoss, inverse_frequency_weights
from models import with_feature_norm


class Classifier(lightning.LightningModule):
    """Any classifier that ends in a linear layer, and the two phases.

    Args:
        model: returns logits. class_counts: K training-set counts. start_ib: the first epoch of the IB loss.
    """

    def __init__(self, model: torch.nn.Module, class_counts: list[int], start_ib: int, lr: float = 0.05) -> None:
        super().__init__()
        self.model = with_feature_norm(model)  # returns (logits, |h|)
        self.cross_entropy = CrossEntropyLoss()
        self.influence_balanced = IBLoss(inverse_frequency_weights(class_counts), alpha="auto")
        self.start_ib, self.lr = start_ib, lr

    def training_step(self, batch, batch_index):
        images, target = batch
        logits, features = self.model(images)
        criterion = self.influence_balanced if self.current_epoch >= self.start_ib else self.cross_entropy
        return criterion(logits, target, features)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[self.start_ib], gamma=0.1)
        return [optimizer], [schedule]


def main(epochs: int = 8, start_ib: int = 5) -> tuple[float, float]:
    """Train; (class mean in percent, the alpha that was found)."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(0)
    train, test, class_counts = digits()
    classifier = Classifier(torchvision.models.shufflenet_v2_x0_5(num_classes=10), class_counts, start_ib)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises more data workers, and more
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(classifier, train)
    classifier.eval()
    score = class_mean(lambda x: classifier.model(x)[0], test)
    alpha = float(classifier.influence_balanced.current_alpha)
    print(f"{epochs} epochs, IB from epoch {start_ib + 1} on: class mean {score:.1f}, alpha {alpha:.3g}")
    return score, alpha


if __name__ == "__main__":
    main()
