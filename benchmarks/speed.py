"""How fast is this, against the plain loop of `plain.py`, in one interleaved run.

    python benchmarks/speed.py                      # a table, about ten minutes on two cores
    python benchmarks/speed.py --quick              # under a minute, rough
    python benchmarks/speed.py --only folder        # one part; --help lists them
    python benchmarks/speed.py --json speed.json --markdown speed.md

Synthetic images of CIFAR's size, ResNet-32, batch 128, on the first CUDA device or the CPU. Every comparison is
interleaved and repeated; the table gives medians and the lowest and highest repeat. Ratios are plain over ours (larger
is better), but for `side_by_side`, two of our runs over one (larger is better), `ib_step`, IB over CE, and `memory` and
`first_batch`, ours over the other (smaller is better).
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CLASSES, BATCH = 10, 128
#: Training and test images: on CUDA those of CIFAR-100-LT.
SIZES = {"quick": (256, 256), "cpu": (3072, 2480), "cuda": (10847, 10000)}
#: What operators of a training step are for, by a part of their names; everything else is 'rest'.
KINDS = {
    "convolution": ("convolution",),
    "batch norm": ("batch_norm",),
    "ReLU": ("relu", "clamp_min", "threshold"),
    "shortcuts": ("aten::add_",),
}

Times = dict[str, list[float]]
Variants = Mapping[str, Callable[[], Any]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest, number."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def iterate(batches):
    for _ in batches:
        pass


class Bench:
    """The machine, how thoroughly to measure, and the figures and ratios so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from training.precision import set_determinism
        from utils import choose_device

        self.device, self.options, self.torch = choose_device(), options, torch
        self.on_cuda = self.device.type == "cuda"
        self.threads = options.threads or torch.get_num_threads()
        torch.set_num_threads(self.threads)
        set_determinism(False)  # cudnn.benchmark, TF32 convolutions: as the scripts train
        self.repeats, self.steps = (1, 1) if options.quick else (options.repeats, 8)
        self.sizes = SIZES["quick" if options.quick else self.device.type]
        self.figures: dict[str, dict] = {}
        self.spread: dict[str, dict] = {}

    @functools.cached_property
    def loops(self) -> "Loops":
        """Both loops, warm."""
        loops = Loops(self.device, *self.sizes, self.on_cuda and self.options.compiled)
        loops.train(batches=loops.batches(2))
        loops.plain_train(batches=loops.batches(2))
        return loops

    @contextlib.contextmanager
    def one_thread(self):
        self.torch.set_num_threads(1)
        yield
        self.torch.set_num_threads(self.threads)

    def interleave(self, variants: Variants, repeats: int | None = None, warm_up: bool = False) -> Times:
        """Seconds of each variant: every repeat runs all of them, in turn."""
        times: Times = {name: [] for name in variants}
        skipped = int(warm_up or self.on_cuda)
        for _ in range(skipped + (repeats or self.repeats)):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                if self.on_cuda:
                    self.torch.cuda.synchronize()
                times[name].append(time.perf_counter() - started)
        return {name: values[skipped:] for name, values in times.items()}

    def figure(self, name: str, values: Sequence[float]) -> None:
        self.figures[name] = spread(values)

    def ratio(self, name: str, over: Sequence[float], under: Sequence[float]) -> None:
        """Of neighbouring repeats."""
        self.spread[name] = spread([a / b for a, b in zip(over, under, strict=True)])


class Loops:
    """Both loops over the same synthetic images, each with a model of its own.

    `ways` are ours: float32, and on CUDA bfloat16 ones, those replayed as a CUDA graph (the scripts' own way there) and
    compiled ones too.
    """

    def __init__(self, device: Any, train_size: int, test_size: int, compiled: bool = False) -> None:
        import torch

        import losses
        import models
        from benchmarks import plain
        from loaders.in_memory import InMemoryBatches
        from training import loop
        from training.optimizer import sgd
        from training.precision import Compiled, Precision

        self.plain, self.loop = plain, loop
        self.train_set, self.test_set = synthetic(train_size), synthetic(test_size)
        self.train_batches = InMemoryBatches(self.train_set, BATCH, device)
        self.test_batches = loop.for_evaluation(InMemoryBatches(self.test_set, BATCH, device), 32)
        torch.manual_seed(0)
        self.plain_model = plain.out_of_place(models.resnet32(CLASSES)).to(device)
        self.plain_optimizer = torch.optim.SGD(self.plain_model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4)
        torch.manual_seed(0)
        model = models.resnet32(CLASSES).to(device).to(memory_format=torch.channels_last)
        self.graphs: dict[tuple[str, Any], Any] = {}
        self.ways: dict[str, tuple[Any, Any, bool]] = {"": (model, Precision(), False)}
        if device.type == "cuda":
            self.ways[", bf16"] = model, Precision("bf16", "cuda"), False
            self.ways[", graph"] = model, Precision(), True
            self.ways[", graph, bf16"] = model, Precision("bf16", "cuda"), True
        if compiled:
            self.ways[", compiled"] = Compiled(model, device), Precision(), False
        self.optimizer = sgd(model, 0.01, 0.9, 2e-4)
        self.ce, self.ib = losses.CrossEntropyLoss(), losses.IBLoss(torch.ones(CLASSES)).to(device)

    def batches(self, number: int) -> list:
        """The first batches of an epoch, ready on the device, for steps without a pipeline."""
        source = self.train_batches.train_epoch(0)
        return [next(source) for _ in range(number)]

    def train(self, way: str = "", criterion: Any = None, batches: Any = None) -> None:
        from training.cuda_graph import StepGraph

        model, precision, captured = self.ways[way]
        batches, criterion = batches or self.train_batches.train_epoch(0), criterion or self.ce
        graph = self.graphs.setdefault((way, criterion), StepGraph()) if captured else None
        self.loop.train_one_epoch(model, batches, criterion, self.optimizer, CLASSES, precision, None, graph)

    def evaluate(self, way: str = "") -> None:
        self.loop.evaluate(self.ways[""][0], self.test_batches.eval_epoch(), [1] * CLASSES, self.ways[way][1])

    def plain_train(self, workers: int = 0, batches: Any = None) -> None:
        batches = batches or self.plain.loader(self.train_set, True, workers)
        self.plain.train_epoch(self.plain_model, batches, self.plain_optimizer)

    def plain_evaluate(self, workers: int = 0) -> None:
        self.plain.evaluate(self.plain_model, self.plain.loader(self.test_set, False, workers))


def synthetic(size: int, side: int = 32) -> Any:
    """A data set of noise."""
    import numpy as np

    from imbalance_cifar import CIFAR_MEAN, CIFAR_STD

    images = np.random.RandomState(0).randint(0, 256, (size, side, side, 3), dtype=np.uint8)
    targets = [i % CLASSES for i in range(size)]
    return SimpleNamespace(
        data=images, targets=targets, chosen=range(size), mean=CIFAR_MEAN, std=CIFAR_STD, flip=True
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- measurements


def measure_steps(bench: Bench) -> None:
    """A training step without the pipeline, in turn, step by step, since IB and CE are close; its share of the peak."""
    from torch.utils.flop_counter import FlopCounterMode

    loops = bench.loops
    batch = loops.batches(1)
    contiguous = [(images.contiguous(), target) for images, target in batch]
    variants = {"plain step": lambda: loops.plain_train(batches=contiguous)}
    for way in [way for way, (*_, captured) in loops.ways.items() if not captured]:  # which wants an epoch's loader
        variants[f"CE step{way}"] = functools.partial(loops.train, way, loops.ce, batch)
        variants[f"IB step{way}"] = functools.partial(loops.train, way, loops.ib, batch)
    times = bench.interleave(variants, bench.repeats * bench.steps)
    for name, values in times.items():
        bench.figure(f"s, {name}", values)
    bench.ratio("step", times["plain step"], times["CE step"])
    bench.ratio("ib_step", times["IB step"], times["CE step"])
    if bench.on_cuda:
        bench.figure("MB, GPU memory", [bench.torch.cuda.max_memory_allocated() / 2**20])
    with FlopCounterMode(display=False) as counter:
        loops.train(batches=batch)
    peak, reached = best_product(bench), counter.get_total_flops() / statistics.median(times["CE step"])
    bench.figure("GFLOP/s, matrix product", [peak / 1e9])
    bench.figure("GFLOP/s, training step", [reached / 1e9])
    bench.ratio("peak_share", [reached], [peak])


def best_product(bench: Bench) -> float:
    """FLOP/s of a large matrix product; in TF32 on CUDA, as the convolutions are."""
    matmul, side = bench.torch.backends.cuda.matmul, 8192 if bench.on_cuda else 2048
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    a, b = (bench.torch.randn(side, side, device=bench.device) for _ in range(2))
    times = bench.interleave({"product": lambda: a @ b}, 4 * bench.repeats, warm_up=True)
    matmul.allow_tf32 = before
    return 2 * side**3 / min(times["product"])


def measure_profile(bench: Bench) -> None:
    """Shares of a training step's own time, by kind of operator, in percent; on CUDA of the kernels that it starts."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    batches, totals = bench.loops.batches(bench.steps), dict.fromkeys([*KINDS, "rest"], 0.0)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * bench.on_cuda]) as profiler:
        bench.loops.train(batches=batches)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # an operator; kernels come again by names of their own
            kind = next((k for k, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "rest")
            totals[kind] += event.self_device_time_total if bench.on_cuda else event.self_cpu_time_total
    for kind, total in totals.items():
        bench.figure(f"% of a step, {kind}", [100 * total / sum(totals.values())])


def measure_pipeline(bench: Bench) -> None:
    """Images per second, on one thread; two workers are two threads."""
    loops = bench.loops

    def plain(workers):
        iterate(loops.plain.loader(loops.train_set, True, workers))

    variants: dict[str, Callable[[], Any]] = {f"plain, {n} workers": functools.partial(plain, n) for n in (0, 2)}
    variants["ours"] = lambda: iterate(loops.train_batches.train_epoch(0))
    with bench.one_thread():
        times = bench.interleave(variants)
    for name, values in times.items():
        bench.figure(f"images/s, {name}", [bench.sizes[0] / t for t in values])
    bench.ratio("pipeline", times["plain, 0 workers"], times["ours"])


def measure_folder(bench: Bench) -> None:
    """JPEG files of 500 x 375 to normalised batches at 224, in this process: folder_train.py's against torchvision."""
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from loaders.image_folder import ImageFileBatches

    noise = synthetic(32 if bench.options.quick else 384, 100)
    tail = [transforms.ToTensor(), transforms.Normalize(noise.mean, noise.std)]
    augment = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *tail])
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/class")
        for number, image in enumerate(noise.data):  # smooth noise: files of about the size of photographs
            Image.fromarray(image).resize((500, 375)).save(f"{folder}/class/{number}.jpg", quality=90)
        plain = datasets.ImageFolder(folder, augment)
        noise.samples = plain.samples
        ours = ImageFileBatches(noise, BATCH)
        loader = DataLoader(plain, BATCH, shuffle=True)
        compare_pipelines(bench, "folder_train", loader, lambda: ours.train_epoch(0), len(plain))


def compare_pipelines(bench: Bench, name: str, plain: Any, ours: Callable[[], Any], images: int) -> None:
    with bench.one_thread():
        variants = {"ours": lambda: iterate(ours()), "plain": lambda: iterate(plain)}
        times = bench.interleave(variants, warm_up=True)
    for who, values in times.items():
        bench.figure(f"images/s at 224, {name.replace('_', ', ')}, {who}", [images / t for t in values])
    bench.ratio(f"{name}_pipeline", times["plain"], times["ours"])


def measure_epoch(bench: Bench) -> None:
    """Training and evaluation, with the pipeline."""
    loops = bench.loops
    parts = {"train": (loops.train, loops.plain_train), "eval": (loops.evaluate, loops.plain_evaluate)}
    variants = {}
    for part, (ours, plain) in parts.items():
        variants |= {f"{part}, ours{way}": functools.partial(ours, way) for way in loops.ways}
        variants |= {f"{part}, plain, {n} workers": functools.partial(plain, n) for n in (0, 2)}
    if bench.on_cuda:
        variants["IB's train, ours, graph"] = functools.partial(loops.train, ", graph", loops.ib)
        variants["IB's train, ours"] = functools.partial(loops.train, "", loops.ib)
    times = bench.interleave(variants)
    for name in [name.removeprefix("train") for name in times if name.startswith("train")]:
        times[f"epoch{name}"] = [a + b for a, b in zip(times[f"train{name}"], times[f"eval{name}"], strict=True)]
    for name, values in times.items():
        bench.figure(f"s, {name}", values)
    for key, part in (("train_epoch", "train"), ("eval", "eval"), ("epoch", "epoch")):
        for suffix, workers in (("", 0), ("_2_workers", 2)):
            way = "ours, graph" if bench.on_cuda and part != "eval" else "ours"
            bench.ratio(key + suffix, times[f"{part}, plain, {workers} workers"], times[f"{part}, {way}"])


def child(*arguments: Any) -> subprocess.Popen:
    """Start this file as a process of its own."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def measure_side_by_side(bench: Bench) -> None:
    """Throughput of two processes of one thread over that of one of two threads; on CUDA they share the card."""
    one, two, steps = [], [], bench.steps * (100 if bench.on_cuda else 1)
    for _ in range(bench.repeats):
        one.append(float(child("steps", 2, steps).communicate()[0]))
        pair = [child("steps", 1, steps) for _ in range(2)]
        two.append(max(float(process.communicate()[0]) for process in pair) / 2)
    bench.ratio("side_by_side", one, two)


def measure_memory(bench: Bench) -> None:
    """Peak of the proportional set size of a training process and its workers, in MB; of the bare import too."""
    import psutil

    def in_use(process):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # it has ended
            return 0
        return getattr(memory, "pss", memory.uss)  # pss: Linux only

    peaks: Times = {who: [] for who in ("ours", "plain", "bare import")}
    for _ in range(1 if bench.options.quick else 2):
        for who, values in peaks.items():
            process, peak = child("memory", who, bench.sizes[0] // 2), 0
            parent = psutil.Process(process.pid)
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, sum(map(in_use, [parent, *parent.children(recursive=True)])))
                time.sleep(0.05)
            values.append(peak / 2**20)
    for name, values in peaks.items():
        bench.figure(f"MB, {name}", values)
    bench.ratio("memory", peaks["ours"], peaks["plain"])


def measure_first_batch(bench: Bench) -> None:
    """From the start of the process to the first batch trained, over a bare import of torch and torchvision."""
    data_dir, bare = bench.options.data_dir, [sys.executable, "-c", "import torch, torchvision"]
    data = ["--dataset", "cifar10", "--data_dir", data_dir] if data_dir else ["--dataset", "digits"]
    times = bench.interleave(
        {"bare import": lambda: subprocess.run(bare, check=True), "first batch": lambda: train_first_batch(data)}
    )
    for name, values in times.items():
        bench.figure(f"s, {name}", values)
    bench.ratio("first_batch", times["first batch"], times["bare import"])


def train_first_batch(data):
    with tempfile.TemporaryDirectory() as folder:
        flags = [*data, "--root_log", folder, "--root_model", folder, "--seed", "0", "-p", "1"]
        command = [sys.executable, str(ROOT / "cifar_train.py"), *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if "batch 1/" in line)
            process.kill()


def run_child(task: str, *arguments: str) -> None:
    """What a process started by `child` does."""
    import torch
    import torchvision  # noqa: F401

    from utils import choose_device

    if task == "steps":
        threads, steps = map(int, arguments)
        torch.set_num_threads(threads)
        device = choose_device()
        on_cuda = device.type == "cuda"  # where a graph wants the loader: a whole epoch, twice
        loops = Loops(device, BATCH * (steps if on_cuda else 4), BATCH)
        batches = [] if on_cuda else loops.batches(4)
        for chosen in (batches, [batches[step % 4] for step in range(steps)] if batches else []):
            started = time.perf_counter()
            loops.train(", graph" if on_cuda else "", batches=chosen)  # ends with a read from the device
        print((time.perf_counter() - started) / steps)
    elif arguments[0] == "bare import":
        time.sleep(0.2)  # for the one who measures
    else:
        loops = Loops(torch.device("cpu"), int(arguments[1]), int(arguments[1]) // 2)
        loops.train() if arguments[0] == "ours" else loops.plain_train(2)
        loops.evaluate() if arguments[0] == "ours" else loops.plain_evaluate(2)


# ----------------------------------------------------------------------------------------------------- report

PARTS = {
    "steps": measure_steps, "profile": measure_profile, "pipeline": measure_pipeline,
    "folder": measure_folder, "epoch": measure_epoch, "side_by_side": measure_side_by_side,
    "memory": measure_memory, "first": measure_first_batch,
}  # fmt: skip
QUICK = ("steps", "pipeline", "epoch", "side_by_side", "memory", "first")


def measure(options: argparse.Namespace) -> dict[str, dict]:
    """Measure the parts asked for. Returns dict(about, figures, spread, ratios)."""
    from utils import versions

    bench = Bench(options)
    for part in options.only or (QUICK if options.quick else PARTS):
        PARTS[part](bench)
    name = bench.torch.cuda.get_device_name(bench.device) if bench.on_cuda else "cpu"
    sizes = {"training images": bench.sizes[0], "test images": bench.sizes[1]}
    about = {**versions(), "device": name, "threads": bench.threads, **sizes}
    ratios = {name: value["median"] for name, value in bench.spread.items()}
    return {"about": about, "figures": bench.figures, "spread": bench.spread, "ratios": ratios}


def markdown(report: dict[str, dict]) -> str:
    """The report as two Markdown tables: figures, then ratios."""
    lines = [", ".join(f"{name} {value}" for name, value in report["about"].items())]
    for title, rows, digits in (("figure", report["figures"], ".4g"), ("ratio", report["spread"], ".3f")):
        lines += ["", f"| {title} | median | lowest | highest | n |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            cells = [format(row[key], digits) for key in ("median", "low", "high")]
            lines.append(f"| {name} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rough repeat of the main parts")
    parser.add_argument("--only", nargs="+", default=None, choices=PARTS, help="measure these parts only")
    parser.add_argument("--compiled", action="store_true", help="on CUDA --compile too, which takes minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--data_dir", default=os.environ.get("CIFAR_ROOT"), help="real CIFAR-10, for the first batch")
    parser.add_argument("--json", default=None, metavar="PATH")
    parser.add_argument("--markdown", default=None, metavar="PATH")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return run_child(*options.child)
    for path in filter(None, (options.markdown, options.json)):  # a path that cannot be written shows now, not later
        open(path, "a").close()
    report = measure(options)
    print(markdown(report))
    if options.markdown:
        pathlib.Path(options.markdown).write_text(markdown(report))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
