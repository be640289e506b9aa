"""reproduce.py as its user runs it, in this process."""

import pytest

import reproduce


def refused(*args, capsys, status=2):
    """The one line on standard error of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*map(str, args)])
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    return line
