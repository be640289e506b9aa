"""The experiment on the influence factor (docs/factor.md): the ratio that each arm takes, the contrasts, the figure.

    python -m paper.factor results/factor_cifar10 --data_dir data

prints the tables from the records below the folder, and writes factor.png there; with --checkpoints gradient_by_p.png.
With --arms CHECKPOINT ... it prints how large the gradient of each arm is beside that of CE after the epochs done.
"""

import argparse
import collections
import itertools
import math
import pathlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from experiment import plots
from experiment.records import plateau
from loaders.in_memory import InMemoryBatches
from losses import IBLoss, inverse_frequency_weights
from paper import influence, records, rows, runs, statistics, style
from paper.report import mean_and_spread, table
from training.gradients import gradient_norms
from training.recipe import Recipe
from utils import DataError, command, warn

#: Arm -> the start of its variant's name in `runs.FACTOR`, its name, colour and marker.
ARMS = {
    "W": ("weights", "class weights alone", "#0072b2", "^"),
    "A": ("attached", "factor attached", "#d55e00", "s"),
    "D": ("detached", "factor detached", "#009e73", "D"),
}
#: (method, variant) -> arm and ratio of its gradient to CE's; beside the arms a run's name, and 0.
PLACES = {
    ("IB", f"{start}-grad{name}"): (arm, ratio)
    for arm, (start, *_) in ARMS.items()
    for name, ratio in runs.GRADIENTS.items()
}
PLACES |= {("CE", ""): ("CE", 0.0), ("CE", "ib-lr"): ("CE, lr of IB", 0.0), ("IB", ""): ("IB", 0.0)}
CONTRASTS = (("A", "W"), ("D", "W"), ("A", "D"))
#: Epochs of a whole run and of the pilot's.
FULL, PILOT = 200, 160
#: Settings in which a run of the experiment may differ from reproduce.py's, see `records.identify`.
FREE = {"amp", "val_left_out", "epochs", "milestones", "lr_factors"}
#: Imbalance, ratio, subset and protocol of its runs.
RUN = ("exp", 100, 0, "full")
#: The data sets of the experiment.
DATASETS = ("cifar10", "cifar100")
#: Of each test, and after how many seeds: three may be followed by three more, and each look has half of 0.05.
LEVEL = 0.025
LOOKS = (3, 6)
#: Bounds of the bins of p, the probability of the true class.
BINS = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)


class Place(NamedTuple):
    """What a run of the experiment is: arm and ratio as in `PLACES`, and the seed."""

    arm: str
    ratio: float
    seed: int = 0


Found = dict[Place, dict[str, Any]]


def place_of(record: dict[str, Any]) -> Place | None:
    """The place of a record in the experiment, None for a run that is no part of it."""
    run, difference = records.identify(record)
    if run.dataset not in DATASETS or (run.imb_type, run.ratio, run.subset, run.protocol) != RUN:
        return None
    if not all(name in FREE or (name == "--force" and _is_of_precision(text)) for name, text in difference):
        return None
    found = PLACES.get((run.method, run.variant))
    return found and Place(*found, run.seed)


def _is_of_precision(forced):
    """Whether --force has passed over another precision of the checkpoint, and nothing else."""
    return forced.startswith("amp is ") and "; " not in forced


def read(folder: str | pathlib.Path) -> Found:
    """The records of the experiment below `folder`, by their places; of a pilot's run and its whole one the latter.

    Raises:
        DataError: none, two runs of one place, or of two data sets.
    """
    good, left_out = records.read(folder)
    found: Found = {}
    ours = [(path, record, place_of(record)) for path, record in sorted(good, key=lambda pair: pair[1]["epochs_done"])]
    if len({record["settings"]["dataset"] for _, record, place in ours if place}) != 1:
        raise DataError(f"{folder} needs runs of the experiment on one data set")
    for path, record, place in ours:
        if place is None:
            left_out.append(f"{path}: no run of the experiment")
        elif place in found and found[place]["epochs_done"] == record["epochs_done"]:
            raise DataError(f"{folder} has two runs of {place.arm}, ratio {place.ratio:g}, seed {place.seed}")
        else:
            found[place] = record
    for line in left_out:
        warn(f"left out: {line}")
    for seed in sorted({place.seed for place in found}):
        first, *others = (record for place, record in found.items() if place.seed == seed)
        if not all(rows.may_be_compared(first, other) for other in others):
            warn(f"the runs of seed {seed} have two precisions or two first phases: those that differ are not compared")
    return found


def top1(record: dict[str, Any], epochs: int = FULL) -> float:
    """The plateau of test top-1 of the first `epochs` epochs, in percent."""
    return plateau(record["history"][:epochs])["acc1"]


def left_out_mean(record: dict[str, Any]) -> float | None:
    """The plateau of the class mean on the left-out images in the first `PILOT` epochs, in percent; None for a run
    without them."""
    return plateau(record["history"][:PILOT]).get("val", {}).get("class_mean")


def choose(found: Found) -> dict[str, float]:
    """The ratio of each arm that has all three, in one precision and on the same images: the best `left_out_mean` of
    seed 0; of equal ones the smaller."""
    scores: dict[str, dict[float, float]] = {arm: {} for arm in ARMS}
    conditions = collections.defaultdict(set)
    for place, record in sorted(found.items(), key=lambda item: item[0]):
        mean = left_out_mean(record)
        if place.arm in ARMS and place.seed == 0 and record["epochs_done"] >= PILOT and mean is not None:
            scores[place.arm][place.ratio] = mean
            conditions[place.arm].add((records.precision(record), record["settings"]["val_left_out"]))
    whole = {arm: of for arm, of in scores.items() if len(of) == len(runs.GRADIENTS) and len(conditions[arm]) == 1}
    return {arm: max(of, key=lambda ratio: of[ratio]) for arm, of in whole.items()}


def pairs(found: Found, one: tuple[str, float], other: tuple[str, float], epochs: int) -> list[tuple[Any, Any]]:
    """The records of `one` and `other`, (arm, ratio) each, for each seed that has both after `epochs` epochs, in one
    precision and from one first phase."""
    whole = {place: record for place, record in found.items() if record["epochs_done"] >= epochs}
    mine, theirs = ({place.seed: record for place, record in whole.items() if place[:2] == of} for of in (one, other))
    both = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    return [pair for pair in both if rows.may_be_compared(*pair)]


def differences(found: Found, one: tuple[str, float], other: tuple[str, float], epochs: int) -> list[float]:
    """The plateau of `one` minus that of `other`, see `pairs`."""
    return [top1(a, epochs) - top1(b, epochs) for a, b in pairs(found, one, other, epochs)]


def contrasts(found: Found) -> dict[str, statistics.Contrast]:
    """The contrasts of docs/factor.md that have runs, by name; what two of them share counts once.

    Holm's p are over all contrasts of the plan, those without runs too. There are p and verdict at `LOOKS` seeds only.
    Until all of the later look are there, the first three seeds stand, and a row of its own has all so far.
    """
    chosen, named, planned = choose(found), {}, 1
    for a, b in CONTRASTS:
        ratios = chosen.get(a, 0.0), chosen.get(b, 0.0)
        whole = differences(found, (a, ratios[0]), (b, ratios[1]), FULL)
        named[f"{a} - {b}, at the chosen ratios {_text(ratios[0])} and {_text(ratios[1])}"] = whole
        if ratios != (1.0, 1.0) or not whole:
            named[f"{a} - {b}, at ratio 1, to epoch {PILOT}"] = differences(found, (a, 1.0), (b, 1.0), PILOT)
        planned += 1 if ratios == (1.0, 1.0) else 2
    published = _published_gain(found)
    gains = differences(found, ("IB", 0.0), ("CE", 0.0), FULL)
    of_look = gains[: max((n for n in LOOKS if n <= len(gains)), default=len(gains))]
    gain = f"IB - CE, {fmean(of_look or [0.0]):+.2f}, minus the published {published}"
    named[gain] = [value - published for value in gains]
    looks = {name: max((n for n in LOOKS if n <= len(of)), default=0) for name, of in named.items() if of}
    judged = {name: named[name][:n] for name, n in looks.items() if n}
    so_far = {name + ", all seeds so far" * (n > 0): named[name] for name, n in looks.items() if n < len(named[name])}
    results = statistics.family(judged, resolution=0.01, level=LEVEL, size=planned)
    if gain in results:
        verdict = results[gain].verdict.replace("adds", "above the published")
        results[gain] = results[gain]._replace(verdict=verdict.replace("takes away", "below the published"))
    for name, c in statistics.family(so_far, resolution=0.01).items():
        results[name] = c if c.n == 1 else c._replace(p=math.nan, verdict="judged at {} or {} seeds".format(*LOOKS))
    return {name: results[name] for name in [*looks, *so_far]}


def unplanned(found: Found) -> dict[str, list[float]]:
    """Differences of top-1 that are no contrast of the plan, by name, one a seed: IB's to CE, to the published figure
    and to the arms at their chosen ratios, at full length."""
    gains, published = _gains(found), _published(found, "IB")
    named = {f"IB - CE, {when}": [float(gain[k]) for gain in gains] for k, when in enumerate(rows.WHEN)}
    whole = [r for place, r in found.items() if place.arm == "IB" and r["epochs_done"] >= FULL]
    with_left_out = [r for r in whole if r["history"][-1].get("val")]
    title = f"IB - the published {published:.2f}, "
    named[title + "epoch of the left-out images"] = [r["best"]["acc1"] - published for r in with_left_out]
    for k, when in enumerate(rows.WHEN):
        named[title + when] = [float(_best_plateau_last(r)[k]) - published for r in whole]
    for arm, ratio in choose(found).items():
        named[f"{arm} at ratio {_text(ratio)} - IB, plateau"] = differences(found, (arm, ratio), ("IB", 0.0), FULL)
    return {name: values for name, values in named.items() if values}


def _published(found, method):
    """Table 4's figure on the data set of the records, long-tailed, at ratio 100."""
    dataset = next(iter(found.values()))["settings"]["dataset"]
    value = rows.published(rows.Row(runs.Run(dataset, "exp", 100, method)))
    assert value is not None
    return value


def _published_gain(found):
    return round(_published(found, "IB") - _published(found, "CE"), 2)


def _gains(found):
    """Of IB over CE at full length, (best, plateau, last) for each seed."""
    return [_best_plateau_last(a) - _best_plateau_last(b) for a, b in pairs(found, ("IB", 0.0), ("CE", 0.0), FULL)]


def _best_plateau_last(record):
    """Test top-1 in percent; the best epoch is the test set's own."""
    return np.array([max(epoch["test"]["acc1"] for epoch in record["history"]), top1(record), record["last"]["acc1"]])


def _text(ratio):
    """As a fraction: 1/3, 1 or 3."""
    return str(Fraction(ratio).limit_denominator(3))


def tables(found: Found) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Heads and lines by name.

    'runs', what each reached; 'published', the same of IB with left-out images, mean and standard deviation;
    'gain', that of IB over CE at full length;
    'gradients', how they are matched; 'ratios', mean differences of the plateau to epoch `PILOT`, and of how many
    seeds; 'contrasts'; 'unplanned', intervals of the differences that are none.

    'left-out': `left_out_mean`; 'their epoch', counted from 0, is the one that the left-out images choose, 'best' the
    test set's own; 'to 160': the plateau of the first `PILOT` epochs; 'next': the ratio on the batches after those that
    set alpha.
    """
    of_runs: list[list[Any]] = []
    gradients: list[list[Any]] = []
    for place, record in sorted(found.items(), key=lambda item: item[0]):
        who = [place.arm, _text(place.ratio) if place.arm in ARMS else "", place.seed]
        chooses, best = record["history"][-1].get("val"), record["best"]  # the epoch that the left-out images choose
        figures = [left_out_mean(record), best["acc1"]] if chooses else [None, None]
        plateaus = [top1(record, PILOT), top1(record) if record["epochs_done"] >= FULL else None]
        figures += [max(epoch["test"]["acc1"] for epoch in record["history"]), *plateaus, record["last"]["acc1"]]
        texts = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        texts.insert(1, str(best["epoch"]) if chooses else "")
        of_runs.append([*who, record["epochs_done"], records.precision(record), *texts])
        for gradient in [epoch["gradient"] for epoch in record["history"] if epoch.get("gradient")]:
            norms = [gradient.get(name) for name in ("ce", "loss", "ratio", "again")]
            gradients.append([*who, *("" if norm is None else f"{norm:.2f}" for norm in norms)])
    whole = [[row[2], *row[6:9], *row[10:]] for row in of_runs if row[0] == "IB" and row[6] and row[10]]
    if whole:
        whole.append(["mean", "", *(mean_and_spread([float(row[k]) for row in whole]) for k in range(2, 6))])
    by_ratio = []
    for ratio in runs.GRADIENTS.values():
        of_ratio = [differences(found, (a, ratio), (b, ratio), PILOT) for a, b in CONTRASTS]
        texts = [f"{fmean(values):+.2f} ({len(values)})" if values else "" for values in of_ratio]
        by_ratio.append([_text(ratio), *texts])
    gains = _gains(found)
    gain = ["IB", f"{_published_gain(found):+.2f}", len(gains)]
    gain += [mean_and_spread(of, sign="+") for of in np.transpose(gains).tolist()]
    intervals = statistics.family(unplanned(found), resolution=0.01)
    beside = [[name, c.n, f"{c.mean:+.2f}", c.texts[0]] for name, c in intervals.items()]
    heads, reached = ["arm", "ratio", "seed"], ["left-out", "their epoch", "test there", "best"]
    reached += [f"to {PILOT}", "plateau", "last"]
    return {
        "runs": ([*heads, "epochs", "precision", *reached], of_runs),
        "published": (["seed", *reached[1:4], *reached[5:]], whole),
        "gain": (["minus CE", "published", "n", *rows.WHEN], [gain] if gains else []),
        "gradients": ([*heads, "of CE", "of the loss", "ratio", "next"], gradients),
        "ratios": (["ratio", *(f"{a} - {b}" for a, b in CONTRASTS)], by_ratio),
        "contrasts": (
            ["contrast", "seeds", "mean", "95 % interval", "adjusted p", "verdict"],
            [[name, c.n, f"{c.mean:+.2f}", *c.texts] for name, c in contrasts(found).items()],
        ),
        "unplanned": (["difference", "seeds", "mean", "95 % interval"], beside),
    }


def norms_after(path: str, data_dir: str) -> tuple[int, float, float]:
    """(epochs done, norm of CE's gradient, norm of its own loss's) of a run's checkpoint, before its next epoch.

    See `gradient_norms`; in float32. Raises DataError: not a checkpoint of an arm.
    """
    state, settings, model, data = influence.trained(path, data_dir)
    recipe, epochs = Recipe(settings), state["epoch"]
    criterion = recipe.criterion(recipe.stage(epochs - 1), data.get_cls_num_list())
    if not criterion.needs_features:
        raise DataError(f"{path} is before the second phase, or of a run without one")
    criterion.load_state_dict(state["criterion"])  # its alpha
    batches = InMemoryBatches(data, settings.batch_size, seed=settings.seed or 0)
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
    """factor.png and factor.pdf: accuracy after the pilot's epochs against the ratio of the gradients, seeds as points,
    an arm a line through the mean of the seeds that have all of its ratios."""
    found = {place: record for place, record in found.items() if place.arm in ARMS and record["epochs_done"] >= PILOT}
    if not (found and plots.available()):
        return None
    figure, axes = plots.subplots()
    for arm, (_, name, color, marker) in ARMS.items():
        points = {(place.ratio, place.seed): top1(r, PILOT) for place, r in found.items() if place.arm == arm}
        ratios = sorted({ratio for ratio, _ in points})
        whole = [seed for seed in {seed for _, seed in points} if all((ratio, seed) in points for ratio in ratios)]
        if whole:
            axes.plot(ratios, [fmean(points[ratio, seed] for seed in whole) for ratio in ratios], color=color)
        axes.plot([ratio for ratio, _ in points], [*points.values()], marker, color=color, ms=4, label=name)
    axes.set(xscale="log", xlabel="gradient beside that of CE", ylabel=f"test top-1, plateau to epoch {PILOT} [%]")
    axes.set_xticks([1 / 3, 1, 3], ["1/3", "1", "3"])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    return style.save(figure, to, "factor")


def draw_shares(of_models: dict[str, dict[str, list[float]]], to: pathlib.Path) -> pathlib.Path:
    """gradient_by_p.png and .pdf: `gradient_shares` of the arms, a panel for each model, by its title."""
    figure, panels = plots.subplots(len(of_models), height=1.9 * len(of_models), sharex=True, squeeze=False)
    for axes, (title, shares) in zip(panels[:, 0], of_models.items(), strict=True):
        for offset, (arm, (_, name, color, _)) in enumerate(ARMS.items()):
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
    state, _, model, data = influence.trained(path, data_dir)
    weight, batches = inverse_frequency_weights(data.get_cls_num_list()), InMemoryBatches(data, 128)
    losses = {"W": IBLoss(weight, norm="none"), "A": IBLoss(weight), "D": IBLoss(weight, detach=True)}
    shares = {arm: gradient_shares(model, batches.eval_epoch(), loss) for arm, loss in losses.items()}
    return f"after {state['epoch']} epochs", shares


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="paper.factor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="of the records; the figure goes there")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="for the shares of the gradient by p")
    parser.add_argument("--arms", nargs="+", default=[], help="checkpoints whose gradients are measured")
    parser.add_argument("--data_dir", default="./data", help="default: %(default)s")
    options = parser.parse_args(argv)
    found = read(options.folder)
    for heads, lines in tables(found).values():
        print("\n".join(table(heads, lines)))
    chosen = ", ".join(f"{arm} {_text(ratio)}" for arm, ratio in choose(found).items())
    print(f"Ratios that the left-out images choose: {chosen or 'none yet, an arm needs all three'}.")
    print("Intervals and the tests of equality are not adjusted; 'adds' and 'takes away' follow the adjusted p.")
    for path in options.arms:
        epochs, ce, loss = norms_after(path, options.data_dir)
        print(f"{path}, after {epochs} epochs: gradient of CE {ce:.3f}, of its loss {loss:.3f}, ratio {loss / ce:.2f}")
    shares = dict(shares_of_arms(path, options.data_dir) for path in options.checkpoints)
    for model, arms in shares.items():
        print(model)
        for arm, parts in arms.items():
            print(f"{arm}: " + ", ".join(f"{part:.1f} %" for part in parts))
    if shares and plots.available():
        draw_shares(shares, options.folder)
    draw(found, options.folder)


if __name__ == "__main__":
    main()
