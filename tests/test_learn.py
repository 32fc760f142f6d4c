"""Exercises of the chapters: open they say what to do, and their folded solutions are right."""
import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs/learn").glob("*.ipynb"))
SOLUTION = re.compile(r"<details><summary>Solution</summary>\s+```python\n(.*?)```.*?</details>", re.S)


def verdicts(source: str, known: dict) -> list:
    """Runs a cell; what its calls of check said."""
    tree, said = ast.parse(source), []
    for statement in tree.body:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), "cell", "eval"), known)
            if "check(" in ast.unparse(statement): said.append(value)
        else: exec(compile(ast.Module([statement], []), "cell", "exec"), known)
    return said


def checks_of(source: str) -> str:
    """The calls of check of a cell, and the lines that they need, without the reader's answer: definitions whose body is `...`, and names set to `...`."""
    def is_open(node):
        if isinstance(node, ast.Assign): return isinstance(node.value, ast.Constant) and node.value.value is ...
        return isinstance(node, ast.FunctionDef) and all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in node.body)
    return "\n".join(ast.unparse(node) for node in ast.parse(source).body if not is_open(node))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_solutions_are_right_and_open_answers_are_not(path):
    cells, known, exercises = nbformat.read(path, 4).cells, {"__name__": "__main__"}, 0
    for i, cell in enumerate(cells):
        if cell.cell_type != "code": continue
        is_exercise = re.search(r"^\s*check\(|= check\(|^print\(check\(", cell.source, re.M) and i + 1 < len(cells) and SOLUTION.search(cells[i + 1].source)
        if not is_exercise:
            verdicts(cell.source, known)
            continue
        exercises += 1
        for verdict in verdicts(cell.source, known): assert not verdict.right and len(verdict.said) > 20, f"cell {i}: an open answer is called right, or nothing is said"
        verdicts(SOLUTION.search(cells[i + 1].source)[1], known)
        answers = verdicts(checks_of(cell.source), known)
        assert answers and all(answers), f"cell {i}: the folded solution is not right: {answers}"
    assert 3 <= exercises <= 5, f"{exercises} exercises with a folded solution; three to five belong to a chapter"
