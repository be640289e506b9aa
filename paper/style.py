"""How methods look in figures: each has one colour, marker and name in all of them.

figure, axes = plots.subplots()
axes.plot(x, y, **style.of("IB"))
style.save(figure, folder, "name")              # name.png and name.pdf
"""

import os
import pathlib
from typing import Any

from experiment import plots
from paper import runs

#: More methods than these in one panel cannot be told apart.
MOST_IN_A_PANEL = 4

#: (method, variant) -> (name in a figure, colour, marker). Colours are Okabe and Ito's, and shades for variants.
METHODS = {
    ("CE", ""): ("CE", "#000000", "o"),
    ("CE", "ib-lr"): ("CE, lr of IB", "#8c8c8c", "X"),
    ("IB", ""): ("IB", "#d55e00", "s"),
    ("IB+CB", ""): ("IB+CB", "#0072b2", "^"),
    ("IB+Focal", ""): ("IB+Focal", "#009e73", "D"),
    ("BS", ""): ("Balanced Softmax", "#cc79a7", "v"),
    ("LA", ""): ("logit adjustment", "#e69f00", "P"),
    ("VS", ""): ("vector scaling", "#56b4e9", "<"),
    ("LDAM", ""): ("LDAM", "#7f6000", ">"),
    ("LDAM-DRW", ""): ("LDAM-DRW", "#a6761d", "h"),
    ("CE+cRT", ""): ("cRT", "#6a3d9a", "p"),
    ("IB", "l1-auto"): ("IB, loss as large as CE's", "#f4a261", "D"),
    ("IB", "weights-only"): ("class weights, loss as large as CE's", "#2a9d8f", "^"),
    ("IB", "weights-at-ib"): ("class weights, loss as large as IB's", "#1d4e89", "v"),
    ("IB", "detached"): ("IB, factor detached", "#9b2226", "P"),
    ("Focal", ""): ("Focal", "#117733", "d"),
    ("CB", ""): ("CB", "#332288", "*"),
    ("CE+CB", ""): ("CE+CB", "#999933", "<"),
    ("CE+DRW", ""): ("CE+DRW", "#882255", "H"),
    ("CE+DRW-IB", ""): ("CE+DRW-IB", "#aa4499", "8"),
    ("CE+DRS", ""): ("CE+DRS", "#44aa99", ">"),
}
#: For methods without an entry, in the order in which a figure meets them; no entry has both of a pair.
OTHERS = [("#5d6d7e", "d"), ("#b7950b", "8"), ("#4b0082", "h"), ("#7b241c", "*"), ("#196f3d", "H")]


def name_of(method: str, variant: str = "") -> str:
    """The name of a method in figures: never an internal one."""
    if (method, variant) in METHODS:
        return METHODS[method, variant][0]
    return runs.TITLES.get(variant) or runs.titled(method, variant.replace("-", " "))


def of(method: str, variant: str = "", nth: int = 0) -> dict[str, Any]:
    """Colour, marker and label for `axes.plot`; nth: which of a figure's methods it is, for one without an entry."""
    *_, color, marker = METHODS.get((method, variant), OTHERS[nth % len(OTHERS)])
    return {"color": color, "marker": marker, "label": plots.label(name_of(method, variant), 200)}


def save(figure: Any, folder: str | os.PathLike, name: str) -> pathlib.Path:
    """Write folder/name.png and folder/name.pdf. Returns the path of the PNG."""
    plots.save(figure, folder, f"{name}.pdf")
    return pathlib.Path(plots.save(figure, folder, f"{name}.png"))
