"""The experiment on the influence factor (docs/factor.md): the ratio that each arm takes, the contrasts, the figure.

    python -m paper.factor results/factor_cifar10 --data_dir data

prints the tables from the records below the folder, and writes factor.png there; with --checkpoints gradient_by_p.png.
With --arms CHECKPOINT ... it prints how large the gradient of each arm is beside that of CE after the epochs done.
"""

import argparse
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

from experiment import checkpoint, plots
from experiment.compare import settings_of_checkpoint
from experiment.records import plateau
from loaders.in_memory import InMemoryBatches
from losses import IBLoss, inverse_frequency_weights
from paper import influence, records, statistics, style
from paper.report import table
from training.gradients import gradient_norms
from training.recipe import Recipe
from utils import DataError, command

#: Arm -> its name, colour and marker.
ARMS = {
    "W": ("class weights alone", "#0072b2", "^"),
    "A": ("factor attached", "#d55e00", "s"),
    "D": ("factor detached", "#009e73", "D"),
}
CONTRASTS = (("A", "W"), ("D", "W"), ("A", "D"))
#: The gain of IB over CE, Table 4, long-tailed, ratio 100.
PUBLISHED_GAIN = {"cifar10": 7.39, "cifar100": 4.09}
#: Of each test: three seeds may be followed by three more, and each look has half of 0.05.
LEVEL = 0.025
#: Bounds of the bins of p, the probability of the true class.
BINS = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)


class Place(NamedTuple):
    """What a run of the experiment is. arm: a key of ARMS, or 'CE', 'CE, lr of IB', 'IB'; ratio: of its gradient to
    CE's, 0 for the last three; epochs: the length; seed."""

    arm: str
    ratio: float
    epochs: int
    seed: int = 0


Found = dict[Place, dict[str, Any]]


def place_of(record: dict[str, Any]) -> Place | None:
    """The place of a record in the experiment, None for a run that is no part of it."""
    settings = records.settings_of(record["settings"])
    rest = settings.epochs, settings.seed or 0
    if (settings.loss_type, settings.train_rule) == ("CE", "None"):
        return Place("CE" if len(settings.milestones) < 3 else "CE, lr of IB", 0.0, *rest)
    if (settings.loss_type, settings.train_rule) != ("IB", "IBReweight"):
        return None
    if settings.alpha == 1000 and settings.ib_norm == "l1" and not settings.detach_ib:
        return Place("IB", 0.0, *rest)
    if settings.alpha != "auto" or settings.auto_target != "gradient":
        return None
    arm = "W" if settings.ib_norm == "none" else "D" if settings.detach_ib else "A"
    return Place(arm, settings.auto_ratio, *rest)


def read(folder: str | pathlib.Path) -> Found:
    """The records of the experiment below `folder`, by their places."""
    placed = [(place_of(record), record) for _, record in records.read(folder)[0]]
    return {place: record for place, record in placed if place is not None}


def top1(record: dict[str, Any]) -> float:
    """The plateau of test top-1, in percent."""
    return plateau(record["history"])["acc1"]


def left_out_mean(record: dict[str, Any]) -> float:
    """The plateau of the class mean on the left-out images, in percent."""
    return plateau(record["history"])["val"]["class_mean"]


def choose(found: Found) -> dict[str, float]:
    """The ratio that each arm takes: the best plateau on the left-out images in the shortest runs of seed 0; of equal
    ones the smaller."""
    epochs = min((place.epochs for place in found if place.arm in ARMS), default=0)
    pilot = {place: record for place, record in found.items() if (place.epochs, place.seed) == (epochs, 0)}
    scores = {(p.arm, p.ratio): left_out_mean(r) for p, r in pilot.items() if p.arm in ARMS}
    return {
        arm: max(sorted(ratio for a, ratio in scores if a == arm), key=lambda ratio: scores[arm, ratio])
        for arm in sorted({arm for arm, _ in scores})
    }


def differences(found: Found, one: Place, other: Place) -> list[float]:
    """Plateau of `one` minus that of `other` for each seed that both have; the seeds in the places do not count."""
    seeds = sorted({place.seed for place in found})
    pairs = [(one._replace(seed=seed), other._replace(seed=seed)) for seed in seeds]
    return [top1(found[a]) - top1(found[b]) for a, b in pairs if a in found and b in found]


def contrasts(found: Found, dataset: str) -> dict[str, statistics.Contrast]:
    """The contrasts of docs/factor.md that have runs, with Holm's p, by name."""
    chosen, named = choose(found), {}
    lengths = sorted({place.epochs for place in found if place.arm in ARMS})
    for a, b in CONTRASTS:
        if {a, b} <= chosen.keys():
            places = (Place(arm, chosen[arm], lengths[-1]) for arm in (a, b))
            named[f"{a} - {b}, at the chosen ratios"] = differences(found, *places)
    for a, b in CONTRASTS:
        of_lengths = [differences(found, Place(a, 1.0, n), Place(b, 1.0, n)) for n in lengths]
        named[f"{a} - {b}, at ratio 1"] = max(of_lengths, key=len, default=[])
    longest = max((place.epochs for place in found if place.arm == "IB"), default=0)
    gains = differences(found, Place("IB", 0.0, longest), Place("CE", 0.0, longest))
    gain = PUBLISHED_GAIN[dataset]
    named[f"IB - CE, minus the published {gain}"] = [value - gain for value in gains]
    return statistics.family({name: values for name, values in named.items() if values}, level=LEVEL)


def tables(found: Found, dataset: str) -> list[str]:
    """Markdown: what each run reached, and the contrasts.

    'its epoch', counted from 0, is the one that the left-out images choose, 'best' the test set's own.
    """
    lines = []
    for place, record in sorted(found.items()):
        gradient = next((epoch["gradient"] for epoch in record["history"] if epoch.get("gradient")), {})
        figures = [gradient.get(name) for name in ("ce", "loss", "ratio", "again")]
        chooses, best = record["history"][-1].get("val"), record["best"]  # the epoch that the left-out images choose
        figures += [left_out_mean(record), best["acc1"]] if chooses else [None, None]
        figures += [max(epoch["test"]["acc1"] for epoch in record["history"]), top1(record), record["last"]["acc1"]]
        texts = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        texts.insert(5, str(best["epoch"]) if chooses else "")
        lines.append([place.arm, place.seed, place.epochs, *texts])
    heads = ["arm", "seed", "epochs", "gradient of CE", "of the loss", "ratio", "measured again"]
    rows = [[name, c.n, f"{c.mean:+.2f}", *c.texts] for name, c in contrasts(found, dataset).items()]
    return [
        *table([*heads, "left-out plateau", "its epoch", "test there", "best", "plateau", "last"], lines),
        *table(["contrast", "seeds", "mean", "95 % interval", "adjusted p", "verdict"], rows),
    ]


def norms_after(path: str, data_dir: str) -> tuple[int, float, float]:
    """(epochs done, norm of CE's gradient, norm of its own loss's) of a run's checkpoint, before its next epoch.

    See `gradient_norms`; in float32. Raises DataError: not a checkpoint of an arm.
    """
    epochs, model, data = influence.trained(path, data_dir)
    state = checkpoint.load(path)
    settings: Any = settings_of_checkpoint(state, path)
    recipe = Recipe.from_settings(settings)
    criterion = recipe.criterion(recipe.stage(epochs - 1), data.get_cls_num_list())
    if not criterion.needs_features:
        raise DataError(f"{path} is before the second phase, or of a run without one")
    criterion.load_state_dict(state["criterion"])  # its alpha
    batches = InMemoryBatches(data, settings.batch_size, seed=settings.seed)
    return epochs, *gradient_norms(model, batches.train_epoch(epochs), criterion)


# ------------------------------------------------------------------------- where in p the gradient comes from


def gradient_shares(
    model: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], criterion: Any
) -> list[float]:
    """The share of each bin of p (`BINS`) in the sum of the images' gradients, in percent.

    The gradient of an image is that of its loss in the last layer's weights, through the logits: the L1 norm of the
    gradient in the logits, times |h|. The model is in evaluation mode.
    """
    model.eval()
    sums = torch.zeros(len(BINS) - 1, dtype=torch.float64)
    bounds = torch.tensor(BINS[1:-1], dtype=torch.float64)
    for images, target in batches:
        with torch.no_grad():
            logits, features = model(images)
        logits, features = logits.double().requires_grad_(), features.double()
        loss, _ = criterion.per_sample(logits, target, features)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        p = logits.detach().softmax(1).gather(1, target[:, None]).flatten()
        sums.index_add_(0, torch.bucketize(p, bounds, right=True), gradient.abs().sum(1) * features.flatten())
    return (100 * sums / sums.sum()).tolist()


def draw(found: Found, to: pathlib.Path) -> pathlib.Path | None:
    """factor.png and factor.pdf: accuracy against the ratio of the gradients, an arm a line, seeds as points."""
    if not any(place.arm in ARMS for place in found):
        return None
    figure, axes = plots.subplots()
    for arm, (name, color, marker) in ARMS.items():
        points = sorted((place.ratio, top1(record)) for place, record in found.items() if place.arm == arm)
        ratios = sorted({ratio for ratio, _ in points})
        means = [fmean(value for at, value in points if at == ratio) for ratio in ratios]
        axes.plot(ratios, means, color=color, label=name)
        axes.plot([ratio for ratio, _ in points], [value for _, value in points], marker, color=color, ms=4)
    axes.set(xscale="log", xlabel="gradient beside that of CE", ylabel="test top-1, plateau [%]")
    axes.set_xticks([1 / 3, 1, 3], ["1/3", "1", "3"])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    return style.save(figure, to, "factor")


def draw_shares(of_models: dict[str, dict[str, list[float]]], to: pathlib.Path) -> pathlib.Path:
    """gradient_by_p.png and .pdf: `gradient_shares` of the arms, a panel for each model, by its title."""
    figure, panels = plots.subplots(len(of_models), height=1.9 * len(of_models), sharex=True, squeeze=False)
    for axes, (title, shares) in zip(panels[:, 0], of_models.items(), strict=True):
        for offset, (arm, (name, color, _)) in enumerate(ARMS.items()):
            axes.bar(
                [i + 0.27 * (offset - 1) for i in range(len(BINS) - 1)], shares[arm], 0.25, color=color, label=name
            )
        axes.set(title=title, ylabel="share [%]")
    panels[0, 0].legend(fontsize=7)
    names = [f"{low:g}\nto {high:g}" for low, high in itertools.pairwise(BINS)]
    panels[-1, 0].set_xticks(range(len(names)), names)
    panels[-1, 0].set(xlabel="probability of the true class, training images")
    return style.save(figure, to, "gradient_by_p")


def shares_of_arms(path: str, data_dir: str) -> tuple[str, dict[str, list[float]]]:
    """('after N epochs', `gradient_shares` of the arms) of a checkpoint of cifar_train.py, on its training images."""
    epochs, model, data = influence.trained(path, data_dir)
    weight, batches = inverse_frequency_weights(data.get_cls_num_list()), InMemoryBatches(data, 128)
    losses = {"W": IBLoss(weight, norm="none"), "A": IBLoss(weight), "D": IBLoss(weight, detach=True)}
    shares = {arm: gradient_shares(model, batches.eval_epoch(), loss) for arm, loss in losses.items()}
    return f"after {epochs} epochs", shares


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="paper.factor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="of the records; the figure goes there")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="for the shares of the gradient by p")
    parser.add_argument("--arms", nargs="+", default=[], help="checkpoints whose gradients are measured")
    parser.add_argument("--data_dir", default="./data", help="default: %(default)s")
    options = parser.parse_args(argv)
    found = read(options.folder)
    if not found:
        parser.error(f"no record of the experiment in {options.folder}")
    print("\n".join(tables(found, next(iter(found.values()))["settings"]["dataset"])))
    for path in options.arms:
        epochs, ce, loss = norms_after(path, options.data_dir)
        print(f"{path}, after {epochs} epochs: gradient of CE {ce:.3f}, of its loss {loss:.3f}, ratio {loss / ce:.2f}")
    shares = dict(shares_of_arms(path, options.data_dir) for path in options.checkpoints)
    for model, arms in shares.items():
        print(model)
        for arm, parts in arms.items():
            print(f"{arm}: " + ", ".join(f"{part:.1f} %" for part in parts))
    if shares:
        draw_shares(shares, options.folder)
    draw(found, options.folder)


if __name__ == "__main__":
    main()
