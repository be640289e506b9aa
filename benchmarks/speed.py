"""How fast is this, against the plain loop of `plain.py`, in one interleaved run.

    python benchmarks/speed.py                      # a table, about ten minutes on two cores
    python benchmarks/speed.py --quick              # under a minute, rough
    python benchmarks/speed.py --only tiny          # one part; --help lists them
    python benchmarks/speed.py --json speed.json --markdown speed.md

Synthetic pictures of CIFAR's size, ResNet-32, batch 128. Every comparison is interleaved and repeated; the table
gives medians and the lowest and highest repeat. Ratios are plain over ours (larger is better) but for `ib_step`,
`memory` and `first_batch`, which are ours over the other (smaller is better).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CLASSES, BATCH = 10, 128
#: What operators of a training step are for, by a part of their names; everything else is 'rest'.
KINDS = {
    "convolution": ("convolution",),
    "batch norm": ("batch_norm",),
    "ReLU": ("relu", "clamp_min", "threshold"),
    "shortcuts": ("aten::add_",),
}
PARTS = ("steps", "profile", "pipeline", "tiny", "folder", "epoch", "side_by_side", "memory", "first")
QUICK = ("steps", "pipeline", "epoch", "side_by_side", "memory", "first")


# ------------------------------------------------------------------------------------------------- measuring


def interleave(variants, repeats):
    """Seconds of each variant, a dict of lists: every repeat runs all variants, in turn."""
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def of(values):
    """Median, lowest, highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(times, over, under):
    """Median of the ratios of neighbouring repeats."""
    return of([a / b for a, b in zip(times[over], times[under], strict=True)])


def synchronise(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------- subjects


class Subjects:
    """Both loops over the same synthetic pictures, each with a net of its own."""

    def __init__(self, train_size, test_size, device):
        import numpy as np
        import torch
        from training.batches import TensorBatches

        import losses
        import models
        from benchmarks import plain
        from imbalance_cifar import CIFAR_MEAN, CIFAR_STD
        from training import loop

        self.plain, self.loop, self.device = plain, loop, device
        generator = np.random.RandomState(0)
        self.train = generator.randint(0, 256, (train_size, 32, 32, 3), dtype=np.uint8), self._labels(train_size)
        self.test = generator.randint(0, 256, (test_size, 32, 32, 3), dtype=np.uint8), self._labels(test_size)
        self.train_batches = TensorBatches(*self.train, BATCH, CIFAR_MEAN, CIFAR_STD, device)
        self.test_batches = TensorBatches(*self.test, BATCH, CIFAR_MEAN, CIFAR_STD, device)
        torch.manual_seed(0)
        self.plain_net = plain.out_of_place(models.resnet32(CLASSES)).to(device)
        self.plain_optimizer = torch.optim.SGD(self.plain_net.parameters(), 0.01, momentum=0.9, weight_decay=2e-4)
        torch.manual_seed(0)
        self.net = models.resnet32(CLASSES).to(device, memory_format=torch.channels_last)
        options = argparse.Namespace(lr=0.01, momentum=0.9, weight_decay=2e-4)
        self.optimizer = loop.make_optimizer(self.net, options)
        self.ce = losses.CrossEntropyLoss()
        self.ib = losses.IBLoss(torch.ones(CLASSES), 1000.0).to(device)

    @staticmethod
    def _labels(size):
        return [i % CLASSES for i in range(size)]

    def our_pipeline(self):
        for _ in self.train_batches.train_epoch(0):
            pass
        synchronise(self.device)

    def plain_pipeline(self, workers):
        for _ in self.plain.loader(*self.train, True, workers):
            pass

    def our_train(self, criterion=None, batches=None):
        batches = batches or self.train_batches.train_epoch(0)
        self.loop.train_one_epoch(self.net, batches, criterion or self.ce, self.optimizer, CLASSES)
        synchronise(self.device)

    def plain_train(self, workers):
        self.plain.train_epoch(self.plain_net, self.plain.loader(*self.train, True, workers), self.plain_optimizer)
        synchronise(self.device)

    def our_eval(self):
        self.loop.evaluate(self.net, self.test_batches.eval_epoch(), [1] * CLASSES)

    def plain_eval(self, workers):
        self.plain.evaluate(self.plain_net, self.plain.loader(*self.test, False, workers))


def few_batches(subjects, steps):
    """The same `steps` batches, ready on the device, for steps without a pipeline."""
    source = subjects.train_batches.train_epoch(0)
    return [next(source) for _ in range(steps)]


# ---------------------------------------------------------------------------------------------- measurements


def measure_pipeline(subjects, repeats, threads):
    """(a) pictures per second on one thread; two workers are two threads."""
    import torch

    torch.set_num_threads(1)
    size = len(subjects.train[1])
    variants = {
        "ours": subjects.our_pipeline,
        "plain, 0 workers": lambda: subjects.plain_pipeline(0),
        "plain, 2 workers": lambda: subjects.plain_pipeline(2),
    }
    times = interleave(variants, repeats)
    torch.set_num_threads(threads)
    rows = {f"pictures/s, {name}": of([size / t for t in values]) for name, values in times.items()}
    return rows, {"pipeline": ratio(times, "plain, 0 workers", "ours")}


def measure_tiny_pipeline(repeats, size):
    """Tiny ImageNet's pipeline at 224 on one thread: decoded pictures to normalised batches, against torchvision."""
    import numpy as np
    import torch
    from torchvision import transforms
    from training.image_batches import ResizedCropBatches

    from benchmarks.plain import Pictures
    from imbalance_tinyimagenet import MEAN, STD

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = np.random.RandomState(0).randint(0, 256, (size, 64, 64, 3), dtype=np.uint8)
    targets = [0] * size
    ours = ResizedCropBatches(images, range(size), targets, BATCH, MEAN, STD)
    tail = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    parts = {
        "train": (lambda: ours.train_epoch(0), [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]),
        "eval": (ours.eval_epoch, [transforms.Resize(256), transforms.CenterCrop(224)]),
    }
    rows, ratios = {}, {}
    for part, (our_batches, head) in parts.items():
        plain = Pictures(images, targets, train=False)
        plain.transform = transforms.Compose([*head, *tail])
        variants = {
            "ours": lambda our_batches=our_batches: [None for _ in our_batches()],
            "plain": lambda plain=plain: [None for _ in torch.utils.data.DataLoader(plain, BATCH)],
        }
        interleave(variants, 1)  # warm-up
        times = interleave(variants, repeats)
        for name, values in times.items():
            rows[f"pictures/s at 224, {part}, {name}"] = of([size / t for t in values])
        ratios[f"tiny_{part}_pipeline"] = ratio(times, "plain", "ours")
    torch.set_num_threads(threads)
    return rows, ratios


def measure_folder_pipeline(repeats, size):
    """JPEG files of 500 x 375 to normalised batches at 224, in this process: folder_train.py's against torchvision."""
    import tempfile

    import numpy as np
    import torch
    from PIL import Image
    from torchvision import datasets, transforms
    from training.picture_files import IMAGENET_MEAN, IMAGENET_STD, FileBatches

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tail = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augment = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *tail])
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/class")
        for number in range(size):  # smooth noise: files of about the size of photographs
            noise = np.random.RandomState(number).randint(0, 256, (94, 125, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((500, 375)).save(f"{folder}/class/{number}.jpg", quality=90)
        plain = datasets.ImageFolder(folder, augment)
        ours = FileBatches([path for path, _ in plain.samples], plain.targets, BATCH)
        variants = {
            "ours": lambda: [None for _ in ours.train_epoch(0)],
            "plain": lambda: [None for _ in torch.utils.data.DataLoader(plain, BATCH, shuffle=True)],
        }
        interleave(variants, 1)  # warm-up
        times = interleave(variants, repeats)
    torch.set_num_threads(threads)
    rows = {f"JPEG files/s at 224, train, {name}": of([size / t for t in values]) for name, values in times.items()}
    return rows, {"folder_train_pipeline": ratio(times, "plain", "ours")}


def measure_epoch(subjects, repeats):
    """(b, c) training and evaluation, with the pipeline."""
    variants = {
        "train, ours": subjects.our_train,
        "train, plain, 0 workers": lambda: subjects.plain_train(0),
        "train, plain, 2 workers": lambda: subjects.plain_train(2),
        "eval, ours": subjects.our_eval,
        "eval, plain, 0 workers": lambda: subjects.plain_eval(0),
        "eval, plain, 2 workers": lambda: subjects.plain_eval(2),
    }
    times = interleave(variants, repeats)
    for who in ("ours", "plain, 0 workers", "plain, 2 workers"):
        pairs = zip(times[f"train, {who}"], times[f"eval, {who}"], strict=True)
        times[f"epoch, {who}"] = [a + b for a, b in pairs]
    ratios = {
        f"{key}{suffix}": ratio(times, f"{part}, plain, {workers} workers", f"{part}, ours")
        for key, part in (("train_epoch", "train"), ("eval", "eval"), ("epoch", "epoch"))
        for suffix, workers in (("", 0), ("_2_workers", 2))
    }
    return {f"s, {name}": of(values) for name, values in times.items()}, ratios


def measure_steps(subjects, repeats, steps):
    """(b, d) a training step without the pipeline: plain, CE, IB; in turn, step by step, since IB and CE are close."""
    batch = few_batches(subjects, 1)
    contiguous = [(images.contiguous(), target) for images, target in batch]
    variants = {
        "plain step": lambda: subjects.plain.train_epoch(subjects.plain_net, contiguous, subjects.plain_optimizer),
        "CE step": lambda: subjects.our_train(subjects.ce, batch),
        "IB step": lambda: subjects.our_train(subjects.ib, batch),
    }
    times = interleave(variants, repeats * steps)
    rows = {f"s, {name}": of(values) for name, values in times.items()}
    return rows, {"step": ratio(times, "plain step", "CE step"), "ib_step": ratio(times, "IB step", "CE step")}


def measure_peak(subjects, repeats, step_seconds):
    """(f) the machine's best matrix product, and our share of it in a training step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    a, b = (torch.randn(2048, 2048, device=subjects.device) for _ in range(2))

    def product():
        a @ b
        synchronise(subjects.device)

    product()
    peak = 2 * 2048**3 / min(interleave({"product": product}, 4 * repeats)["product"])
    with FlopCounterMode(display=False) as counter:
        subjects.our_train(subjects.ce, few_batches(subjects, 1))
    reached = counter.get_total_flops() / step_seconds
    rows = {"GFLOP/s, matrix product": of([peak / 1e9]), "GFLOP/s, training step": of([reached / 1e9])}
    return rows, {"peak_share": of([reached / peak])}


def measure_profile(subjects, steps):
    """Shares of a training step's own time, by kind of operator, in percent."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = subjects.device.type == "cuda"
    batches, totals = few_batches(subjects, steps), dict.fromkeys([*KINDS, "rest"], 0.0)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        subjects.our_train(batches=batches)
    for event in profiler.key_averages():
        kind = next((k for k, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "rest")
        totals[kind] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    whole = sum(totals.values())
    return {f"% of a step, {kind}": of([100 * t / whole]) for kind, t in totals.items()}, {}


def measure_steps_and_peak(subjects, repeats, steps):
    rows, ratios = measure_steps(subjects, repeats, steps)
    peak_rows, peak_ratios = measure_peak(subjects, repeats, rows["s, CE step"]["median"])
    return rows | peak_rows, ratios | peak_ratios


def child(*arguments):
    """Start this file as a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, "--child", *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def measure_side_by_side(repeats, steps):
    """Throughput of two one-thread processes over that of one two-thread process, on two cores."""
    values = []
    for _ in range(repeats):
        one = float(child("steps", 2, steps).communicate()[0])
        pair = [child("steps", 1, steps) for _ in range(2)]
        slow = max(float(process.communicate()[0]) for process in pair)
        values.append(2 * one / slow)
    return {}, {"side_by_side": of(values)}


def measure_memory(repeats, size, bare):
    """(e) peak of the proportional set size of a training process and its workers, in MB; `bare`: of the import too."""
    peaks = {who: [] for who in ("ours", "plain", *["bare import"] * bare)}
    for _ in range(repeats):
        for who, values in peaks.items():
            process, peak = child("memory", who, size), 0
            while process.poll() is None:
                peak = max(peak, sum(map(proportional_set_size, family(process.pid))))
                time.sleep(0.05)
            values.append(peak / 1024)
    rows = {f"MB, {name}": of(values) for name, values in peaks.items()}
    return rows, {"memory": ratio(peaks, "ours", "plain")}


def family(pid):
    """A process and all below it (Linux)."""
    try:
        below = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for c in below for p in family(int(c)))]


def proportional_set_size(pid):
    """kB, 0 for a process that has gone."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def measure_first_batch(repeats, data_dir):
    """(g) from the start of the process to the first batch trained, over a bare import of torch and torchvision."""
    data = ["--dataset", "cifar10", "--data_dir", data_dir] if data_dir else ["--dataset", "digits"]
    times = {"bare import": [], "first batch": []}
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, torchvision"], check=True)
        times["bare import"].append(time.perf_counter() - started)
        times["first batch"].append(_seconds_to_first_batch(data))
    return {f"s, {name}": of(v) for name, v in times.items()}, {
        "first_batch": ratio(times, "first batch", "bare import")
    }


def _seconds_to_first_batch(data):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--root_log", folder, "--root_model", folder, "--seed", "0", "-p", "1"]
        command = [sys.executable, str(ROOT / "cifar_train.py"), *data, *flags]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "batch 1/" in line:
                break
        seconds = time.perf_counter() - started
        process.kill()
        process.communicate()
    return seconds


def run_child(task, *arguments):
    """What a process started by `child` does."""
    import torch

    if task == "steps":
        threads, steps = map(int, arguments)
        torch.set_num_threads(threads)
        subjects = Subjects(BATCH * 4, BATCH, torch.device("cpu"))
        batches = few_batches(subjects, 4)
        subjects.our_train(subjects.ce, batches[:1])
        started = time.perf_counter()
        for step in range(steps):
            subjects.our_train(subjects.ce, [batches[step % 4]])
        print((time.perf_counter() - started) / steps)
    elif arguments[0] == "bare import":
        import torchvision  # noqa: F401

        time.sleep(0.2)  # for the one who measures
    else:
        who, size = arguments[0], int(arguments[1])
        subjects = Subjects(size, size // 2, torch.device("cpu"))
        subjects.our_train() if who == "ours" else subjects.plain_train(2)
        subjects.our_eval() if who == "ours" else subjects.plain_eval(2)


# ----------------------------------------------------------------------------------------------------- report


def markdown(report):
    """The report as two Markdown tables: figures, then ratios."""
    facts = ", ".join(f"{name} {value}" for name, value in report["about"].items())
    lines = [facts, "", "| figure | median | lowest | highest | n |", "|---|---|---|---|---|"]
    for name, value in report["figures"].items():
        lines.append(f"| {name} | {value['median']:.4g} | {value['low']:.4g} | {value['high']:.4g} | {value['n']} |")
    lines += ["", "| ratio | median | lowest | highest | n |", "|---|---|---|---|---|"]
    for name, value in report["spread"].items():
        lines.append(f"| {name} | {value['median']:.3f} | {value['low']:.3f} | {value['high']:.3f} | {value['n']} |")
    return "\n".join(lines) + "\n"


def measure(options):
    import torch

    from utils import versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    repeats, steps = (1, 1) if options.quick else (options.repeats, 8)
    train_size, test_size = (256, 256) if options.quick else (3072, 2480)
    wanted = options.only or (QUICK if options.quick else PARTS)
    figures, spread = {}, {}
    if set(wanted) & {"steps", "profile", "pipeline", "epoch"}:
        subjects = Subjects(train_size, test_size, device)
        subjects.our_train(batches=few_batches(subjects, 2))  # warm-up of both
        subjects.plain.train_epoch(subjects.plain_net, few_batches(subjects, 2), subjects.plain_optimizer)
    measurements = {
        "steps": lambda: measure_steps_and_peak(subjects, repeats, steps),
        "profile": lambda: measure_profile(subjects, steps),
        "pipeline": lambda: measure_pipeline(subjects, repeats, threads),
        "tiny": lambda: measure_tiny_pipeline(repeats, 64 if options.quick else 512),
        "folder": lambda: measure_folder_pipeline(repeats, 32 if options.quick else 384),
        "epoch": lambda: measure_epoch(subjects, repeats),
        "side_by_side": lambda: measure_side_by_side(repeats, steps),
        "memory": lambda: measure_memory(
            1 if options.quick else 2, train_size // 2 if options.quick else train_size, not options.quick
        ),
        "first": lambda: measure_first_batch(repeats, options.data_dir),
    }
    for part in wanted:
        rows, ratios = measurements[part]()
        figures |= rows
        spread |= ratios
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {**versions(), "device": name, "threads": threads, "train pictures": train_size, "test pictures": test_size}
    ratios = {name: value["median"] for name, value in spread.items()}
    return {"about": about, "figures": figures, "spread": spread, "ratios": ratios}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rough repeat of the main parts")
    parser.add_argument("--only", nargs="+", default=None, choices=PARTS, help="measure these parts only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--data_dir", default=os.environ.get("CIFAR_ROOT"), help="real CIFAR-10, for the first batch")
    parser.add_argument("--json", default=None, metavar="PATH")
    parser.add_argument("--markdown", default=None, metavar="PATH")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        run_child(*options.child)
        return
    report = measure(options)
    print(markdown(report))
    if options.markdown:
        pathlib.Path(options.markdown).write_text(markdown(report))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
