"""ResNets for 32 x 32 images (He et al., CVPR 2016, Section 4.2), with option-A shortcuts.

Every model returns `(logits, features)`: (N, K), and (N, 1) with the norm of the last layer's input. State-dict
keys and initial values are those of the official IB code.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import row_norm


class NormedLinear(nn.Module):
    """Cosines of the input with each class's weight vector, without bias: LDAM's head (Cao et al., NeurIPS 2019).

    Input (N, in_features), output (N, out_features) in [-1, 1]. `weight` is (in_features, out_features), one column per
    class, unlike nn.Linear's.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        with torch.no_grad():
            self.weight.uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5)  # columns of length 1

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut that subsamples and pads with zero channels (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        # in place: batch norm's backward needs its input, not its output
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu_(out.add_(self._shortcut(x)))

    def _shortcut(self, x):
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, self.stride)  # x[:, :, ::2, ::2], with a gradient that stays channels-last
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class ResNet_s(nn.Module):  # noqa: N801 (the published name)
    """Three stages of `blocks` blocks with 16, 32 and 64 channels, and a linear head.

    Args:
        blocks: blocks of each stage, three ints.
        num_classes: K.
        use_norm: a normalised head (`NormedLinear`), for LDAM.
        feature_norm: 'l1', 'l2' or 'linf', the norm that `features` carries.
    """

    head_name = "linear"

    def __init__(
        self, blocks: Sequence[int], num_classes: int = 10, use_norm: bool = False, feature_norm: str = "l1"
    ) -> None:
        super().__init__()
        self.feature_norm = feature_norm
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks[0], 1)
        self.layer2 = self._stage(16, 32, blocks[1], 2)
        self.layer3 = self._stage(32, 64, blocks[2], 2)
        self.linear = NormedLinear(64, num_classes) if use_norm else nn.Linear(64, num_classes)
        self.apply(_kaiming_init)

    @staticmethod
    def _stage(in_channels, channels, blocks, stride):
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *[BasicBlock(channels, channels, 1) for _ in range(blocks - 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (N, K), norm (N, 1) of the last layer's input) of images (N, 3, H, W)."""
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        hidden = out.mean((2, 3))
        return self.linear(hidden), row_norm(hidden, self.feature_norm)[:, None]


def _kaiming_init(module):
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)


#: ResNets for 32 x 32 images by name; arguments as `ResNet_s` from `num_classes` on.
CIFAR_MODELS = {f"resnet{n}": functools.partial(ResNet_s, [(n - 2) // 6] * 3) for n in (20, 32, 44, 56, 110, 1202)}
resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202 = CIFAR_MODELS.values()
