"""How long the runs behind Table 4 take on one card and on eight, reckoned with the driver's own schedule.

    python benchmarks/simulate.py                       # three seeds
    python benchmarks/simulate.py --start_up 5 --rates 1500

Nothing is trained: `paper.driver.Driver` decides what runs when, and a clock is moved on. RATE is what the runs that
share a card make together, in steps a second; one alone is slower, see ALONE.
"""

import argparse
import collections
import io
import math
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from imbalance import class_counts
from paper import driver, executors, runs

#: Steps a second of a card that eight runs share -> of one run alone: seen for 274, predicted for the others.
ALONE = {274: 195, 700: 310, 1500: 570}
KINDS = ("steps", "evaluation", "end of an epoch", "start-up", "idle")
IMAGES = {"cifar10": [5000] * 10, "cifar100": [500] * 100}


def steps_of(run: runs.Run) -> int:
    """Steps of an epoch."""
    return math.ceil(sum(class_counts(IMAGES[run.dataset], run.imb_type, 1 / run.ratio)) / run.setup.batch_size)


class Cards(executors.Executor):
    """An executor (`paper/executors.py`) whose runs take no time but that of `clock`, in seconds."""

    def __init__(self, cards: int, rate: int, options: argparse.Namespace) -> None:
        super().__init__(options.jobs * cards, threads=1)
        self.places = options.jobs * cards
        self.rate, self.options = rate, options
        self.on: list[dict] = [{} for _ in range(cards)]  # of each card: run -> [seconds of start-up, epochs] left
        self.clock = 0.0
        self.spent: dict[str, float] = collections.defaultdict(float)  # seconds of cards by kind
        self.kept: set[tuple] = set()  # (run, epochs that it has behind it, from which others can fork)
        self.trained = 0  # steps
        self.driver: Schedule

    def room(self):
        return sum(map(len, self.on)) < self.places

    def start(self, run, command, log):
        fork = self.driver.fork_point(run)
        done = self.driver.fork_epoch(run) if fork else 0
        min(self.on, key=len)[run] = [self.options.start_up, self.driver.epochs(run) - done]
        self.trained += steps_of(run) * (self.driver.epochs(run) - done)

    def stop(self):
        pass

    def epoch(self, run, sharing):
        """Seconds of an epoch by kind, where `sharing` runs are on the card."""
        slower = max(1, sharing * ALONE[self.rate] / self.rate)
        steps = steps_of(run) / ALONE[self.rate] * slower
        return {"steps": steps, "evaluation": self.options.evaluation * slower, "end of an epoch": self.options.end}

    def marks(self, run):
        """Epochs that others of its family fork at."""
        found = {self.driver.fork_epoch(other) for other in self.driver.families[run.family]}
        return {epoch for epoch in found if 0 < epoch <= self.driver.fork_epoch(run)}

    def wait(self, seconds):
        """Move the clock on to the next thing that happens."""
        nearest = math.inf
        for card in self.on:
            for run, (start_up, left) in card.items():
                done = self.driver.epochs(run) - left
                stop = min([mark for mark in self.marks(run) if mark > done] + [done + left])
                nearest = min(nearest, start_up or (stop - done) * sum(self.epoch(run, len(card)).values()))
        ended = []
        for card in self.on:
            if not card:
                self.spent["idle"] += nearest
            for run, state in list(card.items()):
                self.move(run, state, nearest, len(card))
            ended += [run for run, (start_up, left) in card.items() if not start_up and left <= 1e-9]
            for run in [run for run in ended if run in card]:
                del card[run]
        self.clock += nearest
        return [(run, 0) for run in ended]

    def move(self, run, state, seconds, sharing):
        """`run` works for so many seconds."""
        if state[0]:
            self.spent["start-up"] += seconds / sharing
            state[0] = max(0.0, state[0] - seconds) if state[0] - seconds > 1e-9 else 0.0
            return
        parts = self.epoch(run, sharing)
        whole = sum(parts.values())
        for kind, part in parts.items():
            self.spent[kind] += seconds / sharing * part / whole
        state[1] -= seconds / whole
        done = self.driver.epochs(run) - state[1]
        self.kept |= {(run, mark) for mark in self.marks(run) if mark <= done + 1e-9}


class Schedule(driver.Driver):
    """The driver, with the checkpoints that `Cards` has."""

    executor: Cards

    def _is_begun(self, run):
        return False

    def fork_point(self, run):
        epoch = self.fork_epoch(run)
        found = [other for other in self.families[run.family] if (other, epoch) in self.executor.kept]
        return pathlib.Path(found[0].name) if self.forks(run) and found else None

    def _ended(self, run, status):
        self.state[run] = driver.DONE


def simulate(chosen: list[runs.Run], cards: int, rate: int, options: argparse.Namespace) -> Cards:
    """The executor at the end of all runs."""
    executor = Cards(cards, rate, options)
    with tempfile.TemporaryDirectory() as out:
        work = Schedule(chosen, out, f"{out}/results", executor, stream=io.StringIO())
        executor.driver = work
        work.run()
    return executor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, nargs="+", default=list(ALONE), choices=list(ALONE))
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--jobs", type=int, default=8, help="runs that share a card")
    parser.add_argument("--start_up", type=float, default=15, help="seconds of a run: imports, CUDA, data, figures")
    parser.add_argument("--evaluation", type=float, default=0.023, help="seconds of one alone, as seen on an H200")
    parser.add_argument("--end", type=float, default=0.02, help="seconds at the end of an epoch in which no step runs")
    options = parser.parse_args()
    chosen = runs.spread_over(runs.cells_of_table(4), range(options.seeds), [0], "full")
    print(f"| steps a second | cards | hours | card-hours | {' | '.join(f'% {kind}' for kind in KINDS)} |")
    print("|---" * (4 + len(KINDS)) + "|")
    for cards in options.cards:
        for rate in options.rates:
            found = simulate(chosen, cards, rate, options)
            hours, whole = found.clock / 3600, sum(found.spent.values())
            shares = [f"{100 * found.spent[kind] / whole:.0f}" for kind in KINDS]
            print(f"| {rate:,} | {cards} | {hours:.2f} | {hours * cards:.1f} | {' | '.join(shares)} |")
    alone = sum(steps_of(run) * run.settings["epochs"] for run in chosen)
    print(f"\n{len(chosen)} runs, {found.trained:,} steps; {alone:,} if no run forked")


if __name__ == "__main__":
    main()
