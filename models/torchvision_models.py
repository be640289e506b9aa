"""Any of torchvision's classifiers, made to return `(logits, features)`, and ImageNet's weights; keys unchanged."""

import contextlib
import http.client
import pickle
import re
import sys

import torchvision
from torch import Tensor, nn

from models.feature_norm import head_name, with_feature_norm
from models.resnet_cifar import NormedLinear
from utils import DataError, UsageError, network_timeout

#: ImageNet's weights that the published scripts start from.
WEIGHTS = "IMAGENET1K_V1"
#: Models with auxiliary outputs, which are not trained here.
_AUXILIARY = ("googlenet", "inception_v3")

#: family -> smallest side of its images in pixels, where that is over 8
_SMALLEST = {"alexnet": 63, "convnext": 32, "densenet": 29, "googlenet": 15, "inception": 75, "vgg": 32}
#: family -> the only side that it takes here
_ONLY = {"maxvit": 224, "vit": 224}


def torchvision_archs() -> list[str]:
    """Names of torchvision's classifiers that end in a linear layer, sorted.

    Without MNASNet, whose state dict loads with torch's version numbers only.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith(("squeezenet", "mnasnet"))]


def torchvision_model(arch: str, num_classes: int, use_norm: bool = False, feature_norm: str = "l1") -> nn.Module:
    """The model of that name, with random weights. It returns `(logits (N, K), features (N, 1))`.

    Args:
        arch: one of `torchvision_archs()`.
        num_classes: K.
        use_norm: a normalised head (`NormedLinear`), for LDAM.
        feature_norm: 'l1', 'l2' or 'linf', the norm in `features`.

    Raises:
        ValueError: a name that torchvision does not know, or a model without a linear layer.
    """
    # ImageNet's weights of these want images scaled to -1 to 1, which the model does from the usual scale
    extra = {"aux_logits": False, "init_weights": False, "transform_input": True} if arch in _AUXILIARY else {}
    model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **extra)
    if use_norm:
        head = head_name(model)
        model.set_submodule(head, NormedLinear(model.get_submodule(head).in_features, num_classes))
    return with_feature_norm(model, norm=feature_norm)


def imagenet_weights(arch: str) -> dict[str, Tensor]:
    """The state dict of torchvision's model of that name, trained on ImageNet; downloaded once, its hash checked.

    The V1 weights, which are the published ones, else the first that take images of 224 pixels; without those of
    auxiliary outputs.

    Raises:
        DataError: no network, or a damaged file; the message names the ways out.
    """
    entries = torchvision.models.get_model_weights(arch)
    fitting = [entry for entry in entries if max(entry.meta.get("min_size", (1, 1))) <= 224]
    entry = entries[WEIGHTS] if WEIGHTS in entries.__members__ else fitting[0]
    try:
        with network_timeout(), contextlib.redirect_stderr(sys.stdout):  # standard error is for errors
            weights = entry.get_state_dict(progress=sys.stdout.isatty(), check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, http.client.HTTPException) as error:
        raise DataError(
            f"no ImageNet weights of {arch} (from {entry.url}: {error}): name such a file with --pretrained PATH, "
            "or start from scratch with --pretrained none"
        ) from None
    return current_names({name: tensor for name, tensor in weights.items() if not name.lower().startswith("aux")})


def current_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under torchvision's current names: older files of DenseNet have others."""
    return {re.sub(r"(denselayer\d+\.\w+)\.(\d\.)", r"\1\2", name): tensor for name, tensor in weights.items()}


def check_image_size(arch: str, size: int) -> None:
    """Raise UsageError, naming --arch and --image_size, if the model cannot take square images of `size` pixels.

    Models that are not torchvision's (those of `CIFAR_MODELS`) take any size from 8 pixels on, as all others do.
    """
    family = next((name for name in (*_SMALLEST, *_ONLY) if arch.startswith(name)), "")
    only, smallest = _ONLY.get(family), _SMALLEST.get(family, 0)
    if only is not None and size != only:
        raise UsageError(f"--image_size {size}: --arch {arch} takes images of {only} pixels only")
    if size < smallest:
        raise UsageError(f"--image_size {size}: --arch {arch} needs images of at least {smallest} pixels")
