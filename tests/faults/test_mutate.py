"""What the mutation tool changes."""

import pytest

from tests.faults.mutate import mutants

SOURCE = """def f(x, *, flag=True):
    é = "1 + 1"
    return -x[1:] if x < len(é) and flag else x * 2
"""


def test_every_kind_of_change() -> None:
    texts = {text for _, _, text in mutants(SOURCE)}
    for before, after in (
        ("-x[1:]", "(x[1:])"),
        ("[1:]", "[(2):]"),
        ("x < len(é) and", "(x <= len(é)) and"),
        ("x < len(é) and flag", "(x < len(é) or flag)"),
        ("x * 2", "(x + 2)"),
        ("* 2", "* (3)"),
        ("flag=True", "flag=(False)"),
    ):
        assert SOURCE.replace(before, after) in texts
    assert len(texts) == 7


@pytest.mark.parametrize("source", [SOURCE, "a = 1 if b is None else c // 2\n", "x = [i for i in range(3) if not i]\n"])
def test_each_is_another_program(source: str) -> None:
    texts = [text for _, _, text in mutants(source)]
    assert len({source, *texts}) == len(texts) + 1
    for text in texts:
        compile(text, "mutant", "exec")
