"""torchvision's ResNets, made to return `(logits, features)`; state-dict keys unchanged."""

import contextlib
import http.client
import pickle
import socket
import sys

import torchvision

from models.torchvision_nets import torchvision_net
from utils import DataError

WEIGHTS = "IMAGENET1K_V1"


def imagenet_weights(name):
    """The state dict of torchvision's net `name`, trained on ImageNet; downloaded once, its hash checked.

    The oldest weights that torchvision has, which are the published ones; without those of auxiliary outputs.

    Raises:
        DataError: no network, or a damaged file; the message names the ways out.
    """
    entries = torchvision.models.get_model_weights(name)
    entry = entries[WEIGHTS] if WEIGHTS in entries.__members__ else entries.DEFAULT
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


def _resnet(name):
    def build(num_classes=1000, pretrained=False, use_norm=False, feature_norm="l1"):
        net = torchvision_net(name, num_classes, use_norm, feature_norm)
        if pretrained:
            own = {key: tensor for key, tensor in net.state_dict().items() if key.startswith("fc.")}
            weights = {key: tensor for key, tensor in imagenet_weights(name).items() if not key.startswith("fc.")}
            net.load_state_dict({**weights, **own})
        return net

    build.__name__ = name
    build.__doc__ = f"torchvision's {name}; `pretrained` loads its {WEIGHTS} weights and gives it a new last layer."
    return build


resnet18 = _resnet("resnet18")
resnet50 = _resnet("resnet50")
