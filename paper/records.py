"""Records of runs: the small form that is kept, reading them, and which Run of the paper a record is.

A run is known by what is done, not by its name: the settings of a record are compared with those of the Run's own
command, as its script parses it.
"""

import dataclasses
import functools
import json
import pathlib
from statistics import fmean
from typing import Any, NamedTuple

from experiment import parser
from experiment.settings import Settings, fields_affecting, from_record
from files import write_text
from imbalance import class_counts
from paper import runs
from training.recipe import Recipe

TEST_FIGURES = ("loss", "acc1", "acc5", "class_mean", "many", "medium", "few")
KEYS = {"settings", "classes", "class_counts", "group_rule", "epochs_done", "best", "last", "history"}
#: Settings that are compared one by one; `num_classes` follows from the data set, seeds are told apart elsewhere.
COMPARED = sorted(
    {*fields_affecting("data", "model", "start", "optimizer", "selection", "numerics")} - {"num_classes", "seed"}
)
#: Settings that are compared by what they do in each epoch.
SCHEDULE = fields_affecting("schedule")
#: Precision, and batch norm over each process's images alone: named, but no other experiment.
NUMERICS = (*fields_affecting("numerics"), "processes")
#: Settings of which the Run itself says what they are.
OF_RUN = ("dataset", "imb_type", "imb_factor", "rand_number", "loss_type", "train_rule")


class Difference(NamedTuple):
    """A setting of a record that is not its Run's."""

    setting: str
    value: str


# ------------------------------------------------------------------------------------------ the small record


def collect(summary: str | pathlib.Path, path: str | pathlib.Path) -> None:
    """Write the small form of a run's summary.json to `path`: figures rounded, no lists in the history (classes: best
    and last only), no settings of a place."""
    whole, places = json.loads(pathlib.Path(summary).read_text()), fields_affecting("nothing")
    settings = {name: value for name, value in whole["settings"].items() if name not in places}
    small = {**whole, "settings": settings, "history": [_without_lists(epoch) for epoch in whole["history"]]}
    write_text(path, json.dumps(rounded(small)) + "\n")


def _without_lists(epoch):
    kept = {name: value for name, value in epoch.items() if name != "time" and not isinstance(value, list)}
    return {name: _without_lists(value) if isinstance(value, dict) else value for name, value in kept.items()}


def rounded(value: Any) -> Any:
    """Floats from 0.01 on to four digits after the point; settings untouched."""
    if isinstance(value, float):
        return value if abs(value) < 1e-2 else round(value, 4)
    if isinstance(value, dict):
        return {name: item if name == "settings" else rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def plateau(record: dict[str, Any]) -> dict[str, float | None]:
    """Mean of each test figure over the last tenth of the epochs, 180 to 199 of 200, counted from 0.

    Of a run whose last stage is shorter (cRT's new head), over that stage. None where the figure has no value.
    """
    history = record["history"]
    tail = history[-max(1, len(history) // 10) :]
    tests = [epoch["test"] for epoch in tail if _kind(epoch) == _kind(history[-1])]
    found = {}
    for name, value in tests[-1].items():
        if value is None or isinstance(value, (int, float)):
            values = [test.get(name) for test in tests]
            found[name] = None if None in values else fmean(values)
    return found


def _kind(epoch):
    return {name: value for name, value in epoch["stage"].items() if name != "lr"}


# --------------------------------------------------------------------------------------------------- reading


def load(path: str | pathlib.Path) -> dict[str, Any] | None:
    """The complete record in a file, None where the file holds something else than a record.

    Raises:
        ValueError: an incomplete record: it cannot be read, lacks something, or its run has not ended.
    """
    try:
        record = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError, RecursionError):
        raise ValueError("damaged or cut short") from None
    if not isinstance(record, dict) or not {"settings", "history"} <= record.keys():
        return None
    missing = sorted(KEYS - record.keys())
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    try:
        done, epochs = record["epochs_done"], record["settings"].get("epochs", 0)
        if done < epochs:
            raise ValueError(f"unfinished, {done} of {epochs} epochs")
        if len(record["history"]) < done:
            raise ValueError(f"cut short, {len(record['history'])} of {done} epochs")
        settings_of(record["settings"])
        tests = [epoch["test"] for epoch in record["history"]] + [record["best"], record["last"], plateau(record)]
        if not all(0 <= test[name] <= 100 for test in tests for name in ("acc1", "acc5", "class_mean")):
            raise ValueError("an accuracy outside of 0 to 100")
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError("damaged: a part has another form") from None
    return record


def read(folder: str | pathlib.Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The records below `folder`, of a run's own summary.json as well, sorted by path.

    Returns:
        (records, left out): pairs of path and record; a line for each file that holds an incomplete record.
    """
    found, left_out = [], []
    for path in sorted(path for path in pathlib.Path(folder).rglob("*.json") if path.is_file()):
        try:
            record = load(path)
        except ValueError as error:
            left_out.append(f"{path.relative_to(folder)}: {error}")
            continue
        if record is not None:
            found.append((str(path.relative_to(folder)), record))
    return found, left_out


# ------------------------------------------------------------------------------------------ which run it is


def identify(record: dict[str, Any]) -> tuple[runs.Run, tuple[Difference, ...]]:
    """The Run that a record is, and what sets it apart from it: nothing, for the Run exactly as the paper has it.

    What `describe` says of its settings; then other data than the paper's, batch norm over a part of each batch, and
    what --force has passed over.
    """
    settings = settings_of(record["settings"])
    run, difference = describe(record["settings"])
    difference += _differences_of_data(run, record)
    processes = max([settings.processes, *(part["processes"] for part in record.get("trained_on", ()))])
    if processes > 1 and not settings.sync_bn:
        difference += (Difference("processes", str(processes)),)
    return run, difference + tuple(Difference("--force", what) for what in record.get("forced", ()))


def describe(settings: dict[str, Any]) -> tuple[runs.Run, tuple[Difference, ...]]:
    """The Run that recorded settings are, and the settings that set them apart from it.

    A data set that the paper does not have gives a Run of the protocol 'own', and all its settings.
    """
    found = settings_of(settings)
    method = runs.name_of_method(found.loss_type, found.train_rule)
    ratio = 1 if found.imb_type == "none" else round(1 / found.imb_factor)
    base = runs.Run(found.dataset, found.imb_type, ratio, method, seed=found.seed or 0, subset=found.rand_number)
    if found.dataset not in runs.SETUPS:
        names = [name for name in (*COMPARED, *SCHEDULE) if name not in OF_RUN]
        values = tuple(Difference(name, _text(_value(found, name))) for name in names)
        return dataclasses.replace(base, protocol="own"), values
    candidates = [
        dataclasses.replace(base, variant=variant, protocol=protocol)
        for protocol in runs.SHORTENING
        for variant in runs.variants_of(found.dataset, method)
    ]
    differing = [(run, differences(command_settings(run), found)) for run in candidates]
    return min(differing, key=lambda pair: len(pair[1]))


def _differences_of_data(run, record):
    """Another number of images than the whole data set, made long-tailed by the run, has: a part of it, or another."""
    counts, setup = record["class_counts"], runs.SETUPS.get(run.dataset)
    text = f"{sum(counts)} training images of {len(counts)} classes"
    if setup is None:
        return (Difference("data", text),)
    if setup.classes is None:
        return ()
    if run.dataset in runs.NATURAL:
        is_whole = (len(counts), sum(counts)) == (setup.classes, setup.train_images)
    else:
        available = [(setup.train_images or 0) // setup.classes] * setup.classes
        is_whole = run.ratio <= available[0] and counts == class_counts(available, run.imb_type, 1 / run.ratio)
    differs = [] if is_whole or record["settings"].get("val_fraction") else [Difference("data", text)]
    if record.get("test_images", setup.test_images) != setup.test_images:
        differs.append(Difference("data", f"{record['test_images']} test images"))
    return tuple(differs)


def settings_of(settings: dict[str, Any]) -> Settings:
    """Recorded settings as Settings. What older ones lack is as it was then: digits were mirrored at random too.

    Raises:
        ValueError: a value that no flag takes.
    """
    return from_record({"flip": "on", **settings})


def command_settings(run: runs.Run, extra: tuple[str, ...] = ()) -> Settings:
    """The Settings of the Run's own command, with `extra` flags."""
    return _parsed(tuple(run.argv("out")), extra)


@functools.cache
def _parsed(command, extra):
    script, *argv = command
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
