"""README and docs/ tell the truth: commands, flags, defaults, figures, links and snippets."""

import collections
import importlib
import json
import re
import shlex
import subprocess

import pytest
import torch
from script_runner import REPOSITORY as ROOT

import reproduce
from experiment.parser import SCRIPTS, build_parser, parse
from losses import IBLoss
from paper import pages

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]}
PAGES |= {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.glob("docs/**/*.md"))}
RESULTS = re.compile(r"^<!-- (results/\S+) -->\n((?:\|.*\n)+)", flags=re.M)


def blocks(language):
    """(page, text) of every fenced block in a language, '' for none."""
    fenced = [(page, re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)) for page, text in PAGES.items()]
    return [(page, text) for page, found in fenced for of, text in found if of == language]


def commands(text):
    """(script, arguments) of every command of a script; those with placeholders, <...> and '...', are left out."""
    for line in text.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True) if re.match(r"\S*python |torchrun ", line) else []
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None and "..." not in words and not any("<" in word for word in words):
            yield words[script], words[script + 1 :]


def cells(table):
    """The rows of a Markdown table, lists of cells, without the line below the heads."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()]
    return [rows[0], *rows[2:]]


def tables_of(text):
    return [cells(table) for table in re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.M)]


# ---------------------------------------------------------------------------------------------- commands


#: Of the official README.
PUBLISHED = """\
python cifar_train.py --dataset cifar100 --loss_type CE --train_rule None --imb_type exp --imb_factor 0.01 \
--epochs 200 --num_classes 100 --gpu 0
python cifar_train.py --dataset cifar100 --loss_type IB --train_rule IBReweight --imb_type exp --imb_factor 0.01 \
--epochs 200 --num_classes 100 --start_ib_epoch 100 --gpu 0
python cifar_train.py --dataset cifar100 --loss_type IB --train_rule CBReweight --imb_type exp --imb_factor 0.01 \
--epochs 200 --num_classes 100 --start_ib_epoch 100 --gpu 0
python cifar_train.py --dataset cifar100 --loss_type IBFocal --train_rule IBReweight --imb_type exp --imb_factor 0.01 \
--epochs 200 --num_classes 100 --start_ib_epoch 100 --gpu 0
"""


def test_the_published_commands_are_on_the_readme():
    assert any(block.startswith(PUBLISHED) for page, block in blocks("") if page == "README.md")


def test_every_command_is_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked = collections.Counter()
    for page, block in blocks(""):
        if page != "docs/extending.md":  # run by test_extending.py
            for script, arguments in commands(block):
                check_command(script, arguments, capsys)
                checked[page] += 1
    assert list(tmp_path.iterdir()) == []
    for page in ("README.md", "docs/production.md"):
        assert checked[page] == len(re.findall(r"^python ", PAGES[page], flags=re.M))


def test_the_commands_of_make_demo_are_ones_and_the_second_continues_from_the_first(capsys):
    printed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = list(commands(printed))
    for script, arguments in found:
        check_command(script, arguments, capsys)
    ce, ib = (parse(script, arguments) for script, arguments in found)
    assert ib.resume == f"{ce.model_folder}/ckpt.epoch{ib.start_ib_epoch:03d}.pth.tar"


def check_command(script, arguments, capsys):
    assert (ROOT / script).is_file()
    if script == "reproduce.py":
        options = reproduce.build_parser().parse_args(arguments)
        assert options.command == "report" or reproduce.select(options)
        return
    if script not in SCRIPTS:
        source = (ROOT / script).read_text()
        assert [flag for flag in arguments if flag.startswith("--") and f'"{flag}"' not in source] == []
        return
    capsys.readouterr()
    settings = parse(script, arguments)
    importlib.import_module(script.removesuffix(".py")).main([*arguments, "--dry_run"])
    rows = capsys.readouterr().out.split()
    assert rows[0].startswith("epoch_from_0,lr,loss,class_weights,sampler")
    assert len(rows) == settings.epochs + 1


def test_make_targets_and_modules_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(PAGES.values())
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for module in set(re.findall(r"python -m (examples\.\w+)", text)):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_flags_named_on_the_pages_exist():
    """In running text and tables; commands are tested above."""
    known = {flag for script in SCRIPTS for a in build_parser(script)._actions for flag in a.option_strings}
    subparsers = next(a for a in reproduce.build_parser()._actions if a.choices and "run" in a.choices).choices
    known |= {flag for p in subparsers.values() for a in p._actions for flag in a.option_strings}
    known |= {"--help", "--max-restarts", "--zip"}  # torchrun's; imbalance_tinyimagenet.py's
    known |= set(re.findall(r'add_argument\("(--\w+)"', (ROOT / "benchmarks" / "speed.py").read_text()))
    for page, text in PAGES.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        code = re.findall(r"`([^`\n]+)`", prose)
        named = {
            flag for span in code for flag in re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", span) if "pip " not in span
        }
        named -= {"-m", "-r", "-k"}
        assert named - known == set(), page


# ------------------------------------------------------------------------------------- figures and tables


def test_every_table_of_results_says_what_it_is_made_of():
    for page, text in PAGES.items():
        marked = [found[-1] for pattern in (RESULTS, pages.MARKED) for found in pattern.findall(text)]
        for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
            if {"top-1", "best", "plateau"} & set(cells(table)[0]):
                assert table in marked, page


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if pages.MARKED.search(text)])
def test_tables_are_made_from_the_records(page):
    """`python -m paper.pages PAGE` makes them again."""
    assert pages.made_again(PAGES[page]) == PAGES[page]


def test_the_gradient_of_the_factor_is_as_the_page_has_it():
    heads, *lines = next(t for t in tables_of(PAGES["docs/differences.md"]) if t[0] == ["p", "attached", "detached"])
    p = torch.tensor([float(line[0]) for line in lines], dtype=torch.float64)
    target, features = torch.zeros(len(p), dtype=torch.long), torch.full((len(p), 1), 20.0, dtype=torch.float64)
    for column, name in enumerate(heads[1:], start=1):
        logits = torch.stack([p, 1 - p], dim=1).log().requires_grad_()
        loss = IBLoss(alpha=20.001, detach=name == "detached", reduction="none")(logits, target, features)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        shown = torch.tensor([float(line[column].replace(",", "")) for line in lines], dtype=torch.float64)
        torch.testing.assert_close(gradient[:, 0] / (p - 1), shown, rtol=0.02, atol=0.005)


def test_tables_are_those_of_the_results():
    for path, table in [found for text in PAGES.values() for found in RESULTS.findall(text)]:
        if path.endswith("evaluations"):
            _check_evaluations(cells(table), ROOT / path)
        else:
            _check_speed(cells(table), json.loads((ROOT / path).read_text())["spread"])


def _check_evaluations(rows, folder):
    """The file's name is the row's: CE `--posthoc_la 1` is CE_posthoc_la_1.json."""
    for name, *shown in rows[1:]:
        found = json.loads((folder / (re.sub(r"[ `-]+", "_", name).strip("_") + ".json")).read_text())
        keys = [{"top-1": "acc1"}.get(head, head.replace(" ", "_")) for head in rows[0][1:]]
        assert shown == [f"{found[key]:.2f}" for key in keys], name


def _check_speed(rows, spread):
    for name, _, text, n in rows[1:]:
        of = spread[name.strip("`")]
        numbers = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", text).groups()
        for number, part in zip(numbers, ("median", "low", "high"), strict=True):
            assert number == f"{of[part]:.{len(number.split('.')[1])}f}", (name, part)
        assert int(n) == of["n"]


# --------------------------------------------------------------------------------------- links and snippets


def anchors(text):
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    links = [(page, target) for page, text in PAGES.items() for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    for page, target in links:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/[\w./]+)", PAGES["README.md"]))
    assert linked >= {page for page in PAGES if page.count("/") == 1}


def test_snippets_of_losses_run():
    """On README and docs/loss.md: a snippet makes `loss` of names that its page speaks of."""
    elsewhere = ("docs/extending.md", "docs/production.md")  # run by tests of their own
    found = [(page, snippet) for page, snippet in blocks("python") if page not in elsewhere]
    assert len(found) > 3
    for page, snippet in found:
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 16), torch.nn.ReLU())
        names = {
            "torch": torch, "class_counts": [50, 20, 10, 9, 8, 7, 6, 5, 4, 3], "images": torch.randn(4, 3, 32, 32),
            "target": torch.tensor([0, 1, 2, 9]), "body": body, "head": torch.nn.Linear(16, 10),
        }  # fmt: skip
        exec(snippet, names)
        if "loss" not in names:  # a snippet about data
            continue
        names["loss"].sum().backward()
        trained = names.get("model", names["head"])
        assert all(torch.isfinite(p.grad).all() for p in trained.parameters()), page
        assert any(p.grad.abs().sum() > 0 for p in trained.parameters()), page
