"""Any combination of flags ends its dry run with a recipe, or with one line and status 2; never with a traceback."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st
from script_runner import run_script

import cifar_train
import folder_train
import inat_train
import tinyimage_train
from experiment.parser import build_parser

SCRIPTS = {script.__name__: script for script in (cifar_train, tinyimage_train, folder_train, inat_train)}
NASTY = st.sampled_from([
    "nan", "inf", "-inf", "-1", "0", "1e400", "-0.0", "1e-320", "99999999999999999999", " ", "a\nb", "\x1b[31mred",
    "é", "None", "../..", "auto", "0x10", "1_000", "%s",
])  # fmt: skip
NUMBERS = st.one_of(st.integers(-3, 300).map(str), st.floats(allow_nan=False).map(repr))


def values(action):
    """Words for one flag: good ones more often than bad ones."""
    if isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
        return st.just([])
    good = st.sampled_from(sorted(map(str, action.choices))) if action.choices else NUMBERS
    word = st.one_of(good, good, good, NASTY)
    if action.nargs in ("*", "?", "+"):
        return st.lists(word, min_size=action.nargs == "+", max_size=1 if action.nargs == "?" else 3)
    return word.map(lambda text: [text])


@st.composite
def command_lines(draw, parser):
    flags = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "dry_run")]
    words = []
    for action in draw(st.lists(st.sampled_from(flags), max_size=7)):
        name, arguments = draw(st.sampled_from(action.option_strings)), draw(values(action))
        words += (
            [f"{name}={arguments[0]}", *arguments[1:]] if arguments and name.startswith("--") else [name, *arguments]
        )
    return [*words, "--dry_run"]


@pytest.mark.parametrize("name", SCRIPTS)
@given(data=st.data())
def test_dry_run_or_one_line(name, data):
    words = data.draw(command_lines(build_parser(f"{name}.py")))
    status, out, err = run_script(SCRIPTS[name], words, ".", cuda=True)
    errors = [line for line in err.split("\n") if line and not line.startswith("warning:")]
    assert "\x1b" not in err
    if status == 0:
        assert errors == []
        assert out.startswith(("epoch_from_0,lr,loss,class_weights,sampler", "usage:"))
    else:
        assert status == 2, (words, err)
        assert len(errors) == 1, (words, err)
        assert out == ""
