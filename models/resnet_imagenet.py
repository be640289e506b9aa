"""torchvision's ResNets, made to return `(logits, features)`; state-dict keys unchanged."""

import contextlib
import http.client
import pickle
import socket
import sys
from collections.abc import Callable

import torchvision
from torch import Tensor, nn

from models.torchvision_models import torchvision_model
from utils import DataError, warn

WEIGHTS = "IMAGENET1K_V1"


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """The state dict of torchvision's model `name`, trained on ImageNet; downloaded once, its hash checked.

    The V1 weights, which are the published ones, else the first that take images of 224 pixels; without those of
    auxiliary outputs. Warns where they were trained on images of another scale (efficientnet_v2_l).

    Raises:
        DataError: no network, or a damaged file; the message names the ways out.
    """
    entries = torchvision.models.get_model_weights(name)
    fitting = [entry for entry in entries if max(entry.meta.get("min_size", (1, 1))) <= 224]
    entry = entries[WEIGHTS] if WEIGHTS in entries.__members__ else fitting[0]
    scale = entry.transforms()
    if list(scale.mean) != [0.485, 0.456, 0.406]:  # ImageNet's, by which images are scaled here
        warn(f"ImageNet's weights of {name} were trained on images scaled by mean {scale.mean} and std {scale.std}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torch.hub sets none, and a blocked network would hang for minutes
    try:
        with contextlib.redirect_stderr(sys.stdout):  # standard error is for errors
            weights = entry.get_state_dict(progress=sys.stdout.isatty(), check_hash=True)
        return {name: tensor for name, tensor in weights.items() if not name.lower().startswith("aux")}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, http.client.HTTPException) as error:
        raise DataError(
            f"no ImageNet weights of {name} (from {entry.url}: {error}): name such a file with --pretrained PATH, "
            "or start from scratch with --pretrained none"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _resnet(name: str) -> Callable[..., nn.Module]:
    def build(
        num_classes: int = 1000, pretrained: bool = False, use_norm: bool = False, feature_norm: str = "l1"
    ) -> nn.Module:
        model = torchvision_model(name, num_classes, use_norm, feature_norm)
        if pretrained:
            own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("fc.")}
            weights = {key: tensor for key, tensor in imagenet_weights(name).items() if not key.startswith("fc.")}
            model.load_state_dict({**weights, **own})
        return model

    build.__name__ = name
    build.__doc__ = f"torchvision's {name}; `pretrained` loads its {WEIGHTS} weights and gives it a new last layer."
    return build


resnet18 = _resnet("resnet18")
resnet50 = _resnet("resnet50")
