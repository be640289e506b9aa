"""mutants.py makes what it should; the long run of it is `make soak`'s."""

import ast

from mutants import TESTS, mutants

SOURCE = '''
def f(a, b=1):
    """Words: 1 < 2."""
    if a < b:
        raise ValueError("too small: 1")
    return a + b
'''


def test_every_place_is_changed_once_and_words_are_not():
    made = [(before, after) for _, before, after, _ in mutants(SOURCE)]
    assert sorted(made) == sorted([
        ("1", "2"),
        ("if a < b:", "if not a < b:"),
        ("a < b", "a <= b"),
        ("raise ValueError('too small: 1')", "pass"),
        ("return a + b", "return None"),
        ("a + b", "a - b"),
    ])  # fmt: skip


def test_each_mutant_differs_from_the_source_in_its_place_only():
    texts = [text for *_, text in mutants(SOURCE)]
    plain = ast.unparse(ast.parse(SOURCE)).split("\n")
    assert len(set(texts)) == 6
    for text in texts:
        assert sum(one != two for one, two in zip(text.split("\n"), plain, strict=True)) == 1


def test_the_tests_of_every_module_are_there(request):
    for module, tests in TESTS.items():
        assert all((request.config.rootpath / name).exists() for name in [module, *tests])
