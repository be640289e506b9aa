"""Which loss, which class weights: the tables from names to what `losses.py` offers.

To add a loss: write it in losses.py, name it in `LOSSES`. To add a rule: its weights in `CLASS_WEIGHTS`, and
the epochs in which they are in force in recipe.py.
"""

import losses

#: name -> (criterion from (options, class counts, class weights), the options that it depends on)
LOSSES = {
    "CE": (lambda o, counts, w: losses.CrossEntropyLoss(w), ()),
    "Focal": (lambda o, counts, w: losses.FocalLoss(w, o.gamma, o.focal_scale), ("gamma", "focal_scale")),
    "LDAM": (lambda o, counts, w: losses.LDAMLoss(counts, o.max_m, w, o.s), ("max_m", "s")),
    "BS": (lambda o, counts, w: losses.BalancedSoftmaxLoss(counts, w), ()),
    "LA": (lambda o, counts, w: losses.LogitAdjustedLoss(counts, o.la_tau, w), ("la_tau",)),
    "IB": (
        lambda o, counts, w: losses.IBLoss(w, o.alpha, o.epsilon, o.ib_norm, o.detach_ib),
        ("alpha", "epsilon", "ib_norm", "detach_ib"),
    ),
    "IBFocal": (
        lambda o, counts, w: losses.IB_FocalLoss(w, o.alpha, o.gamma, o.epsilon, o.ib_norm, o.detach_ib),
        ("alpha", "gamma", "epsilon", "ib_norm", "detach_ib"),
    ),
}

#: name -> class weights from (options, class counts)
CLASS_WEIGHTS = {
    "none": lambda o, counts: None,
    "CB": lambda o, counts: losses.effective_number_weights(counts, o.beta),
    "IB": lambda o, counts: losses.inverse_frequency_weights(counts),
}


def build_criterion(stage, options, class_counts):
    """The criterion of a `recipe.Stage`."""
    weights = CLASS_WEIGHTS[stage.class_weights](options, class_counts)
    return LOSSES[stage.loss][0](options, class_counts, weights)


def constants(stage, options):
    """The options on which the stage's criterion and sampler depend, as a dict."""
    names = list(LOSSES[stage.loss][1])
    if stage.class_weights == "CB" or stage.sampler == "Resample":
        names.append("beta")
    return {name: getattr(options, name) for name in names}
