"""What each epoch does, against the published settings."""

import dataclasses

import pytest

from training.recipe import LOSS_TYPES, TRAIN_RULES, Recipe, Stage


def lrs(**fields):
    return [stage.lr for stage in Recipe(**fields).stages()]


def test_published_steps_of_ce():
    lr = lrs()
    assert lr[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert [lr[159], lr[160], lr[179], lr[180], lr[199]] == pytest.approx([0.1, 1e-3, 1e-3, 1e-5, 1e-5])


def test_the_ib_phase_falls_to_one_percent_and_keeps_the_milestones():
    lr = lrs(loss_type="IB")
    assert [lr[99], lr[100], lr[159], lr[160], lr[180]] == pytest.approx([0.1, 1e-3, 1e-3, 1e-5, 1e-7])


def test_an_ib_phase_within_the_warmup_skips_its_rest_unless_asked():
    assert lrs(loss_type="IB", start_ib_epoch=0)[:6] == pytest.approx([1e-3] * 6)
    kept = lrs(loss_type="IB", start_ib_epoch=0, keep_warmup=True)
    assert kept[:6] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])


@pytest.mark.parametrize("loss", ["IB", "IBFocal"])
@pytest.mark.parametrize(("rule", "weights"), [("None", "none"), ("CBReweight", "CB"), ("IBReweight", "IB")])
def test_phase_one_is_plain_ce_without_weights(loss, rule, weights):
    recipe = Recipe(loss_type=loss, train_rule=rule, epochs=4, start_ib_epoch=2)
    assert [(s.loss, s.class_weights) for s in recipe.stages()] == [("CE", "none")] * 2 + [(loss, weights)] * 2


@pytest.mark.parametrize("loss", ["CE", "Focal", "LDAM"])
def test_other_losses_have_one_phase_with_their_weights_throughout(loss):
    stages = Recipe(loss_type=loss, train_rule="CBReweight", epochs=4, start_ib_epoch=2).stages()
    assert {(s.loss, s.class_weights) for s in stages} == {(loss, "CB")}


def test_drw_weights_begin_at_drw_epoch_in_a_run_of_any_length():
    stages = Recipe(loss_type="LDAM", train_rule="DRW", epochs=400, drw_epoch=320).stages()
    assert [s.class_weights for s in stages] == ["none"] * 320 + ["CB"] * 80


def test_resample_is_a_sampler_and_no_weight():
    assert {(s.sampler, s.class_weights) for s in Recipe(train_rule="Resample").stages()} == {("Resample", "none")}


def test_the_defaults_are_the_published_settings():
    assert dataclasses.asdict(Recipe()) == {
        "loss_type": "CE", "train_rule": "None", "epochs": 200, "lr": 0.1, "start_ib_epoch": 100, "warmup_epochs": 5,
        "milestones": (160, 180), "lr_factors": (0.01, 0.01), "ib_lr_factor": 0.01, "keep_warmup": False,
        "drw_epoch": 160,
    }  # fmt: skip
    assert LOSS_TYPES == ("CE", "Focal", "LDAM", "BS", "LA", "IB", "IBFocal")
    assert TRAIN_RULES == ("None", "Resample", "CBReweight", "IBReweight", "DRW")


def test_an_epoch_of_plain_ce_has_neither_weights_nor_sampler():
    assert Recipe().stage(7) == Stage(lr=0.1, loss="CE", class_weights="none", sampler="none")


def test_recipes_and_stages_are_values_that_do_not_change():
    for value, name in ((Recipe(), "lr"), (Recipe().stage(0), "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1.0)


def test_every_milestone_needs_its_factor():
    with pytest.raises(ValueError, match="zip"):
        Recipe(milestones=(1, 2), lr_factors=(0.1,)).stage(0)
