"""An exponential moving average of a model's weights, which is tested in the model's place."""

import torch
from torch.optim.swa_utils import AveragedModel


class Ema(AveragedModel):
    """After each step every weight and batch norm statistic becomes decay * average + (1 - decay) * the model's.

    The first update copies the model. It is called as the model is, and its state is saved beside the model's.

    Args:
        decay: in (0, 1); 0.999 averages about 1000 steps.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        def average(averages, current, _):
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, current, 1 - decay)
            else:  # batch norm's counters
                torch._foreach_copy_(averages, current)

        super().__init__(model, multi_avg_fn=average, use_buffers=True)
        self.requires_grad_(False)
        self._source = (model,)  # a tuple, so that it is not a submodule

    def update(self) -> None:
        """Add the model's current weights to the average."""
        self.update_parameters(self._source[0])

    def restart(self) -> None:
        """Forget the average: the next update copies the model."""
        self.n_averaged.zero_()
