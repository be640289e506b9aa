"""The runs behind the paper's cells: what each is called, its command, and what it shares with others. Pure.

A run is known by what is done, not by its folder's name: `describe` finds the same fields in the settings that a
run has recorded.
"""

import csv
import dataclasses
import pathlib
from typing import Any

PUBLISHED = pathlib.Path(__file__).with_name("published.csv")

#: `short` divides every length by this; the warm-up stays.
SHORTENING = {"full": 1, "short": 5}
WARMUP_EPOCHS = 5


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a data set is trained in the paper: the script, its net, the lengths in epochs."""

    script: str
    arch: str
    epochs: int
    start_ib_epoch: int
    milestones: tuple
    drw_epoch: int
    batch_size: int = 128
    lr: float = 0.1
    lr_factors: tuple = (0.01, 0.01)
    ib_lr_factor: float = 0.01
    max_m: float = 0.5


CIFAR = Setup("cifar_train.py", "resnet32", 200, 100, (160, 180), 160)
SETUPS = {
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "digits": dataclasses.replace(CIFAR, arch="resnet20", batch_size=32),
    "tinyimagenet": Setup("tinyimage_train.py", "resnet18", 100, 50, (90,), 90, lr_factors=(0.1,)),
    "inaturalist": Setup(
        "inat_train.py", "resnet50", 200, 50, (30, 180), 180, 0, 0.01, (0.1, 0.1), 1.0, 0.3
    ),  # batch 0: the script's own
}

#: method -> (loss, rule); the paper's CB is the Focal loss with CB weights.
METHODS = {
    "CE": ("CE", "None"),
    "Focal": ("Focal", "None"),
    "CB": ("Focal", "CBReweight"),
    "CE+CB": ("CE", "CBReweight"),
    "LDAM": ("LDAM", "None"),
    "LDAM-DRW": ("LDAM", "DRW"),
    "IB": ("IB", "IBReweight"),
    "IB+CB": ("IB", "CBReweight"),
    "IB+Focal": ("IBFocal", "IBReweight"),
    "BS": ("BS", "None"),
    "LA": ("LA", "None"),
}

#: Fig. 3: epochs at which the IB phase starts, of 200.
STARTS = (0, 20, 40, 60, 80, 100, 120)

#: variant -> the settings in which it differs from its method; lengths as in the full protocol.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "l1-auto": {"alpha": "auto"},
    "l2-auto": {"ib_norm": "l2", "alpha": "auto"},
    "linf-auto": {"ib_norm": "linf", "alpha": "auto"},
    "eps1e-8": {"epsilon": 1e-8},
    "eps1e-2": {"epsilon": 1e-2},
    "no-factor": {"ib_norm": "none"},
    "weights-only": {"ib_norm": "none", "alpha": "auto"},
    "detached": {"detach_ib": True},
    "ib-lr": {"milestones": (100, 160, 180), "lr_factors": (0.01, 0.01, 0.01)},
    "ldam-recipe": {"recipe": "ldam", "epochs": 120},
    **{f"start{start:03d}": {"start_ib_epoch": start} for start in STARTS if start != 100},
}

#: What the paper lacks: CE with the lr of the IB phase; class weights alone, the loss at the size of CE; no gradient
#: through the factor.
CONTROLS = {"ib-lr": "CE", "weights-only": "IB", "detached": "IB"}

#: Settings that count for a loss or a rule, with the values of the method; others change nothing there.
CONSTANTS: dict[str, dict[str, Any]] = {
    "Focal": {"gamma": 1.0, "focal_scale": 10.0},
    "LDAM": {"s": 30.0},
    "LA": {"la_tau": 1.0},
    "IB": {"alpha": 1000.0, "epsilon": 1e-3, "ib_norm": "l1", "detach_ib": False},
    "IBFocal": {"alpha": 1000.0, "epsilon": 1e-3, "ib_norm": "l1", "detach_ib": False, "gamma": 1.0},
    "CBReweight": {"beta": 0.9999},
    "DRW": {"beta": 0.9999},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. ratio: of the largest class to the smallest (1: balanced); subset: `--rand_number`."""

    dataset: str
    imb_type: str
    ratio: int
    method: str
    variant: str = ""
    seed: int = 0
    subset: int = 0
    protocol: str = "full"

    @property
    def setup(self):
        return SETUPS[self.dataset]

    @property
    def settings(self):
        """The settings that make this run what it is, by the names of the flags, lengths as they are run."""
        loss, rule = METHODS[self.method]
        setup, changes = self.setup, VARIANTS[self.variant]
        found = {
            "loss_type": loss, "train_rule": rule, "epochs": setup.epochs, "milestones": setup.milestones,
            "lr_factors": setup.lr_factors, "start_ib_epoch": setup.start_ib_epoch, "drw_epoch": setup.drw_epoch,
            **CONSTANTS.get(loss, {}), **CONSTANTS.get(rule, {}), **changes,
        }  # fmt: skip
        if loss == "LDAM":
            found["max_m"] = setup.max_m
        by = SHORTENING[self.protocol]
        for name in ("epochs", "start_ib_epoch", "drw_epoch"):
            found[name] //= by
        found["milestones"] = tuple(m // by for m in found["milestones"])
        found["keep_warmup"] = found["start_ib_epoch"] < WARMUP_EPOCHS
        return found

    @property
    def exp_str(self):
        """The last part of the run's name: protocol, seed, and what else differs."""
        parts = [self.protocol, f"s{self.seed}"]
        parts += [f"r{self.subset}"] * (self.subset != 0) + [self.variant] * (self.variant != "")
        return "_".join(parts)

    @property
    def name(self):
        """The name of the run's folder, as the scripts give it (training/options.py)."""
        loss, rule = METHODS[self.method]
        parts = (self.dataset, self.setup.arch, loss, rule, self.imb_type, str(1 / self.ratio), self.exp_str)
        return "_".join(parts)

    @property
    def title(self):
        """The run for people: method, variant."""
        return titled(self.method, self.variant)

    def argv(self, out):
        """Script and flags; everything that the paper sets is named. Logs and checkpoints go below `out`."""
        setup, settings = self.setup, self.settings
        flags = ["--dataset", self.dataset, "-a", setup.arch, "--imb_type", self.imb_type]
        flags += ["--imb_factor", 1 / self.ratio, "--rand_number", self.subset, "--seed", self.seed]
        flags += ["--batch-size", setup.batch_size] if setup.batch_size else []
        flags += ["--lr", setup.lr, "--ib_lr_factor", setup.ib_lr_factor]
        # what a loss alone decides is left to the script's default unless the variant changes it
        wanted = {"loss_type", "train_rule", "epochs", "milestones", "start_ib_epoch", *VARIANTS[self.variant]}
        wanted |= {"drw_epoch"} if settings["train_rule"] == "DRW" else set()
        wanted |= {"lr_factors"} if "milestones" in VARIANTS[self.variant] else set()
        for name in sorted(wanted):
            flags += _flag(name, settings[name])
        flags += ["--keep_warmup"] if settings["keep_warmup"] else []
        roots = ["--root_log", f"{out}/log", "--root_model", f"{out}/checkpoint"]
        return [setup.script, *map(str, [*flags, "--exp_str", self.exp_str, *roots])]

    # ------------------------------------------------------------------------------ what runs share

    @property
    def family(self):
        """Runs of one family train their first epochs alike, up to their `fork_epoch`."""
        loss = self.settings["loss_type"]
        first = "CE" if loss in ("IB", "IBFocal") or self.title == "CE (ib-lr)" else self.title
        first = "LDAM" if self.method == "LDAM-DRW" else first
        recipe = self.settings.get("recipe", "")
        return (self.dataset, self.imb_type, self.ratio, self.seed, self.subset, self.protocol, first, recipe)

    @property
    def trunk(self):
        """The run of its family that never leaves the common way."""
        *_, method, recipe = self.family
        variant = self.variant if recipe else ""
        return dataclasses.replace(self, method=method, variant=variant) if method in ("CE", "LDAM") else self

    @property
    def fork_epoch(self):
        """Epochs that it shares with its family; all of them for the run that the others fork from."""
        settings = self.settings
        if settings["loss_type"] in ("IB", "IBFocal"):
            return settings["start_ib_epoch"]
        if settings["train_rule"] == "DRW":
            return settings["drw_epoch"]
        return settings["milestones"][0] if self.variant == "ib-lr" else settings["epochs"]


def titled(method, variant):
    """'IB (detached)'."""
    return f"{method} ({variant})" if variant else method


def _flag(name, value):
    if value is True:
        return [f"--{name}"]
    return [f"--{name}", *(value if isinstance(value, tuple) else (value,))]


# ----------------------------------------------------------------------------------------------- selections


def published():
    """The rows of published.csv as dicts; ratio, value, spread and runs are numbers, None where blank."""
    with open(PUBLISHED, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["ratio"] = int(row["ratio"] or 1)
        row["runs"] = int(row["runs"])
        for name in ("value", "spread"):
            row[name] = float(row[name]) if row[name] else None
    return rows


def cells_of_table(table):
    """The Runs behind a table of the paper (seed 0, full), each once, in its order."""
    found = [run_of(row) for row in published() if row["table"] == str(table)]
    if table == 1:  # the other norms need `--alpha auto`: so does L1, to be compared with them
        found += [dataclasses.replace(run, variant="l1-auto") for run in found if run.variant == ""]
    return list(dict.fromkeys(found))


def run_of(row):
    """The Run (seed 0, full) behind a row of published.csv."""
    return Run(row["dataset"], row["imb_type"], row["ratio"], row["method"], row["variant"])


def cells_of_figure(figure, datasets=("cifar10",), ratios=()):
    """2: CE, balanced and long-tailed at ratio 100; 3: IB at ratios 10 and 100 over the start of its phase."""
    if figure == 2:
        places = [("none", 1), *(("exp", ratio) for ratio in ratios or (100,))]
        return [Run(dataset, imb_type, ratio, "CE") for dataset in datasets for imb_type, ratio in places]
    variants = ["" if start == 100 else f"start{start:03d}" for start in STARTS]
    places = [(dataset, ratio) for dataset in datasets for ratio in ratios or (10, 100)]
    return [Run(dataset, "exp", ratio, "IB", variant) for dataset, ratio in places for variant in variants]


def grid(datasets, imb_types, ratios, methods):
    """Every combination that the data allow: the digits' largest class has 127 images, Tiny ImageNet's 500."""
    most = {"digits": 100}
    return [
        Run(dataset, imb_type, ratio, method)
        for dataset in datasets
        for imb_type in imb_types
        for ratio in ratios
        for method in methods
        if ratio <= most.get(dataset, ratio)
    ]


def controls(names, cells):
    """The controls `names` in the data set, imbalance and ratio of each of `cells`."""
    found = [dataclasses.replace(cell, method=CONTROLS[name], variant=name) for cell in cells for name in names]
    return list(dict.fromkeys(found))


def spread_over(cells, seeds, subsets, protocol):
    """`cells` for every seed and subset."""
    return [
        dataclasses.replace(cell, seed=seed, subset=subset, protocol=protocol)
        for seed in seeds
        for subset in subsets
        for cell in cells
    ]


# ------------------------------------------------------------------------------- from settings back to a run


def describe(settings):
    """The Run that the recorded `settings` of a run are, or (Run of its method, difference as text).

    Returns:
        (Run, difference): difference is '' where they are a Run's to the letter, else what sets them apart;
        Run is None for a data set or a method that the paper does not have.
    """
    methods = {pair: name for name, pair in METHODS.items()}
    method = methods.get((settings["loss_type"], settings["train_rule"]))
    if method is None or settings["dataset"] not in SETUPS:
        return None, "not in the paper"
    ratio = 1 if settings["imb_type"] == "none" else round(1 / settings["imb_factor"])
    base = Run(settings["dataset"], settings["imb_type"], ratio, method, "", settings["seed"], settings["rand_number"])
    candidates = [
        dataclasses.replace(base, variant=variant, protocol=protocol) for protocol in SHORTENING for variant in VARIANTS
    ]
    differences = [(run, _differences(run, settings)) for run in candidates]
    run, found = min(differences, key=lambda pair: len(pair[1]))
    return run, ", ".join(f"{name} {value}" for name, value in found.items())


def _differences(run, settings):
    """name -> recorded value, of what differs from the Run's settings and counts for its loss."""
    wanted = {**run.settings, "arch": run.setup.arch, "lr": run.setup.lr}
    if run.setup.batch_size:
        wanted["batch_size"] = run.setup.batch_size
    wanted.pop("recipe", None)
    is_ib = wanted["loss_type"] in ("IB", "IBFocal")
    counts = {"start_ib_epoch": is_ib, "keep_warmup": is_ib, "drw_epoch": wanted["train_rule"] == "DRW"}
    if is_ib:
        wanted["ib_lr_factor"] = run.setup.ib_lr_factor
    found = {}
    for name, value in wanted.items():
        have = settings.get(name, value)
        have = tuple(have) if isinstance(have, list) else have
        if counts.get(name, True) and have != value:
            found[name] = have
    return found
