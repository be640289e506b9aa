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
    actions = [{action.dest: action for action in build_parser(script)._actions} for script in SCRIPTS]
    tables = {group: [["flag", "default", "what it does"]] for group in GROUPS}
    tables["differing"] = [["flag", *SCRIPTS]]
    for name, field in FIELDS.items():
        found = [of_script[name] for of_script in actions if name in of_script]
        if not found:  # no script has a flag for it
            continue
        flags = ", ".join(f"`{flag}`" for flag in found[0].option_strings)
        defaults = [_shown(of_script[name]) if name in of_script else "no flag" for of_script in actions]
        what = re.sub(r" ?\(default: %\(default\)s\)", "", field.metadata["argparse"]["help"])
        choices = found[0].choices if len(found) == len(SCRIPTS) else None
        if choices and name not in ("dataset", "arch", "loss_type", "train_rule"):
            what += f" ({', '.join(map(str, choices))})"
        is_same = len({*defaults}) == 1
        tables[field.metadata["group"]].append([flags, defaults[0] if is_same else "differs", what.replace("|", "\\|")])
        if not is_same:
            tables["differing"].append([flags, *defaults])
    for group, rows in tables.items():
        lines = [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        marker = f"<!-- flags: {group} -->\n"
        text = re.sub(re.escape(marker) + r"(\|.*\n)*", lambda _: marker + "\n".join(lines) + "\n", text)  # noqa: B023
    return text


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
