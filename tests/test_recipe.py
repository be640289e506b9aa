"""What each epoch does, against the published settings."""

import pytest

from training.recipe import Recipe


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
