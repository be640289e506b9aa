"""How fast is this, against the plain loop of `plain.py`, in one interleaved run.

    python benchmarks/speed.py                      # a table, about five minutes on two cores
    python benchmarks/speed.py --quick              # under a minute, rough
    python benchmarks/speed.py --only epoch --json speed.json
    python benchmarks/speed.py --rate 800           # steps a second as the scripts train; start several to share a card

Synthetic images of CIFAR's size, ResNet-32, batch 128, on the first CUDA device or the CPU. Everything is interleaved
and repeated; the table gives medians and the lowest and highest repeat. Ratios are plain over ours, larger is better,
but for `ib_step`, IB over CE, and `memory`, ours over plain, where smaller is better.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
CLASSES, BATCH = 10, 128
#: Training and test images: on CUDA about those of CIFAR-100-LT, in whole batches.
SIZES = {"quick": (256, 256), "cpu": (3072, 2480), "cuda": (84 * BATCH, 10000)}

Times = dict[str, list[float]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest, number."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def synthetic(images: int) -> Any:
    """A data set of noise."""
    import numpy as np

    data = np.random.RandomState(0).randint(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    targets = [number % CLASSES for number in range(images)]
    return SimpleNamespace(data=data, targets=targets, mean=(0.5,) * 3, std=(0.25,) * 3, flip=True)


class Loops:
    """Both loops over the same images, each with a model of its own.

    `ways` are ours, as (model, precision, whether steps are captured): the plain steps in float32; on CUDA also the
    CUDA graph, which is the scripts' own way there, and what is to be compared with it.
    """

    def __init__(self, device: Any, train_size: int, test_size: int, compiled: bool = False) -> None:
        import torch

        import losses
        import models
        from benchmarks import plain
        from loaders.in_memory import InMemoryBatches
        from training import loop
        from training.precision import Compiled, Precision, on_device

        self.plain, self.loop, self.graphs = plain, loop, {}
        self.train_set, self.test_set = synthetic(train_size), synthetic(test_size)
        self.train_batches = InMemoryBatches(self.train_set, BATCH, device)
        self.test_batches = InMemoryBatches(self.test_set, BATCH, device)
        sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=2e-4, fused=True)
        self.plain_model = plain.out_of_place(models.resnet32(CLASSES)).to(device)
        self.plain_optimizer = sgd(self.plain_model.parameters(), fused=False)

        def ours(batch_norm="cudnn"):
            return on_device(models.resnet32(CLASSES), device, batch_norm)

        native, model = ours("native"), ours()
        self.ways: dict[str, tuple[Any, Any, bool]] = {"ours": (model, Precision(), False)}
        if device.type == "cuda":
            for name, precision in (("", Precision()), (", bf16", Precision("bf16", "cuda"))):
                self.ways |= {f"ours, graph{name}": (model, precision, True)}
                self.ways |= {f"ours, graph, native batch norm{name}": (native, precision, True)}
                if compiled:
                    self.ways |= {f"ours, graph, compiled{name}": (Compiled(ours()), precision, True)}
        self.best = "ours, graph" if device.type == "cuda" else "ours"
        self.optimizers = {part: sgd(part.parameters()) for part, *_ in self.ways.values()}
        self.ce, self.ib = losses.CrossEntropyLoss(), losses.IBLoss(torch.ones(CLASSES)).to(device)

    def batches(self, number: int) -> list:
        """The first batches of an epoch, ready on the device."""
        source = self.train_batches.train_epoch(0)
        return [next(source) for _ in range(number)]

    def train(self, way: str = "ours", criterion: Any = None, batches: Any = None) -> None:
        from training.cuda_graph import StepGraph

        model, precision, captured = self.ways[way]
        batches, criterion = batches or self.train_batches.train_epoch(0), criterion or self.ce
        graph = self.graphs.setdefault((way, criterion), StepGraph()) if captured else None
        optimizer = self.optimizers[model]
        self.loop.train_one_epoch(model, batches, criterion, optimizer, CLASSES, precision, None, graph)

    def evaluate(self) -> None:
        self.loop.evaluate(self.ways["ours"][0], self.test_batches.eval_epoch(), [1] * CLASSES)

    def plain_train(self, workers: int = 0, batches: Any = None) -> None:
        batches = batches or self.plain.loader(self.train_set, True, workers)
        self.plain.train_epoch(self.plain_model, batches, self.plain_optimizer)

    def plain_evaluate(self, workers: int = 0) -> None:
        self.plain.evaluate(self.plain_model, self.plain.loader(self.test_set, False, workers))


class Bench:
    """The machine, how thoroughly to measure, and the figures and ratios so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from training.precision import set_determinism
        from utils import choose_device

        self.device, self.options, self.torch = choose_device(), options, torch
        self.on_cuda = self.device.type == "cuda"
        set_determinism(False)  # cudnn.benchmark, TF32 convolutions: as the scripts train
        self.repeats, self.steps = (1, 1) if options.quick else (options.repeats, 8)
        self.sizes = SIZES["quick" if options.quick else self.device.type]
        self.figures: dict[str, dict] = {}
        self.spread: dict[str, dict] = {}
        self.loops = Loops(self.device, *self.sizes, options.compiled)

    def interleave(self, variants: Mapping[str, Callable[[], Any]], repeats: int = 1) -> Times:
        """Seconds of each variant: every repeat runs all of them, in turn; the first repeat is not counted."""
        times: Times = {name: [] for name in variants}
        for _ in range(1 + repeats * self.repeats):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                if self.on_cuda:
                    self.torch.cuda.synchronize()
                times[name].append(time.perf_counter() - started)
        times = {name: values[1:] for name, values in times.items()}
        self.figures |= {f"s, {name}": spread(values) for name, values in times.items()}
        return times

    def ratio(self, name: str, over: Sequence[float], under: Sequence[float]) -> None:
        """Of neighbouring repeats."""
        self.spread[name] = spread([a / b for a, b in zip(over, under, strict=True)])


def measure_steps(bench: Bench) -> None:
    """A training step, without the input pipeline and without a CUDA graph."""
    loops, batch = bench.loops, bench.loops.batches(1)
    contiguous = [(images.contiguous(), target) for images, target in batch]
    variants = {
        "plain step": lambda: loops.plain_train(batches=contiguous),
        "CE step": lambda: loops.train(batches=batch),
        "IB step": lambda: loops.train(criterion=loops.ib, batches=batch),
    }
    times = bench.interleave(variants, bench.steps)
    bench.ratio("step", times["plain step"], times["CE step"])
    bench.ratio("ib_step", times["IB step"], times["CE step"])


def measure_pipeline(bench: Bench) -> None:
    """Training batches of an epoch, on one thread."""
    loops, threads = bench.loops, bench.torch.get_num_threads()
    bench.torch.set_num_threads(1)
    variants = {
        "plain pipeline": lambda: list(loops.plain.loader(loops.train_set, True, 0)),
        "our pipeline": lambda: list(loops.train_batches.train_epoch(0)),
    }
    times = bench.interleave(variants)
    bench.torch.set_num_threads(threads)
    bench.ratio("pipeline", *times.values())


def measure_epoch(bench: Bench) -> None:
    """Training and evaluation, with the input pipeline."""
    loops = bench.loops
    variants: dict[str, Callable] = {f"train, {way}": functools.partial(loops.train, way) for way in loops.ways}
    variants |= {f"train, plain, {n} workers": functools.partial(loops.plain_train, n) for n in (0, 2)}
    variants |= {"eval, ours": loops.evaluate}
    variants |= {f"eval, plain, {n} workers": functools.partial(loops.plain_evaluate, n) for n in (0, 2)}
    times = bench.interleave(variants)
    ours = [a + b for a, b in zip(times[f"train, {loops.best}"], times["eval, ours"], strict=True)]
    bench.ratio("eval", times["eval, plain, 0 workers"], times["eval, ours"])
    for name, workers in (("epoch", 0), ("epoch_2_workers", 2)):
        parts = (times[f"{part}, plain, {workers} workers"] for part in ("train", "eval"))
        bench.ratio(name, [a + b for a, b in zip(*parts, strict=True)], ours)


def measure_memory(bench: Bench) -> None:
    """Peak of the proportional set size of a training process and its workers, in MB."""
    import psutil

    def in_use(process):
        with contextlib.suppress(psutil.Error):  # it has ended
            memory = process.memory_full_info()
            return getattr(memory, "pss", memory.uss)  # pss: Linux only
        return 0

    peaks: Times = {"ours": [], "plain": []}
    for _ in range(1 if bench.options.quick else 2):
        for who, values in peaks.items():
            process, peak = subprocess.Popen([sys.executable, __file__, "--train", who]), 0
            parent = psutil.Process(process.pid)
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, sum(map(in_use, [parent, *parent.children(recursive=True)])))
                time.sleep(0.05)
            if process.returncode:
                sys.exit(f"the training process ({who}) ended with status {process.returncode}")
            values.append(peak / 2**20)
    bench.figures |= {f"MB, {who}": spread(values) for who, values in peaks.items()}
    bench.ratio("memory", peaks["ours"], peaks["plain"])


def train_once(who: str) -> None:
    """An epoch and an evaluation, for `measure_memory`; the plain loop with two workers."""
    import torch

    loops = Loops(torch.device("cpu"), 12 * BATCH, 6 * BATCH)
    if who == "ours":
        loops.train()
        loops.evaluate()
    else:
        loops.plain_train(2)
        loops.plain_evaluate(2)


def print_rate(steps: int, way: str | None) -> None:
    """Steps a second with the input pipeline, after as many to warm up. way: one of `Loops`, None: the scripts'."""
    from training.precision import set_determinism
    from utils import choose_device

    set_determinism(False)
    loops = Loops(choose_device(), BATCH * steps, BATCH, "compiled" in (way or ""))
    if way not in (None, *loops.ways):
        sys.exit(f"--way {way!r} is none of these: {'; '.join(loops.ways)}")
    for _ in range(2):
        started = time.perf_counter()
        loops.train(way or loops.best)  # ends with a read from the device
    print(steps / (time.perf_counter() - started))


PARTS = {"steps": measure_steps, "pipeline": measure_pipeline, "epoch": measure_epoch, "memory": measure_memory}


def table(report: dict[str, dict]) -> str:
    """The report as Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in report["about"].items())]
    lines += ["", "| figure or ratio | median | lowest | highest | n |", "|---|---|---|---|---|"]
    for name, row in {**report["figures"], **report["spread"]}.items():
        cells = [f"{row[key]:.4g}" for key in ("median", "low", "high")]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    from utils import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rough repeat")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="measure these parts only")
    parser.add_argument("--compiled", action="store_true", help="on CUDA --compile too, which takes minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default=None, metavar="PATH")
    parser.add_argument("--rate", type=int, default=None, metavar="STEPS", help="print steps a second, and stop")
    parser.add_argument("--way", default=None, help="of --rate, as 'ours, graph, compiled, bf16'")
    parser.add_argument("--train", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.train:
        return train_once(options.train)
    if options.rate:
        return print_rate(options.rate, options.way)
    bench = Bench(options)
    for part in options.only:
        PARTS[part](bench)
    name = bench.torch.cuda.get_device_name(bench.device) if bench.on_cuda else "cpu"
    about = {**versions(), "device": name, "threads": bench.torch.get_num_threads(), "images": bench.sizes}
    report = {"about": about, "figures": bench.figures, "spread": bench.spread}
    print(table(report))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
