"""How often the rule of the report errs and decides, by simulation: `python -m benchmarks.verdicts` prints the table.

A seed draws one deviation that all methods share and one that is a method's own, so that two methods correlate over
seeds. The published figures are ours minus a known truth. Cells "level" compare one method with its published figure,
"gain" its gain over CE; "published drawn" draws the published figure as a run of its own instead of taking it as a
number. CE has a spread of 0.4 points; "unequal" gives the other method 1.0.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from paper import statistics

SPREAD, WIDE = 0.4, 1.0
SEEDS, TRUTHS = (3, 5), (0.0, 1.0, 3.0)


class Shares(NamedTuple):
    """Shares of the repeats in which each verdict was given."""

    agrees: float
    differs: float

    @property
    def decides(self) -> float:
        return self.agrees + self.differs


def draw(n: int, correlation: float, spread: float, repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Deviations of CE and of another method from their means, (repeats, 2, n): SPREAD and `spread`, correlated."""
    shared = rng.normal(size=(repeats, 1, n))
    own = rng.normal(size=(repeats, 2, n))
    deviations = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return deviations * np.array([SPREAD, spread])[:, None]


def shares(
    n: int, truth: float, *, what: str = "level", correlation: float = 0.0, spread: float = SPREAD,
    published_drawn: bool = False, repeats: int = 2000, seed: int = 0,
) -> Shares:  # fmt: skip
    """Verdicts on the `what` ('level' or 'gain') of a method that is `truth` points from the published figure."""
    rng = np.random.default_rng(seed)
    ce, method = draw(n, correlation, spread, repeats, rng).swapaxes(0, 1)
    differences = truth + (method if what == "level" else method - ce)
    if published_drawn:
        theirs = rng.normal(0, spread, (repeats, 1))
        differences = differences - (theirs if what == "level" else theirs - rng.normal(0, SPREAD, (repeats, 1)))
    verdicts = [statistics.against(one).verdict for one in differences.tolist()]
    differs = verdicts.count(statistics.HIGHER) + verdicts.count(statistics.LOWER)
    return Shares(verdicts.count(statistics.AGREES) / repeats, differs / repeats)


def table(repeats: int = 2000) -> list[str]:
    """Markdown: for every case and n the false "differs" (truth 0), the false "agrees" (truth at the margin), and how
    often it decides 0, 1 and 3 points away."""
    cases: list[tuple[str, dict[str, Any]]] = [("level", {}), ("level, published drawn", {"published_drawn": True})]
    cases += [(f"gain, correlation {c}", {"what": "gain", "correlation": c}) for c in (0.0, 0.9)]
    cases += [("gain, correlation 0.9, unequal", {"what": "gain", "correlation": 0.9, "spread": WIDE})]
    heads = ["case", "n", "false differs, truth 0", "false agrees, truth 1", "false differs, truth 1"]
    heads += [f"decides, truth {truth:g}" for truth in TRUTHS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for i, (name, case) in enumerate(cases):
        for n in SEEDS:
            at = {truth: shares(n, truth, repeats=repeats, seed=100 * i + n, **case) for truth in TRUTHS}
            cells = [at[0.0].differs, at[1.0].agrees, at[1.0].differs, *(at[truth].decides for truth in TRUTHS)]
            lines.append(f"| {name} | {n} | " + " | ".join(f"{100 * cell:.1f} %" for cell in cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.verdicts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000, help="default: %(default)s")
    level = statistics.LEVEL
    print(f'Nominal: false "agrees" at the margin {level:.1%}, false "differs" {level:.1%} or less.')
    print("\n".join(table(parser.parse_args(argv).repeats)))


if __name__ == "__main__":
    main()
