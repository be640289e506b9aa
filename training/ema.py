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
        super().__init__(model)
        self.requires_grad_(False)
        self.decay = decay
        self._source = (model,)  # a tuple, so that it is not a submodule

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's current weights to the average.

        Not by `update_parameters`, which waits for a GPU to read the count.
        """
        is_first = self.n_averaged == 0  # on the CPU
        floats, others = ([], []), ([], [])
        tensors = ([*module.parameters(), *module.buffers()] for module in (self.module, self._source[0]))
        for average, current in zip(*tensors, strict=True):
            mine, theirs = floats if average.is_floating_point() and not is_first else others  # batch norm's counters
            mine.append(average)
            theirs.append(current)
        if floats[0]:
            torch._foreach_lerp_(*floats, 1 - self.decay)
        if others[0]:
            torch._foreach_copy_(*others)
        self.n_averaged += 1

    def restart(self) -> None:
        """Forget the average: the next update copies the model."""
        self.n_averaged.zero_()
