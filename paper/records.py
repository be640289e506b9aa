"""Records of runs: the small form that is kept, reading them, and which Run of the paper a record is.

A run is known by what is done, not by its name: the settings of a record are compared with those of the Run's own
command, as its script parses it.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import imbalance_cifar
from experiment import parser
from experiment.settings import FIELDS, UNPLANNED, Settings, fields_affecting, from_record
from files import write_text
from imbalance import class_counts
from paper import runs
from training.recipe import Recipe
from training.registry import RULES, all_constants

KEYS = {"settings", "classes", "class_counts", "group_rule", "epochs_done", "best", "last", "history"}
#: Settings that are compared one by one; `num_classes` follows from the data set, seeds are told apart elsewhere.
COMPARED = sorted(
    {*fields_affecting("data", "model", "start", "optimizer", "selection", "numerics"), *UNPLANNED}
    - {"num_classes", "seed"}
)
#: Settings that are compared by what they do in each epoch.
SCHEDULE = tuple(name for name in fields_affecting("schedule") if name not in UNPLANNED)
#: Precision, and batch norm over each process's images alone: named, but no other experiment.
NUMERICS = (*fields_affecting("numerics"), "processes")
#: Settings of which the Run itself says what they are.
OF_RUN = ("dataset", "imb_type", "imb_factor", "rand_number", "loss_type", "train_rule")
#: What sets a record apart from its Run: (setting, its value there).
Differences = tuple[tuple[str, str], ...]


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


# --------------------------------------------------------------------------------------------------- reading


def load(path: str | pathlib.Path) -> dict[str, Any] | None:
    """The complete record in a file, None where the file holds something else than a record.

    Raises:
        ValueError: an incomplete record: it cannot be read, lacks something, or its run has not ended.
    """
    try:
        record = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError):
        raise ValueError("damaged or cut short") from None
    if not isinstance(record, dict) or not {"settings", "history"} <= record.keys():
        return None
    if missing := sorted(KEYS - record.keys()):
        raise ValueError(f"lacks {', '.join(missing)}")
    settings = settings_of(record["settings"])
    if record["epochs_done"] < settings.epochs:
        raise ValueError(f"unfinished, {record['epochs_done']} of {settings.epochs} epochs")
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
            left_out.append(f"{path}: {error}")
            continue
        if record is not None:
            found.append((str(path), record))
    return found, left_out


# ------------------------------------------------------------------------------------------ which run it is


def identify(record: dict[str, Any]) -> tuple[runs.Run, Differences]:
    """The Run that a record is, and what sets it apart from it: nothing, for the Run exactly as the paper has it.

    What `describe` says of its settings; then other data than the paper's, batch norm over a part of each batch, and
    what --force has passed over.
    """
    settings = settings_of(record["settings"])
    run, difference = describe(record["settings"])
    difference += _differences_of_data(run, record)
    processes = max([settings.processes, *(part["processes"] for part in record.get("trained_on", ()))])
    if processes > 1 and not settings.sync_bn:
        difference += (("processes", str(processes)),)
    return run, difference + tuple(("--force", what) for what in record.get("forced", ()))


def describe(settings: dict[str, Any]) -> tuple[runs.Run, Differences]:
    """The Run that recorded settings are, and the settings that set them apart from it.

    A data set that the paper does not have gives a Run of the protocol 'own', and all its settings; of the constants
    of methods those that are in force in an epoch, with another value than the default.
    """
    found = settings_of(settings)
    method = runs.name_of_method(found.loss_type, found.train_rule)
    ratio = 1 if found.imb_type == "none" else round(1 / found.imb_factor)
    base = runs.Run(found.dataset, found.imb_type, ratio, method, seed=found.seed or 0, subset=found.rand_number)
    if found.dataset not in runs.SETUPS:
        in_force = {name for constants in _plan(found)[2].values() for name in constants}
        if found.alpha != "auto":
            in_force -= {"auto_target", "auto_ratio"}
        defaults = {name: parser.COMMON.get(name, FIELDS[name].default) for name in all_constants()}
        usual = {name for name, value in defaults.items() if name not in in_force or getattr(found, name) == value}
        usual |= {"epochs", "drw_epoch"} if RULES[found.train_rule].trains == "head" else set()  # a second stage
        names = [name for name in (*COMPARED, *SCHEDULE) if name not in OF_RUN and name not in usual]
        return dataclasses.replace(base, protocol="own"), _named(found, names)
    candidates = {}
    for protocol in runs.SHORTENING:
        for variant in runs.variants_of(found.dataset, method):
            run = dataclasses.replace(base, variant=variant, protocol=protocol)
            # seeds do not count: one command is parsed for all of them
            candidates[run] = differences(command_settings(dataclasses.replace(run, seed=0)), found)
    return min(candidates.items(), key=lambda pair: len(pair[1]))


def _differences_of_data(run, record):
    """Another number of images than the whole data set, made long-tailed by the run, has: a part of it, or another."""
    counts, setup = record["class_counts"], runs.SETUPS.get(run.dataset)
    text = f"{sum(counts)} training images of {len(counts)} classes"
    if setup is None:
        return (("data", text),)
    if setup.classes is None:
        return ()
    if run.dataset in runs.NATURAL:
        is_whole = (len(counts), sum(counts)) == (setup.classes, setup.train_images)
    else:
        available = [(setup.train_images or 0) // setup.classes] * setup.classes
        is_whole = run.ratio <= available[0] and counts == class_counts(available, run.imb_type, 1 / run.ratio)
    differs = [] if is_whole or record["settings"].get("val_fraction") else [("data", text)]
    if record.get("test_images", setup.test_images) != setup.test_images:
        differs.append(("data", f"{record['test_images']} test images"))
    return tuple(differs)


def precision(record: dict[str, Any]) -> str:
    """--amp's, or without it 'float32' or 'TF32': the latter for the convolutions on a GPU."""
    amp = record["settings"].get("amp", "none")
    used = [record.get("versions", {}), *(part["versions"] for part in record.get("trained_on", ()))]
    in_tf32 = any(part.get("tf32") == "on" for part in used)
    return amp if amp != "none" else "TF32" if in_tf32 else "float32"


def settings_of(settings: dict[str, Any]) -> Settings:
    """Recorded settings as Settings. What older ones lack is as it was then: digits were mirrored at random too.

    Raises:
        ValueError: a value that no flag takes.
    """
    return from_record({"flip": "on", **settings})


def command_settings(run: runs.Run, extra: tuple[str, ...] = ()) -> Settings:
    """The Settings of the Run's own command, with `extra` flags."""
    return _parsed(*run.argv("out", extra))


@functools.cache
def _parsed(script, *argv):
    return parser.parse(script, argv)


def differences(wanted: Settings, found: Settings) -> Differences:
    """The settings of `found` that make it another run than `wanted`; the seed is not looked at."""
    names = [name for name in COMPARED if _value(wanted, name) != _value(found, name)]
    if _plan(wanted) != _plan(found):
        names += [name for name in SCHEDULE if _value(wanted, name) != _value(found, name)]
    return _named(found, names)


def _named(settings, names):
    """(name, value as text) of some settings."""
    values = [_value(settings, name) for name in names]
    texts = [" ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value) for value in values]
    return tuple(zip(names, texts, strict=True))


def _value(settings, name):
    if name == "imb_factor" and settings.imb_type == "none":  # it has no effect
        return 1.0
    if name == "flip" and settings.flip == "auto":  # what the data set says
        return "on" if getattr(imbalance_cifar.DATASETS.get(settings.dataset), "flip", True) else "off"
    return getattr(settings, name)


@functools.lru_cache(maxsize=1024)
def _plan(settings):
    """The first epoch, the stage of every epoch, and the constants in force in each kind of stage."""
    recipe = Recipe(settings)
    stages = recipe.stages()
    kinds = {dataclasses.replace(stage, lr=0.0): epoch for epoch, stage in enumerate(stages)}
    return settings.start_epoch, stages, {kind: recipe.constants_at(epoch) for kind, epoch in kinds.items()}
