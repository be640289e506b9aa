"""What each epoch does, against the published settings."""

import itertools
import math

import pytest
from conftest import golden
from recipe_maker import CONSTANTS, recipe

from experiment.settings import Settings


def lrs(**fields):
    return [stage.lr for stage in recipe(**fields).stages()]


def test_golden_learning_rates():
    """Every epoch of the official script; those of Tiny ImageNet are in test_tinyimagenet_train.py."""
    rows = {key: expected for key, expected in golden("lr.json").items() if key.startswith("cifar/")}
    assert len(rows) == 10
    for key, expected in rows.items():
        _, loss, start = key.split("/")
        assert lrs(loss_type=loss, start_ib_epoch=int(start)) == pytest.approx(expected, rel=1e-12), key


def test_an_ib_phase_within_the_warmup_skips_its_rest_unless_asked():
    assert lrs(loss_type="IB", start_ib_epoch=0)[:6] == pytest.approx([1e-3] * 6)
    kept = lrs(loss_type="IB", start_ib_epoch=0, keep_warmup=True)
    assert kept[:6] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])


def test_cosine_schedule():
    lr = lrs(schedule="cosine", epochs=20)
    assert lr[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])  # the same warm-up
    half = [0.05 * (1 + math.cos(math.pi * e / 20)) for e in range(5, 20)]
    assert lr[5:] == pytest.approx(half, rel=1e-12)
    assert lr[10] == pytest.approx(0.05)  # half way, whatever the milestones are
    assert lr == lrs(schedule="cosine", epochs=20, milestones=(10,), lr_factors=(0.5,))


def test_cosine_schedule_of_an_ib_run_keeps_the_factor_of_the_ib_phase():
    plain = lrs(schedule="cosine", epochs=20)
    balanced = lrs(schedule="cosine", epochs=20, loss_type="IB", start_ib_epoch=12)
    assert balanced[:12] == plain[:12]
    assert balanced[12:] == pytest.approx([0.01 * lr for lr in plain[12:]], rel=1e-12)
    skipped = lrs(schedule="cosine", epochs=20, loss_type="IB", start_ib_epoch=0)
    assert skipped[1] == pytest.approx(5e-4 * (1 + math.cos(math.pi / 20)))
    kept = lrs(schedule="cosine", epochs=20, loss_type="IB", start_ib_epoch=0, keep_warmup=True)
    assert kept[1] == pytest.approx(4e-4)


def test_phase_one_is_plain_ce_without_weights():
    """Deferred ones neither, which would have begun in it."""
    rules = {"None": "none", "CBReweight": "CB", "IBReweight": "IB", "DRW": "CB", "DRW-IB": "IB"}
    for loss, (rule, weights) in itertools.product(("IB", "IBFocal"), rules.items()):
        made = recipe(loss_type=loss, train_rule=rule, epochs=4, start_ib_epoch=2, drw_epoch=1)
        assert [(s.loss, s.class_weights) for s in made.stages()] == [("CE", "none")] * 2 + [(loss, weights)] * 2


#: (class weights, sampler) before drw_epoch and from it on.
RULES = {
    "None": [("none", "none")] * 2,
    "CBReweight": [("CB", "none")] * 2,
    "IBReweight": [("IB", "none")] * 2,
    "Resample": [("none", "Resample")] * 2,
    "DRW": [("none", "none"), ("CB", "none")],
    "DRW-IB": [("none", "none"), ("IB", "none")],
    "DRS": [("none", "none"), ("none", "Resample")],
}


@pytest.mark.parametrize("rule", RULES)
def test_losses_of_one_phase_keep_their_rule_and_deferred_ones_begin_at_drw_epoch(rule):
    before, after = RULES[rule]
    for loss in ("CE", "Focal", "LDAM", "BS", "LA", "VS"):
        stages = recipe(loss_type=loss, train_rule=rule, epochs=400, drw_epoch=320, start_ib_epoch=2).stages()
        assert {stage.loss for stage in stages} == {loss}
        assert [(stage.class_weights, stage.sampler) for stage in stages] == [before] * 320 + [after] * 80


def slow_crt_lr(epoch, loss, cosine):
    """The lr of every epoch of a run of 12 + 5 epochs, written out; milestones at 8 and 10."""
    ib = 0.01 if loss == "IB" and epoch >= 9 else 1.0
    if epoch >= 12:
        return [0.1, 0.0904508497, 0.0654508497, 0.0345491503, 0.0095491503][epoch - 12] * ib
    if epoch < 5:
        return [0.02, 0.04, 0.06, 0.08, 0.1][epoch]
    if cosine:
        return 0.1 * math.cos(math.pi * epoch / 24) ** 2 * ib
    return (0.1 if epoch < 8 else 0.05 if epoch < 10 else 0.01) * ib


CRT = {"epochs": 17, "drw_epoch": 12, "milestones": (8, 10), "lr_factors": (0.5, 0.2), "start_ib_epoch": 9}


@pytest.mark.parametrize("schedule", ["step", "cosine"])
@pytest.mark.parametrize("loss", ["CE", "IB"])
def test_crt_keeps_the_lr_of_its_first_stage_and_starts_anew_in_the_second(loss, schedule):
    made = recipe(loss, "cRT", schedule=schedule, **CRT)
    lr = [stage.lr for stage in made.stages()]
    assert lr == pytest.approx([slow_crt_lr(e, loss, schedule == "cosine") for e in range(17)], rel=1e-8)
    assert lr[12] == 0.1 * (0.01 if loss == "IB" else 1)
    first = recipe(loss, "None", schedule=schedule, **{**CRT, "epochs": 12}).stages()
    assert made.stages()[:12] == first, "a finished run without the rule is no fork point"


def test_crt_trains_the_head_alone_with_balanced_classes_from_drw_epoch_on():
    for loss in ("LDAM", "IB"):
        stages = recipe(loss, "cRT", **CRT).stages()
        assert [(s.sampler, s.trains) for s in stages] == [("none", "all")] * 12 + [("Balanced", "head")] * 5
        assert {s.class_weights for s in stages} == {"none"}
        assert [s.loss for s in stages] == (["CE"] * 9 + ["IB"] * 8 if loss == "IB" else [loss] * 17)


def test_crt_without_its_second_stage_is_the_plain_rule_and_without_the_first_all_head():
    late = {**CRT, "drw_epoch": 40}
    assert recipe(train_rule="cRT", schedule="cosine", **late).stages() == recipe(schedule="cosine", **late).stages()
    stages = recipe(train_rule="cRT", **{**CRT, "epochs": 4, "drw_epoch": 0}).stages()
    assert [s.lr for s in stages] == pytest.approx([0.1, 0.0853553391, 0.05, 0.0146446609])
    assert {s.trains for s in stages} == {"head"}


def test_the_table_says_what_is_trained_where_that_changes():
    assert recipe(epochs=1, train_rule="DRS", drw_epoch=0).table().splitlines() == [
        "epoch_from_0,lr,loss,class_weights,sampler", "0,0.02,CE,none,Resample",
    ]  # fmt: skip
    assert recipe(epochs=3, train_rule="cRT", drw_epoch=1).table().splitlines() == [
        "epoch_from_0,lr,loss,class_weights,sampler,trains",
        "0,0.02,CE,none,none,all",
        "1,0.1,CE,none,Balanced,head",
        "2,0.05,CE,none,Balanced,head",
    ]


#: As published, CIFAR.
PUBLISHED = {
    "loss_type": "CE", "train_rule": "None", "epochs": 200, "lr": 0.1, "start_ib_epoch": 100, "warmup_epochs": 5,
    "milestones": (160, 180), "lr_factors": (0.01, 0.01), "ib_lr_factor": 0.01, "keep_warmup": False, "drw_epoch": 160,
    "schedule": "step",
}  # fmt: skip


def test_the_defaults_are_the_published_settings():
    assert {name: getattr(Settings(), name) for name in PUBLISHED} == PUBLISHED


def test_the_constants_of_an_epoch_are_those_in_force():
    fields = {"epochs": 6, "start_ib_epoch": 2, "drw_epoch": 4}
    ib = ("alpha", "epsilon", "ib_norm", "detach_ib", "auto_target", "auto_ratio")

    def names(epoch, loss, rule):
        found = recipe(loss_type=loss, train_rule=rule, **fields).constants_at(epoch)
        assert found == {name: CONSTANTS[name] for name in found}
        return tuple(found)

    assert names(1, "IB", "IBReweight") == ()
    assert names(2, "IB", "IBReweight") == ib
    assert names(2, "IB", "CBReweight") == (*ib, "beta")
    assert names(1, "IB", "Resample") == ("beta",)  # phase one samples too
    assert set(names(2, "IBFocal", "None")) == {*ib, "gamma"}
    assert [names(e, "CE", "DRS") for e in (3, 4)] == [(), ("beta",)]
    assert [names(e, "VS", "DRW") for e in (3, 4)] == [("vs_gamma", "vs_tau"), ("vs_gamma", "vs_tau", "beta")]
    assert names(5, "CE", "DRW-IB") == names(5, "CE", "cRT") == ()
