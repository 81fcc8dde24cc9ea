"""Changes a module in one place at a time and runs tests: a change that none of them notices lacks a test.

python -m tests.faults.mutate allspark_fast/model/semantic_memory.py --limit 20 -- tests/model/test_allspark.py

Signs, operators, bounds of comparisons, whole numbers and truth values are changed, in a copy of the repository.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
LEFT_OUT = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "runs")


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """All changes of a module: the line, what stands there afterwards, and the whole text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.expr) and node.end_lineno and node.end_col_offset:
            start = _position(source, node.lineno, node.col_offset)
            end = _position(source, node.end_lineno, node.end_col_offset)
            for changed in _changes(node):
                yield node.lineno, changed, f"{source[:start]}({changed}){source[end:]}"


def _changes(node: ast.expr) -> Iterator[str]:
    """What may stand in place of an expression."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        yield _unparse(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield _unparse(node, ops=[OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield str(node.value + 1)


def _unparse(node: ast.expr, **changes: object) -> str:
    return ast.unparse(type(node)(**{**dict(ast.iter_fields(node)), **changes}))


def _position(source: str, line: int, column: int) -> int:
    """Characters before a place that ``ast`` counts in lines and bytes."""
    lines = source.splitlines(keepends=True)
    return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())


def notices(copy: Path, tests: list[str]) -> bool:
    """Whether a test fails, in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2):  # 2: a test file cannot even be imported
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="its path in the repository")
    parser.add_argument("--limit", type=int, default=20, help="changes to try, drawn at random; 20 if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("tests", nargs="+", help="arguments of pytest, behind --")
    options = parser.parse_args()
    found = list(mutants((ROOT / options.module).read_text("utf-8")))
    chosen = sorted(random.Random(options.seed).sample(found, min(options.limit, len(found))))
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
        if notices(copy, options.tests):
            raise SystemExit("error: the tests fail without any change")
        for line, changed, text in chosen:
            (copy / options.module).write_text(text, "utf-8")
            if not notices(copy, options.tests):
                survived += 1
                print(f"{options.module}:{line}: not noticed: {changed}", flush=True)
    print(f"{options.module}: {len(chosen)} of {len(found)} changes tried, {survived} not noticed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
