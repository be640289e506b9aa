"""Records of runs: the small form that is kept, reading them, and which Run of the paper a record is.

A run is known by what is done, not by its name: the settings of a record are compared with those of the Run's own
command, as its script parses it.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

from experiment import parser
from experiment.settings import Settings, fields_affecting, from_record
from files import write_text
from imbalance import class_counts
from paper import runs
from training.recipe import Recipe

TEST_FIGURES = ("loss", "acc1", "acc5", "class_mean", "many", "medium", "few")
#: Without these there is nothing to report; the others are null where there is no such class.
ALWAYS = ("acc1", "acc5")
KEYS = {"settings", "classes", "class_counts", "group_rule", "epochs_done", "best", "last", "history"}
#: Settings that are compared one by one; `num_classes` follows from the data set, seeds are told apart elsewhere.
COMPARED = sorted({*fields_affecting("data", "model", "start", "optimizer", "numerics")} - {"num_classes", "seed"})
#: Settings that are compared by what they do in each epoch.
SCHEDULE = fields_affecting("schedule")
#: Precision, and batch norm over each process's images alone: named, but no other experiment.
NUMERICS = (*fields_affecting("numerics"), "processes")


class Difference(NamedTuple):
    """A setting of a record that is not its Run's."""

    setting: str
    value: str


# ------------------------------------------------------------------------------------------ the small record


def collect(summary: str | pathlib.Path, path: str | pathlib.Path) -> None:
    """Write the small form of a run's summary.json to `path`: figures rounded, class accuracies best and last only."""
    write_text(path, json.dumps(small(json.loads(pathlib.Path(summary).read_text()))) + "\n")


def small(summary: dict[str, Any]) -> dict[str, Any]:
    """The small form of a summary, a dict of the same shape, without settings that say where a run was."""
    kept = {name: value for name, value in summary.items() if name not in ("history", "settings")}
    places = fields_affecting("nothing")
    kept["settings"] = {name: value for name, value in summary["settings"].items() if name not in places}
    kept["history"] = [
        {
            **{name: record[name] for name in ("epoch", "seconds", "stage", "alpha")},
            "train": {name: record["train"][name] for name in ("loss", "acc1")},
            "test": {name: record["test"][name] for name in TEST_FIGURES},
        }
        for record in summary["history"]
    ]
    return rounded(kept)


def rounded(value: Any) -> Any:
    """Floats from 0.01 on to four digits after the point; settings untouched."""
    if isinstance(value, float):
        return value if abs(value) < 1e-2 else round(value, 4)
    if isinstance(value, dict):
        return {name: item if name == "settings" else rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------- reading


def load(path: str | pathlib.Path) -> dict[str, Any] | None:
    """The complete record in a file, None where the file holds no record at all.

    Raises:
        ValueError: half a record: it cannot be read, lacks something, its run has not ended, or its figures
            contradict each other.
    """
    path = pathlib.Path(path)
    if not path.is_file():  # nobody may ever write into a pipe
        raise ValueError("not a regular file")
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise ValueError("damaged or cut short") from None
    if not isinstance(record, dict):
        raise ValueError(f"damaged: a JSON {type(record).__name__}, not an object")
    if not {"settings", "history"} <= record.keys():
        return None
    missing = sorted(KEYS - record.keys())
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    try:
        _check(record)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError("damaged: a part has another form") from None
    return record


def _check(record):
    """ValueError where a record is unfinished or contradicts itself."""
    done, epochs, history = record["epochs_done"], record["settings"].get("epochs", 0), record["history"]
    if done < epochs:
        raise ValueError(f"unfinished, {done} of {epochs} epochs")
    if len(history) < done:
        raise ValueError(f"cut short, {len(history)} of {done} epochs")
    settings = settings_of(record["settings"])
    _check_lists(record)
    rows = {row["epoch"]: row["test"] for row in history}
    if [row["epoch"] for row in history] != [history[0]["epoch"] + i for i in range(len(history))]:
        raise ValueError("the epochs of its history do not rise by one")
    _check_stages(settings, history)
    for epoch, test in rows.items():
        _check_accuracies(test, f"epoch {epoch}")
    for when, epoch in (("best", record["best"]["epoch"]), ("last", history[-1]["epoch"])):
        found = record[when]
        _check_accuracies(found, when)
        if (
            found["epoch"] != epoch
            or epoch not in rows
            or any(found[name] != rows[epoch][name] for name in TEST_FIGURES)
        ):
            raise ValueError(f"{when} is not what the history has for that epoch")
    # a validation part picks the best epoch by figures that the small record does not keep
    if settings.val_fraction == 0 and record["best"]["acc1"] < max(test["acc1"] for test in rows.values()):
        raise ValueError("best is not the best epoch of the history")


def _check_lists(record):
    """TypeError where a list that the report reads is something else."""
    parts = record.get("trained_on", [])
    numbers = [*record["class_counts"], *(part[name] for part in parts for name in ("from_epoch", "processes"))]
    texts = [*record.get("forced", []), *(part["device"] for part in parts)]
    are_dicts = all(isinstance(part["versions"], dict) for part in parts)
    if not (all(isinstance(n, int) for n in numbers) and all(isinstance(t, str) for t in texts) and are_dicts):
        raise TypeError


def _check_stages(settings, history):
    """ValueError where an epoch was trained in another way than the settings say, as --force allows."""
    recipe = Recipe.from_settings(settings)
    for row in history:
        planned = dataclasses.asdict(recipe.stage(row["epoch"]))
        for name, value in row["stage"].items():
            is_same = math.isclose(value, planned[name], rel_tol=0.01) if name == "lr" else value == planned[name]
            if not is_same:
                raise ValueError(f"epoch {row['epoch']}: trained with {name} {value}, its settings say {planned[name]}")


def _check_accuracies(test, where):
    values = [(name, test[name]) for name in TEST_FIGURES if name != "loss"]
    values += [("per_class", value) for value in test.get("per_class") or ()]
    for name, value in values:
        if not (0 <= value <= 100 if value is not None else name not in ALWAYS):
            raise ValueError(f"{where}: {name} {json.dumps(value)} is no accuracy from 0 to 100")


def read(folder: str | pathlib.Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The records below `folder`, of a run's own summary.json as well, sorted by path.

    Returns:
        (records, left out): pairs of path and record; a line for each file that holds half a record.
    """
    found, left_out = [], []
    for path in sorted(pathlib.Path(folder).rglob("*.json")):
        try:
            record = load(path)
        except ValueError as error:
            left_out.append(f"{path.relative_to(folder)}: {error}")
            continue
        if record is not None:
            found.append((str(path.relative_to(folder)), record))
    return found, left_out


# ------------------------------------------------------------------------------------------ which run it is


def identify(record: dict[str, Any]) -> tuple[runs.Run | None, tuple[Difference, ...]]:
    """The Run that a record is, and what sets it apart from it: nothing, for the Run to the letter.

    What `describe` says of its settings; then other data than the paper's, batch norm over a part of each batch, and
    what --force has passed over.
    """
    settings = settings_of(record["settings"])
    run, difference = describe(record["settings"])
    if run is None:
        return None, ()
    difference += _differences_of_data(run, record)
    processes = max([settings.processes, *(part["processes"] for part in record.get("trained_on", ()))])
    if processes > 1 and not settings.sync_bn:
        difference += (Difference("processes", str(processes)),)
    return run, difference + tuple(Difference("--force", what) for what in record.get("forced", ()))


def describe(settings: dict[str, Any]) -> tuple[runs.Run | None, tuple[Difference, ...]]:
    """The Run that recorded settings are, and the settings that set them apart from it.

    The Run is None for a data set or a method that the paper does not have.
    """
    found = settings_of(settings)
    methods = {pair: name for name, pair in runs.METHODS.items()}
    method = methods.get((found.loss_type, found.train_rule))
    if method is None or found.dataset not in runs.SETUPS:
        return None, ()
    ratio = 1 if found.imb_type == "none" else round(1 / found.imb_factor)
    base = runs.Run(found.dataset, found.imb_type, ratio, method, subset=found.rand_number)
    candidates = [
        dataclasses.replace(base, variant=variant, protocol=protocol)
        for protocol in runs.SHORTENING
        for variant in runs.variants_of(found.dataset, method)
    ]
    differing = [(run, differences(command_settings(run), found)) for run in candidates]
    run, difference = min(differing, key=lambda pair: len(pair[1]))
    return dataclasses.replace(run, seed=found.seed or 0), difference


def _differences_of_data(run, record):
    """Another number of images than the whole data set, made long-tailed by the run, has: a part of it, or another."""
    setup, counts = run.setup, record["class_counts"]
    if setup.classes is None:
        return ()
    if run.dataset in runs.NATURAL:
        is_whole = (len(counts), sum(counts)) == (setup.classes, setup.train_images)
    else:
        available = [setup.train_images // setup.classes] * setup.classes
        try:
            is_whole = counts == class_counts(available, run.imb_type, 1 / run.ratio)
        except ValueError:  # a ratio that empties classes
            is_whole = False
    differs = []
    if not is_whole and not record["settings"].get("val_fraction"):
        differs.append(Difference("data", f"{sum(counts)} training images of {len(counts)} classes"))
    if record.get("test_images", setup.test_images) != setup.test_images:
        differs.append(Difference("data", f"{record['test_images']} test images"))
    return tuple(differs)


def settings_of(settings: dict[str, Any]) -> Settings:
    """Recorded settings as Settings. What older ones lack is as it was then: digits were mirrored at random too.

    Raises:
        ValueError: a value that no flag takes.
    """
    return from_record({"flip": "on", **settings})


@functools.cache
def command_settings(run: runs.Run, extra: tuple[str, ...] = ()) -> Settings:
    """The Settings of the Run's own command, with `extra` flags."""
    script, *argv = run.argv("out")
    return parser.parse(script, [*argv, *extra])


def differences(wanted: Settings, found: Settings) -> tuple[Difference, ...]:
    """The settings of `found` that make it another run than `wanted`; the seed is not looked at."""
    names = [name for name in COMPARED if _value(wanted, name) != _value(found, name)]
    if _plan(wanted) != _plan(found):
        names += [name for name in SCHEDULE if _value(wanted, name) != _value(found, name)]
    return tuple(Difference(name, _text(_value(found, name))) for name in names)


def _value(settings, name):
    if name == "flip" and settings.flip == "auto":  # what the data set says
        return "off" if settings.dataset == "digits" else "on"
    return getattr(settings, name)


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@functools.lru_cache(maxsize=1024)
def _plan(settings):
    """The first epoch, the stage of every epoch, and the constants in force in each kind of stage."""
    recipe = Recipe.from_settings(settings)
    stages, constants = recipe.stages(), {}
    for epoch, stage in enumerate(stages):
        kind = (stage.loss, stage.class_weights, stage.sampler)
        if kind not in constants:
            constants[kind] = recipe.constants_at(epoch)
    return settings.start_epoch, stages, constants
