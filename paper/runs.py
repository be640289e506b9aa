"""The runs behind the paper's cells: what each is called, its command, and what it shares with others.

The registry is asked about other methods than `METHODS` only: it imports torch, which takes seconds.
"""

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

PUBLISHED = pathlib.Path(__file__).with_name("published.csv")

#: `short` divides every length by this; the warm-up stays.
SHORTENING = {"full": 1, "short": 5}
WARMUP_EPOCHS = 5


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a data set is trained in the paper: the script, its model, the lengths in epochs.

    largest: training images of the largest class, which no ratio can exceed; classes, train_images, test_images: of the
    whole data set, None where no figure is published.
    """

    script: str
    arch: str
    epochs: int
    start_ib_epoch: int
    milestones: tuple[int, ...]
    drw_epoch: int
    batch_size: int = 128
    lr: float = 0.1
    lr_factors: tuple[float, ...] = (0.01, 0.01)
    ib_lr_factor: float = 0.01
    schedule: str = "step"
    largest: int = 500
    classes: int | None = None
    train_images: int | None = None
    test_images: int | None = None


CIFAR = Setup(
    "cifar_train.py", "resnet32", 200, 100, (160, 180), 160, classes=100, train_images=50_000, test_images=10_000
)
SETUPS = {
    "cifar10": dataclasses.replace(CIFAR, largest=5000, classes=10),
    "cifar100": CIFAR,
    "digits": Setup("cifar_train.py", "resnet20", 200, 100, (160, 180), 160, batch_size=32, largest=124),
    "tinyimagenet": Setup(
        "tinyimage_train.py", "resnet18", 100, 50, (90,), 90,
        lr_factors=(0.1,), classes=200, train_images=100_000, test_images=10_000,
    ),
    "inaturalist": Setup(
        "inat_train.py", "resnet50", 200, 50, (30, 180), 180,
        lr=0.01, lr_factors=(0.1, 0.1), ib_lr_factor=1.0, classes=8142, train_images=437_513, test_images=24_426,
    ),
}  # fmt: skip
#: Data sets that the paper does not have, added by reproduce.py.
OWN_SETUPS: dict[str, Setup] = {}
#: Data whose imbalance is their own.
NATURAL = ("inaturalist",)

#: method -> (loss, rule); the paper's CB is taken to be the Focal loss with CB weights.
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
    "VS": ("VS", "None"),
    "CE+DRW": ("CE", "DRW"),
    "CE+DRW-IB": ("CE", "DRW-IB"),
    "CE+DRS": ("CE", "DRS"),
    "CE+cRT": ("CE", "cRT"),
}
IB_LOSSES = ("IB", "IBFocal")
#: Epochs of cRT's second stage, which follows a whole run: those of Kang et al. on ImageNet-LT.
HEAD_EPOCHS = 10

#: Fig. 3: epochs at which the IB phase starts, of 200.
STARTS = (0, 20, 40, 60, 80, 100, 120)

#: Size of the gradient beside CE's -> settings; each of these arms of docs/factor.md is run at each.
GRADIENTS = {"third": 1 / 3, "1": 1.0, "3": 3.0}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "weights": ("class weights", {"ib_norm": "none"}),
    "attached": ("factor attached", {}),
    "detached": ("factor detached", {"detach_ib": True}),
}
FACTOR = {
    f"{arm}-grad{name}": {**changes, "alpha": "auto", "auto_target": "gradient", "auto_ratio": ratio}
    for arm, (_, changes) in ARMS.items()
    for name, ratio in GRADIENTS.items()
}
#: What a variant is called where its own name says too little.
TITLES = {
    f"{arm}-grad{name}": f"{title}, gradient x {name.replace('third', '1/3')}"
    for arm, (title, _) in ARMS.items()
    for name in GRADIENTS
}

#: variant -> the settings in which it differs from its method; lengths as in the full protocol. `ib-lr`, the lr of the
#: IB phase for CE, depends on the data set: see `Run.changes`.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "ib-lr": {},
    "l1-auto": {"alpha": "auto", "auto_target": "ce"},
    "l2-auto": {"ib_norm": "l2", "alpha": "auto", "auto_target": "ce"},
    "linf-auto": {"ib_norm": "linf", "alpha": "auto", "auto_target": "ce"},
    "eps1e-8": {"epsilon": 1e-8},
    "eps1e-2": {"epsilon": 1e-2},
    "no-factor": {"ib_norm": "none"},
    "weights-only": {"ib_norm": "none", "alpha": "auto", "auto_target": "ce"},
    "weights-at-ib": {"ib_norm": "none", "alpha": "auto", "auto_target": "ib"},
    "detached": {"detach_ib": True},
    **FACTOR,
    **{f"start{start:03d}": {"start_ib_epoch": start} for start in STARTS if start != 100},
    "paper-lr": {"recipe": "paper", "milestones": (50, 90), "lr_factors": (0.1, 0.1), "ib_lr_factor": 1.0},
    "ldam-recipe": {"recipe": "ldam", "epochs": 120},
}

#: What the paper lacks, variants of IB: two by two, {IB factor, class weights alone} x {loss at the size of CE, loss at
#: the size that IB with alpha 1000 has}, of which IB itself is one; no gradient through the factor; the arms of
#: docs/factor.md, all or one. And CE with the lr of the IB phase.
CONTROLS = ("ib-lr", "l1-auto", "weights-only", "weights-at-ib", "detached", "factor", *FACTOR)


class Rule(NamedTuple):
    """Of a `training.registry.RuleEntry` what tells which epochs runs share."""

    sampler: str = "none"
    start: str | None = None
    trains: str = "all"


#: The rules of `METHODS`, as the registry has them.
RULES = {
    **dict.fromkeys(("None", "CBReweight", "IBReweight"), Rule()),
    **dict.fromkeys(("DRW", "DRW-IB"), Rule(start="drw_epoch")),
    "DRS": Rule("Resample", "drw_epoch"),
    "cRT": Rule("Balanced", "drw_epoch", "head"),
}


def rule_of(name: str) -> Any:
    """`Rule` or `RuleEntry` of a rule by its name."""
    if name in RULES:
        return RULES[name]
    from training import registry

    return registry.RULES[name]


def has_first_phase(loss: str) -> bool:
    """Whether a loss by its name in the registry comes after a phase of plain CE."""
    if any(loss == of for of, _ in METHODS.values()):
        return loss in IB_LOSSES
    from training import registry

    return registry.LOSSES[loss].first_phase_ce


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
    def setup(self) -> Setup:
        return SETUPS.get(self.dataset) or OWN_SETUPS[self.dataset]

    @property
    def changes(self) -> dict[str, Any]:
        """The settings in which the variant differs from its method, lengths as in the full protocol."""
        if self.variant != "ib-lr":
            return VARIANTS[self.variant]
        setup = self.setup
        falls = sorted(
            [*zip(setup.milestones, setup.lr_factors, strict=True), (setup.start_ib_epoch, setup.ib_lr_factor)]
        )
        return {"milestones": tuple(epoch for epoch, _ in falls), "lr_factors": tuple(factor for _, factor in falls)}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the run names in its command, by the names of the flags, lengths as they are run."""
        loss, rule = pair_of(self.method)
        copied = ("epochs", "milestones", "lr_factors", "start_ib_epoch", "drw_epoch", "lr", "ib_lr_factor")
        found = {"loss_type": loss, "train_rule": rule, **{name: getattr(self.setup, name) for name in copied}}
        if rule_of(rule).trains == "head":
            found |= {"drw_epoch": found["epochs"], "epochs": found["epochs"] + HEAD_EPOCHS}
        found |= self.changes
        by = SHORTENING[self.protocol]
        for name in ("epochs", "start_ib_epoch", "drw_epoch"):
            found[name] //= by
        falls: dict[int, float] = {}
        for epoch, factor in zip(found["milestones"], found["lr_factors"], strict=True):
            falls[epoch // by] = falls.get(epoch // by, 1.0) * factor
        found |= {"milestones": tuple(falls), "lr_factors": tuple(falls.values())}
        found["keep_warmup"] = found["start_ib_epoch"] < WARMUP_EPOCHS
        if self.setup.schedule != "step":
            del found["milestones"], found["lr_factors"]
            found["schedule"] = self.setup.schedule
        return found

    @property
    def exp_str(self) -> str:
        """The last part of the run's name: protocol, seed, and what else differs."""
        parts = [self.protocol, f"s{self.seed}"]
        parts += [f"r{self.subset}"] * (self.subset != 0) + [self.variant] * (self.variant != "")
        return "_".join(parts)

    @property
    def name(self) -> str:
        """The name of the run's folder, as the scripts give it (Settings.name)."""
        factor = [] if self.imb_type == "none" else [str(1 / self.ratio)]
        return "_".join([self.dataset, self.setup.arch, *pair_of(self.method), self.imb_type, *factor, self.exp_str])

    @property
    def title(self) -> str:
        """The run as reports name it: method, variant."""
        return titled(self.method, self.variant)

    def argv(self, out: str | pathlib.Path, extra: Sequence[str] = ()) -> list[str]:
        """Script and flags, `extra` ones last; everything that the paper sets is named.

        Logs and checkpoints go below `out`. Other milestones have their own factors, or the script's; another schedule
        has none.
        """
        setup, settings = self.setup, self.settings
        if any(word.startswith("--mil") for word in extra):
            settings.pop("lr_factors", None)
        if any(word.startswith("--sched") for word in extra) and not {"step", "--schedule=step"} & {*extra}:
            settings = {name: value for name, value in settings.items() if name not in ("milestones", "lr_factors")}
        flags: list[Any] = ["--dataset", self.dataset, "-a", setup.arch, "--imb_type", self.imb_type]
        flags += ["--imb_factor", 1 / self.ratio, "--rand_number", self.subset, "--seed", self.seed]
        flags += ["--batch-size", setup.batch_size]
        for name in sorted(settings):  # other constants of a loss are left to the script's defaults
            flags += _flag(name, settings[name])
        roots = ["--root_log", f"{out}/log", "--root_model", f"{out}/checkpoint"]
        return [setup.script, *map(str, [*flags, "--exp_str", self.exp_str, *roots, *extra])]

    # ------------------------------------------------------------------------------ what runs share

    @property
    def family(self) -> tuple[Hashable, ...]:
        """Runs of one family train their first epochs alike, up to their `fork_epoch`."""
        loss, rule = pair_of(self.method)
        first, entry = self.title, rule_of(rule)
        is_ce = self.method == "CE" and self.variant in ("ib-lr", "paper-lr")
        samples = entry.sampler != "none" and entry.start is None  # in a first phase too
        if is_ce or (has_first_phase(loss) and not samples):
            first = "CE"
        elif entry.start == "drw_epoch":
            first = loss
        recipe = self.changes.get("recipe", "")
        return (self.dataset, self.imb_type, self.ratio, self.seed, self.subset, self.protocol, first, recipe)

    @property
    def trunk(self) -> "Run":
        """The run of its family that never leaves the common way."""
        *_, method, recipe = self.family
        if method not in METHODS:
            return self
        return dataclasses.replace(self, method=method, variant=self.variant if recipe else "")

    def fork_epoch(self, settings: Mapping[str, Any] | None = None) -> int:
        """Epochs that it takes over from its family; all of them for the run that the others fork from.

        settings: of the command with the flags for every script; None: the run's own.
        """
        settings = settings or self.settings
        rule = rule_of(settings["train_rule"])
        epoch = settings["drw_epoch" if rule.start == "drw_epoch" else "epochs"]
        if has_first_phase(settings["loss_type"]):
            epoch = min(epoch, settings["start_ib_epoch"])
        elif self.variant == "ib-lr":
            epoch = settings["start_ib_epoch"]
        elif rule.trains == "head":  # a run keeps no copy of its last checkpoint: an epoch is trained twice
            epoch = settings["drw_epoch"] - 1
        return min(epoch, settings["epochs"])


def pair_of(method: str) -> tuple[str, str]:
    """Loss and rule of a method: one of `METHODS`, or 'LOSS', 'LOSS+RULE' of the registry.

    >>> pair_of("IB+CB"), pair_of("GCE"), pair_of("BS+cRT")
    (('IB', 'CBReweight'), ('GCE', 'None'), ('BS', 'cRT'))
    """
    loss, _, rule = method.partition("+")
    return METHODS.get(method, (loss, rule or "None"))


def name_of_method(loss: str, rule: str) -> str:
    """The name of a loss with a rule, the one of `METHODS` where there is one."""
    named = {pair: name for name, pair in METHODS.items()}
    is_plain = rule == "None" and loss not in METHODS  # 'IB' alone is IB with its rule
    return named.get((loss, rule), loss if is_plain else f"{loss}+{rule}")


def titled(method: str, variant: str) -> str:
    """'IB (detached)'."""
    return f"{method} ({TITLES.get(variant, variant)})" if variant else method


def _flag(name, value):
    if isinstance(value, bool):
        return [f"--{name}"] * value
    return [f"--{name}", *(value if isinstance(value, tuple) else (value,))]


# ----------------------------------------------------------------------------------------------- selections


def published() -> list[dict[str, Any]]:
    """The rows of published.csv as dicts; ratio, value and spread are numbers, None where blank.

    whose: who published it. same_experiment: whether it is a run of ours that may be judged against it.
    """
    with open(PUBLISHED, newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row["ratio"] = int(row["ratio"] or 1)
        row["same_experiment"] = row["same_experiment"] == "yes"
        for name in ("value", "spread"):
            row[name] = float(row[name]) if row[name] else None
    return rows


def folder_setup(settings: Any) -> Setup:
    """The Setup of a folder of images, trained by folder_train.py with these Settings.

    Lengths that are not `settings.given` are those of CIFAR, scaled to `settings.epochs`.
    """
    names = ("epochs", "arch", "batch_size", "lr", "ib_lr_factor", "schedule", "start_ib_epoch", "drw_epoch")
    found = {name: getattr(settings, name) for name in (*names, "milestones", "lr_factors")}
    scale = settings.epochs / CIFAR.epochs
    for name in {"start_ib_epoch", "drw_epoch"} - settings.given:
        found[name] = round(getattr(CIFAR, name) * scale)
    if "milestones" not in settings.given:
        falls = [(round(e * scale), factor) for e, factor in zip(CIFAR.milestones, settings.lr_factors, strict=True)]
        falls = [(epoch, factor) for epoch, factor in falls if epoch < settings.epochs]
        found |= {"milestones": tuple(epoch for epoch, _ in falls), "lr_factors": tuple(factor for _, factor in falls)}
    return Setup("folder_train.py", **found, largest=10**9)


def cells_of_table(table: int) -> list[Run]:
    """The Runs behind a table of the paper (seed 0, full), each once, in its order."""
    found = [run for row in published() if row["table"] == str(table) for run in runs_of(row)]
    if table == 1:  # the other norms need `--alpha auto`: so does L1, to be compared with them
        found += [dataclasses.replace(run, variant="l1-auto") for run in found if run.variant == ""]
    return list(dict.fromkeys(found))


def runs_of(row: dict[str, Any]) -> list[Run]:
    """The Runs (seed 0, full) behind a row of published.csv.

    Table 5 has two for a figure of its authors: with the official code's lr, and with the lr that the paper prints.
    """
    run = Run(row["dataset"], row["imb_type"], row["ratio"], row["method"], row["variant"])
    both = row["table"] == "5" and not row["variant"]
    return [run, dataclasses.replace(run, variant="paper-lr")] if both else [run]


def cells_of_figure(figure: int, datasets: Sequence[str] = ("cifar10",), ratios: Sequence[int] = ()) -> list[Run]:
    """2: CE, balanced and long-tailed at ratio 100; 3: IB at ratios 10 and 100 over the start of its phase.

    The lengths are CIFAR's: data sets of other scripts are left out.
    """
    datasets = [dataset for dataset in datasets if dataset in SETUPS and SETUPS[dataset].script == CIFAR.script]
    if figure == 2:
        places = [("none", 1), *(("exp", ratio) for ratio in ratios or (100,))]
        return [Run(dataset, imb_type, ratio, "CE") for dataset in datasets for imb_type, ratio in places]
    variants = ["" if start == 100 else f"start{start:03d}" for start in STARTS]
    places = [(dataset, ratio) for dataset in datasets for ratio in ratios or (10, 100)]
    return [Run(dataset, "exp", ratio, "IB", variant) for dataset, ratio in places for variant in variants]


def grid(datasets: Iterable[str], imb_types: Sequence[str], ratios: Sequence[int], methods: Sequence[str]) -> list[Run]:
    """Every combination that the data allow, each once: what is not imbalanced has one ratio, 1."""
    found = [
        Run(dataset, imb_type, 1 if imb_type == "none" else ratio, method)
        for dataset in datasets
        for imb_type in (("none",) if dataset in NATURAL else imb_types)
        for ratio in ratios
        for method in methods
        if ratio <= Run(dataset, "exp", ratio, "CE").setup.largest or imb_type == "none"
    ]
    return list(dict.fromkeys(found))


def controls(names: Iterable[str], cells: Iterable[Run]) -> list[Run]:
    """The controls `names` in the data set, imbalance and ratio of each of `cells`."""
    variants = [variant for name in names for variant in (list(FACTOR) if name == "factor" else [name])]
    found = []
    for cell, variant in itertools.product(cells, variants):
        is_plain = variant == "ib-lr" and cell.setup.ib_lr_factor == 1  # CE has IB's lr as it is
        method = "CE" if variant == "ib-lr" else "IB"
        found.append(dataclasses.replace(cell, method=method, variant="" if is_plain else variant))
    return list(dict.fromkeys(found))


def spread_over(cells: Iterable[Run], seeds: Iterable[int], subsets: Iterable[int], protocol: str) -> list[Run]:
    """`cells` for every seed and subset."""
    every = itertools.product(seeds, subsets, cells)
    return [dataclasses.replace(cell, seed=seed, subset=subset, protocol=protocol) for seed, subset, cell in every]


def part_of(chosen: Sequence[Run], index: int, parts: int) -> list[Run]:
    """The `index`-th (from 1) of `parts` parts of the runs; a family, which shares epochs, stays together."""
    families = list(dict.fromkeys(run.family for run in chosen))
    return [run for run in chosen if families.index(run.family) % parts == index - 1]


def variants_of(dataset: str, method: str) -> list[str]:
    """The variants that the method can have on a data set."""
    loss, is_tiny = pair_of(method)[0], dataset == "tinyimagenet"

    def can_be(variant):
        if variant == "":
            return True
        if variant == "ib-lr":
            return method == "CE"
        if "recipe" in VARIANTS[variant]:  # a flag of the Tiny ImageNet script alone
            return is_tiny and (variant == "paper-lr" or loss == "LDAM")
        is_start = variant.startswith("start")
        return loss in IB_LOSSES and not (is_start and SETUPS[dataset].script != CIFAR.script)

    return [variant for variant in VARIANTS if can_be(variant)]
