"""Change the code in one place at a time, and see whether a test fails: the tests' own health.

    python tests/faults/mutants.py --list training/recipe.py
    python tests/faults/mutants.py training/recipe.py imbalance.py losses.py
    python tests/faults/mutants.py --sample 100 --seed 0 experiment/resume.py

The first prints the mutants, the second runs them all (half an hour), the third a drawn part. Each mutant is written
to a copy of the repository, and the module's tests run there in a fork of this process, so that torch is imported
once. A mutant that lives is printed with its line; tests/faults/README.md says why those that are left are left.

mutmut 3.8 passes over decorated functions, which all losses are, and cosmic-ray starts a process for each mutant.
"""

import argparse
import ast
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

RESUME = [f"tests/cli/test_{name}.py" for name in ("resume", "other_run", "longer_run", "fork")]

#: module -> its tests, quick ones first; what starts processes of its own is left out.
TESTS = {
    "losses.py": [
        "losses.py", "tests/unit/test_losses.py", "tests/unit/test_loss_forms.py", "tests/cli/test_distributed.py",
    ],
    "imbalance.py": ["imbalance.py", "tests/unit/test_imbalance.py"],
    "training/recipe.py": ["tests/unit/test_recipe.py", "tests/unit/test_runs.py", "tests/cli/test_script_matrix.py"],
    "training/registry.py": [
        "tests/unit/test_registry.py", "tests/unit/test_recipe.py", "tests/cli/test_script_matrix.py",
    ],
    "experiment/checkpoint.py": [
        "experiment/checkpoint.py", "tests/faults/test_checkpoints.py", "tests/cli/test_bad_input.py",
        *RESUME, "tests/cli/test_records.py",
    ],
    "experiment/resume.py": [
        *RESUME, "tests/faults/test_checkpoints.py", "tests/cli/test_bad_input.py",
        "tests/cli/test_records.py", "tests/faults/test_data.py", "tests/cli/test_evaluation.py",
        "tests/cli/test_folder_train.py",
    ],
}  # fmt: skip
PROCESSES = (
    "not killed_in_mid and not as_a_process and not sigterm_in_mid and not may_not_grow and not threads_that"
    " and not model_without and not rank_that and not one_and_two_ranks"
)
SECONDS = 600

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
#: Calls whose words are for people: what they say is not changed.
MESSAGES = {"print", "warn", "ValueError", "UsageError", "DataError"}


def mutants(source):
    """Yield (line, what was, what is, changed source) for every mutant of `source`."""
    tree = ast.parse(source)
    untouched = _untouched(tree)
    for node in ast.walk(tree):
        if id(node) in untouched:
            continue
        for changed in _changes(node):
            kind, fields = node.__class__, node.__dict__
            before = ast.unparse(node)
            node.__class__, node.__dict__ = changed.__class__, {**fields, **changed.__dict__}
            after, text = ast.unparse(node), ast.unparse(ast.fix_missing_locations(tree))
            node.__class__, node.__dict__ = kind, fields
            yield getattr(node, "lineno", 0), before.split("\n")[0], after.split("\n")[0], text


def _untouched(tree):
    """ids of nodes without a meaning for the program: messages, docstrings, annotations."""
    found = set()
    for node in ast.walk(tree):
        inner = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in MESSAGES:
            inner = [*node.args, *node.keywords]
        elif isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            inner = [node]
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            inner = [node.annotation]
        found |= {id(sub) for part in inner for sub in ast.walk(part)}
    return found


def _changes(node):
    """The nodes that may stand in the place of `node`; fields that they lack stay as they are."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            yield ast.Compare(node.left, [*node.ops[:i], SWAPS[type(operator)](), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)
    elif isinstance(node, ast.BinOp):
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign):
        yield ast.AugAssign(node.target, SWAPS[type(node.op)](), node.value)
        yield ast.Pass()
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        changed = ast.copy_location(type(node)(**node.__dict__), node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.Return) and node.value is not None:
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.Raise, ast.Expr, ast.Continue, ast.Break)):
        yield ast.Pass()
    elif isinstance(node, ast.Call):
        for i in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, [*node.keywords[:i], *node.keywords[i + 1 :]])
    elif isinstance(node, ast.FunctionDef):
        for i in range(len(node.decorator_list)):
            changed = ast.copy_location(ast.FunctionDef(**node.__dict__), node)
            changed.decorator_list = [*node.decorator_list[:i], *node.decorator_list[i + 1 :]]
            yield changed


def _constants(value):
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield ast.Constant(value + 1)
    elif isinstance(value, (str, bytes)):
        yield ast.Constant(value + (b"X" if isinstance(value, bytes) else "X"))


# ------------------------------------------------------------------------------------------------- running them


def lives(module, text, folder, log):
    """Whether every test passes in `folder`, a copy of the repository, with `text` as `module`."""
    path = folder / module
    kept = path.read_text()
    path.write_text(text)
    child = os.fork()
    if child == 0:
        _test(module, folder, log)
    try:
        return _status(child) == 0
    finally:
        path.write_text(kept)


def _test(module, folder, log):
    """Run the module's tests; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        import pytest

        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-k", PROCESSES]
        status = int(pytest.main([*arguments, *TESTS[module]]))
    finally:
        os._exit(status)


def _status(child):
    """The exit status of a child; one that takes too long is killed, with what it started."""
    give_up = time.monotonic() + SECONDS
    while time.monotonic() < give_up:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def copy_of_repository(folder):
    """The tracked files, and those that are new, in `folder`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)


def run(module, options, folder, log):
    """Run a module's mutants; returns its row of the table."""
    found = list(mutants((REPOSITORY / module).read_text()))
    chosen = found
    if options.sample and options.sample < len(found):
        drawn = sorted(random.Random(options.seed).sample(range(len(found)), options.sample))
        chosen = [found[i] for i in drawn]
    if options.list:
        for line, before, after, _ in chosen:
            print(f"{module}:{line}: {before}  ->  {after}")
        return {"module": module, "mutants": len(found)}
    if not lives(module, (REPOSITORY / module).read_text(), folder, log):
        sys.exit(f"the tests of {module} fail before anything is changed")
    left = []
    for number, (line, before, after, text) in enumerate(chosen):
        if lives(module, text, folder, log):
            left.append({"line": line, "before": before, "after": after})
            print(f"{module}:{line}: lives: {before}  ->  {after}", flush=True)
        if (number + 1) % 50 == 0:
            print(f"{module}: {number + 1} of {len(chosen)}, {len(left)} live", flush=True)
    made = {"module": module, "mutants": len(found), "run": len(chosen), "killed": len(chosen) - len(left)}
    return {**made, "left": left}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--sample", type=int, metavar="N", help="run N mutants of each module, drawn (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    options = parser.parse_args(argv)
    options.modules = options.modules or list(TESTS)
    if not set(options.modules) <= set(TESTS):
        parser.error(f"choose from {', '.join(TESTS)}")
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", MPLBACKEND="Agg")
    sys.dont_write_bytecode = True
    if not options.list:  # imported once, for all forks
        import matplotlib.pyplot
        import sklearn.datasets
        import tensorboardX
        import torchvision

        assert all((matplotlib.pyplot, sklearn.datasets, tensorboardX, torchvision))
    with tempfile.TemporaryDirectory() as temporary, open(os.path.join(temporary, "log"), "wb") as log:
        folder = pathlib.Path(temporary) / "copy"
        copy_of_repository(folder)
        rows = [run(module, options, folder, log) for module in options.modules]
    if options.list:
        print("; ".join(f"{row['module']} {row['mutants']}" for row in rows))
        return
    print("\n| module | mutants | run | killed | left |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['module']} | {row['mutants']} | {row['run']} | {row['killed']} | {len(row['left'])} |")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
