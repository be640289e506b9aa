"""Writes the tables of docs/flags.md from the settings: python -m experiment.flags"""

import pathlib
import re
from typing import Any

from experiment.parser import GROUPS, SCRIPTS, build_parser
from experiment.settings import FIELDS
from files import write_text

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "flags.md"


def page(text: str) -> str:
    """The text of the page with its tables made again: what follows a line '<!-- flags: GROUP -->'."""
    actions = {s: {a.dest: a for a in build_parser(s)._actions if a.dest in FIELDS} for s in SCRIPTS}
    of = {name: {s: actions[s][name] for s in SCRIPTS if name in actions[s]} for name in FIELDS}
    of = {name: found for name, found in of.items() if found}
    tables = {group: [["flag", "default", "what it does"], *_rows(group, of)] for group in GROUPS}
    tables["differing"] = [["flag", *SCRIPTS], *_differing(of)]
    for group, rows in tables.items():
        lines = [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        marker = f"<!-- flags: {group} -->\n"
        text = re.sub(re.escape(marker) + r"(\|.*\n)*", lambda _: marker + "\n".join(lines) + "\n", text)  # noqa: B023
    return text


def _rows(group, of):
    for name, found in of.items():
        if FIELDS[name].metadata["group"] == group:
            action = next(iter(found.values()))
            defaults = {_shown(action) for action in found.values()}
            text = re.sub(r" ?\(default: %\(default\)s\)", "", FIELDS[name].metadata["argparse"]["help"])
            choices = "" if not action.choices or len(found) < len(SCRIPTS) else ", ".join(map(str, action.choices))
            is_listed = choices and name not in ("dataset", "arch", "loss_type", "train_rule")
            text = f"{text} ({choices})" if is_listed else text
            default = "differs" if len(defaults) > 1 or len(found) < len(SCRIPTS) else defaults.pop()
            yield [_flags(action), default, text.replace("|", "\\|")]


def _differing(of):
    for found in of.values():
        shown = [_shown(found[script]) if script in found else "no flag" for script in SCRIPTS]
        if len(set(shown)) > 1:
            yield [_flags(next(iter(found.values()))), *shown]


def _flags(action):
    return ", ".join(f"`{flag}`" for flag in action.option_strings)


def _shown(action: Any) -> str:
    if action.nargs == 0:
        return "off"
    if action.dest == "workers":
        return "cores, at most 4"
    if action.default in (None, "", ()):
        return "none"
    if isinstance(action.default, (tuple, list)):
        return " ".join(f"{item:g}" for item in action.default)
    return f"{action.default:g}" if isinstance(action.default, (int, float)) else str(action.default)


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
