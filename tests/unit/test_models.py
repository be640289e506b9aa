"""The models: published keys, outputs, initial values and training trajectories; the wrapper of other models."""

import concurrent.futures
import copy
import functools
import pickle
import re
import threading
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torchvision
from conftest import golden
from loss_maker import official
from torch import nn
from torchvision.models import WeightsEnum

import losses
import models
from benchmarks import plain
from imbalance_cifar import IMBALANCEDIGITS
from loaders.in_memory import InMemoryBatches
from models import NormedLinear
from training.loop import train_one_epoch
from training.optimizer import sgd
from utils import UsageError

MODELS = {**models.CIFAR_MODELS, **models.IMAGENET_MODELS}


def build_golden(name, num_classes):
    return MODELS[name.removesuffix("_norm")](num_classes, use_norm=name.endswith("_norm"))


def fill(model, seed):
    """The weights that the golden outputs were computed with; returns the model."""
    generator = np.random.RandomState(seed)
    state = model.state_dict()
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        noise = generator.randn(*tensor.shape)
        if key.endswith("running_var"):
            values = 1 + 0.1 * np.abs(noise)
        elif key.endswith("running_mean"):
            values = 0.1 * noise
        elif tensor.ndim == 1:
            values = float(key.endswith("weight")) + 0.1 * noise
        else:
            values = noise * np.sqrt(2 / np.prod(tensor.shape[1:]))
        state[key] = torch.tensor(values, dtype=tensor.dtype)
    model.load_state_dict(state)
    return model


@functools.cache
def inputs(num_classes):
    """What the official code was given: {"x", "x64"}, images of 32 and 64 pixels, and 24 batches (images, labels)."""
    draws = np.random.RandomState(0)  # one stream: the inputs of losses_K.npz come first
    draws.randn(64, num_classes), draws.randint(0, num_classes, 64), draws.randn(64)
    shapes = (8, 3, 32, 32), (2, 3, 64, 64), (24, 16, 3, 32, 32)
    x, x64, steps = (torch.tensor(draws.randn(*shape)).float() for shape in shapes)
    labels = torch.tensor(draws.randint(0, num_classes, (24, 16)))
    return {"x": x, "x64": x64}, list(zip(steps.double(), labels, strict=True))


# -------------------------------------------------------------------------------- against the official code


def test_state_dict_keys():
    for name, published in golden("state_dict_keys.json").items():
        with torch.device("meta"):
            state = build_golden(name, 1000 if name == "resnet18" else 10).state_dict()
        assert list(state) == list(published)
        assert {key: list(tensor.shape) for key, tensor in state.items()} == published


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet32_norm", "resnet18"])
def test_golden_outputs(name, num_classes):
    expected = golden(f"models_{num_classes}.npz")
    seed, x = (6, "x64") if name == "resnet18" else (5, "x")
    model = fill(build_golden(name, num_classes), seed).eval()
    with torch.no_grad():
        outputs = model(inputs(num_classes)[0][x])
    for output, part in zip(outputs, ("logits", "features"), strict=True):
        reference = torch.tensor(expected[f"{name}/{part}"])
        assert output.shape == reference.shape
        largest = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(output, reference, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_initial_values(num_classes):
    torch.manual_seed(0)
    state = models.resnet32(num_classes).state_dict()
    sums = [tensor.double().sum().item() for tensor in state.values()]
    expected = golden(f"models_{num_classes}.npz")["init/resnet32/sums"].tolist()
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-3)  # processors round the draws otherwise


LR, IB_LR, IB_START = 0.05, 0.0005, 12


def as_trained(model):
    """The model and its optimizer as the scripts have them."""
    model = model.double().to(memory_format=torch.channels_last)
    return model, sgd(model, LR, momentum=0.9, weight_decay=2e-4)


def train(model, optimizer, criterion, batches):
    """The loss of each step of the scripts' own loop."""
    return [
        train_one_epoch(model, [batch], criterion, optimizer, model.linear.out_features)["loss"] for batch in batches
    ]


@functools.cache
def phase_one(num_classes):
    """The first 12 steps of plain CE, which the CE run and the IB runs share: model, optimizer, losses."""
    model, optimizer = as_trained(fill(models.resnet20(num_classes), 7))
    return model, optimizer, train(model, optimizer, losses.CrossEntropyLoss(), inputs(num_classes)[1][:IB_START])


TRAJECTORIES = [
    ("CE", "None"), ("CE", "CBReweight"), ("Focal", "None"), ("IB", "IBReweight"), ("IB", "CBReweight"),
    ("IBFocal", "IBReweight"),
]  # fmt: skip


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize(("loss", "rule"), TRAJECTORIES)
def test_golden_trajectory(num_classes, loss, rule):
    expected = golden(f"trajectory_{num_classes}.npz")
    criterion = official(loss, rule, golden(f"losses_{num_classes}.npz")["cls_num_list"])
    if criterion.needs_features or (loss, rule) == ("CE", "None"):
        model, optimizer, values = copy.deepcopy(phase_one(num_classes))
    else:
        model, optimizer = as_trained(fill(models.resnet20(num_classes), 7))
        values = []
    if criterion.needs_features:
        optimizer.param_groups[0]["lr"] = IB_LR
    published = expected[f"{loss}/{rule}/losses"].tolist()
    values = values + train(model, optimizer, criterion, inputs(num_classes)[1][len(values) : len(published)])
    assert len(values) > IB_START
    assert values == pytest.approx(published, rel=1e-6)
    if len(values) == 24:  # the trajectory of 100 classes is cut
        norm = torch.cat([p.detach().flatten() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(float(expected[f"{loss}/{rule}/final_param_norm"]), rel=1e-6)


# ---------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize(
    ("name", "use_norm", "norm"), [("resnet20", False, "l1"), ("resnet20", True, "l2"), ("resnet18", True, "linf")]
)
def test_head_and_features(name, use_norm, norm):
    torch.manual_seed(0)
    model = MODELS[name](7, use_norm=use_norm, feature_norm=norm).eval()
    head, hidden = model.linear if hasattr(model, "linear") else model.fc, []
    head.register_forward_pre_hook(lambda layer, args: hidden.append(args[0]))
    with torch.no_grad():
        logits, features = model(torch.randn(2, 3, 32, 32))
        h = hidden[0]
        if use_norm:
            expected = torch.cosine_similarity(h[:, :, None], head.weight[None], dim=1)
        else:
            expected = h @ head.weight.T + head.bias
    rows = {"l1": h.abs().sum(1), "l2": h.square().sum(1).sqrt(), "linf": h.abs().amax(1)}
    assert (logits.shape, features.shape) == ((2, 7), (2, 1))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[:, 0], rows[norm])


def test_new_normed_linear_has_columns_of_length_one():
    torch.manual_seed(0)
    columns = NormedLinear(64, 10).weight.detach()
    torch.testing.assert_close(columns.norm(dim=0), torch.ones(10), rtol=1e-4, atol=0)
    assert columns.std() > 0.1


def test_normed_linear_is_finite_at_a_dead_feature_vector():
    x = torch.zeros(2, 4, requires_grad=True)
    NormedLinear(4, 3)(x).sum().backward()
    assert x.grad.isfinite().all()


# --------------------------------------------------------------------------------------- with_feature_norm


def test_the_older_names_in_densenets_files_are_todays():
    whole = torchvision.models.densenet121().state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): tensor for name, tensor in whole.items()}
    assert older.keys() != whole.keys()
    with mock.patch.object(WeightsEnum, "get_state_dict", return_value=older):
        assert models.imagenet_weights("densenet121").keys() == whole.keys()


#: family -> (model, its last layer)
AUXILIARY = {"aux_logits": False, "transform_input": True}
FAMILIES = {
    "alexnet": "classifier.6", "convnext_tiny": "classifier.2", "efficientnet_b0": "classifier.1",
    "googlenet": "fc", "inception_v3": "fc", "maxvit_t": "classifier.5", "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1", "mobilenet_v3_small": "classifier.3", "regnet_y_400mf": "fc", "resnet18": "fc",
    "shufflenet_v2_x0_5": "fc", "swin_t": "head", "vgg11": "classifier.6", "vit_b_32": "heads.head",
    "densenet121": "classifier",
}  # fmt: skip


def test_the_head_of_torchvisions_families_is_known():
    for arch, layer in FAMILIES.items():
        with torch.device("meta" if arch != "regnet_y_400mf" else "cpu"):
            model = models.torchvision_model(arch, 5)
        assert models.head_name(model) == layer
        assert model.get_submodule(layer).out_features == 5


#: One family of each kind of head, at a size that it takes.
SIZES = {"mobilenet_v3_small": 32, "swin_t": 32, "googlenet": 64}


@pytest.mark.parametrize(("arch", "size"), SIZES.items())
def test_wrapped_model_gives_the_same_logits_and_the_norm_of_what_enters_the_last_layer(arch, size):
    torch.manual_seed(0)
    model = models.torchvision_model(arch, 5).eval()
    plain = torchvision.models.get_model(arch, num_classes=5, **(AUXILIARY if arch == "googlenet" else {}))
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    plain.eval()
    hidden, x = [], torch.randn(2, 3, size, size)
    plain.get_submodule(FAMILIES[arch]).register_forward_pre_hook(lambda layer, args: hidden.append(args[0]))
    with torch.no_grad():
        expected, (logits, features) = plain(x), model(x)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(features, hidden[0].abs().sum(1, keepdim=True))
    assert (features > 0).all()


def test_auxiliary_outputs_are_left_out():
    model = torchvision.models.googlenet(num_classes=4, aux_logits=True, init_weights=False).train()
    logits, features = models.with_feature_norm(model)(torch.randn(2, 3, 64, 64))
    assert (logits.shape, features.shape) == ((2, 4), (2, 1))


def test_model_without_a_linear_layer():
    with pytest.raises(ValueError, match="SqueezeNet has no linear layer"):
        models.with_feature_norm(torchvision.models.squeezenet1_1(num_classes=3))


def test_a_wrapped_model_can_be_copied_and_saved_whole():
    model, x = models.with_feature_norm(nn.Sequential(nn.Linear(2, 2))), torch.tensor([[1.0, -2.0]])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for mine, theirs in zip(twin(x), model(x), strict=True):
            assert torch.equal(mine, theirs)


# ------------------------------------------------------------------ which layer, and what a model may return


class HeadFirst(nn.Module):
    """A classifier whose head is made first; `wrap` is what becomes of its logits."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(5, 4)
        self.wrap = wrap

    def hidden(self, x):
        return self.body(x).relu()

    def forward(self, x):
        return self.wrap(self.head(self.hidden(x)))


def assert_features(model, found, x):
    torch.testing.assert_close(found, model.hidden(x).abs().sum(1, keepdim=True))


def test_the_head_is_never_guessed():
    model = HeadFirst()
    for use in (models.head_name, models.HeadOnly):
        with pytest.raises(UsageError, match=r"the linear layers head, body: say which .*model.head_name = 'body'"):
            use(model)
    model.head_name = "head"
    assert models.head_name(model) == "head"
    assert models.HeadOnly(model).head is model.head
    assert models.head_name(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))) == "2"
    assert models.head_name(models.resnet20(use_norm=True)) == "linear"
    x = torch.randn(2, 5)
    wrapped = models.with_feature_norm(HeadFirst(), "head")
    assert models.head_name(wrapped) == "head"
    assert_features(wrapped, wrapped(x)[1], x)
    model.head_name = "gone"
    with pytest.raises(AttributeError, match="gone"):
        models.head_name(model)


def test_a_wrong_layer_is_refused():
    x = torch.randn(2, 5)
    model = models.with_feature_norm(HeadFirst())  # of several layers the one whose output is returned
    assert_features(model, model(x)[1], x)
    for model, layer in ((HeadFirst(), "body"), (HeadFirst(lambda logits: logits * 30), "head")):
        with pytest.raises(ValueError, match=f"the layer '{layer}' is not what the model returns.*layer=") as error:
            models.with_feature_norm(model, layer)(x)
        assert "\n" not in str(error.value)
    with pytest.raises(AttributeError, match="tail"):
        models.with_feature_norm(HeadFirst(), "tail")


def test_outputs_that_hold_logits_are_taken_apart():
    for wrap in (lambda z: {"logits": z}, lambda z: (z, 7)):
        model, x = models.with_feature_norm(HeadFirst(wrap), "head"), torch.randn(2, 5)
        logits, features = model(x)
        assert torch.equal(logits, model.head(model.hidden(x)))
        assert_features(model, features, x)
        assert features.requires_grad
    for wrap in (lambda z: [z], lambda z: {"scores": z}, lambda z: None):
        with pytest.raises(ValueError, match="the model returns neither logits, nor") as error:
            models.with_feature_norm(HeadFirst(wrap), "head")(torch.randn(2, 5))
        assert "\n" not in str(error.value)


def test_threads_do_not_mix_their_features():
    barrier = threading.Barrier(2)

    def wait(logits):  # both are between the last layer and the end
        barrier.wait(20)
        return logits

    model, inputs = models.with_feature_norm(HeadFirst(wait), "head"), [torch.randn(n, 5) for n in (2, 6)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for x, (_, features) in zip(inputs, threads.map(model, inputs), strict=True):
            assert_features(model, features, x)


def test_torch_compile_of_a_wrapped_model():
    """No graph break (fullgraph), no second compilation."""
    torch._dynamo.reset()
    model, x = models.with_feature_norm(HeadFirst(), "head"), torch.randn(2, 5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        for part, expected in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(part, expected)
    assert counter.frame_count == 1


# ----------------------------------------------------------------------------------------------- image sizes


def takes(arch, size):
    """Whether torchvision's model runs on images of that size: a forward pass without numbers."""
    extra = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(arch, weights=None, num_classes=5, **extra).to("meta")
    try:
        model(torch.zeros(2, 3, size, size, device="meta"))
    except (RuntimeError, AssertionError):
        return False
    return True


def is_allowed(arch, size):
    try:
        models.check_image_size(arch, size)
    except UsageError:
        return False
    return True


#: One of each family with a limit, the sizes at its edge (8 is the smallest that --image_size takes), and one without.
EDGES = {
    "alexnet": (62, 63), "convnext_tiny": (31, 32), "densenet121": (28, 29), "googlenet": (14, 15),
    "inception_v3": (74, 75), "vgg11_bn": (31, 32), "maxvit_t": (32, 224), "vit_b_32": (32, 224, 256),
    "resnet18": (8,), "swin_t": (8,), "mobilenet_v3_small": (8,), "shufflenet_v2_x0_5": (8,),
}  # fmt: skip


def test_image_sizes_are_allowed_where_the_model_runs():
    for arch, sizes in EDGES.items():
        with torch.device("meta"):
            assert [is_allowed(arch, size) for size in sizes] == [takes(arch, size) for size in sizes], arch


def test_images_are_scaled_as_googlenets_weights_of_imagenet_want_them():
    model = models.torchvision_model("googlenet", 3).eval()
    assert model.transform_input
    seen, raw = [], torch.rand(1, 3, 96, 96)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model._transform_input = (lambda scale: lambda x: seen.append(scale(x)) or seen[-1])(model._transform_input)
    with torch.no_grad():
        model((raw - mean) / std)
    torch.testing.assert_close(seen[0], (raw - 0.5) / 0.5)


def test_a_float32_step_is_that_of_the_benchmarks_plain_loop():
    """Its update is off by half a percent: torch's batch norm adds up a channels-last tensor number after number."""
    images, target = next(InMemoryBatches(IMBALANCEDIGITS(imb_factor=1), 8).train_epoch(0))
    torch.manual_seed(0)
    ours = models.resnet20()
    theirs, before = plain.out_of_place(copy.deepcopy(ours)).train(), flat(ours)
    ours.to(memory_format=torch.channels_last)
    optimizer = sgd(ours, 0.02, 0.9, 2e-4)
    other = torch.optim.SGD(theirs.parameters(), 0.02, momentum=0.9, weight_decay=2e-4)
    loss, *_ = plain.train_step(theirs, images.contiguous(), target, other)
    found = train_one_epoch(ours, [(images, target)], losses.CrossEntropyLoss(), optimizer, 10)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert (flat(ours) - flat(theirs)).norm() < 2e-2 * (flat(theirs) - before).norm()


def flat(model):
    """A copy of all parameters, one after the other."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
