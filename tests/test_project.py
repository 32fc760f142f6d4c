"""The house: who imports whom, notebooks and package agree, nothing heavy is loaded early, notebooks stay small."""
import ast
import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, NOTEBOOKS = ROOT / "actloc", sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
FLOOR = {"core": 1, "kernels": 1, "ops": 2, "data": 2, "evaluation": 2, "training": 2, "views": 2, "actionformer": 3, "acar": 3, "app": 4, "experiments": 4}


def modules():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE and p.name != "__init__.py"]


def imported_rooms(source: str, room: str) -> set:
    """Rooms of actloc that a module of `room` imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [a.name for a in node.names]
            rooms |= {room} if node.level == 1 else {name.split(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "actloc":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("actloc.")}
    return rooms & set(FLOOR)


def allowed(room: str) -> set:
    if room in ("core", "kernels"): return {room}
    if room == "ops": return {"ops", "core", "kernels"}
    if FLOOR[room] == 2: return {room, "core"}
    if FLOOR[room] == 3: return {room, "ops", "core"}
    return set(FLOOR)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_floors(path):
    room = path.parent.name
    assert imported_rooms(path.read_text(), room) <= allowed(room)


def test_the_floor_test_sees_a_breach():
    assert imported_rooms("def f():\n    from ..training.learner import Learner", "ops") == {"training"}
    assert imported_rooms("import actloc.data.video\nfrom actloc import views", "core") == {"data", "views"}
    assert imported_rooms("from .segments import tiou\nfrom ..core import records", "core") == {"core"}


def test_export_is_fresh_and_nothing_is_orphaned(tmp_path):
    for name in ("settings.ini", "setup.py", "_quarto.yml", "README.md"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(PACKAGE, tmp_path / "actloc", ignore=lambda folder, names: [n for n in names if n == "__pycache__" or (n.endswith(".py") and n != "__init__.py")])
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True, capture_output=True)
    fresh = {p.relative_to(tmp_path / "actloc") for p in (tmp_path / "actloc").rglob("*.py")}
    committed = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")}
    assert fresh == committed, "modules without a notebook, or notebooks that were not exported"
    stale = [str(p) for p in sorted(fresh) if not filecmp.cmp(tmp_path / "actloc" / p, PACKAGE / p, shallow=False)]
    assert not stale, f"run make export: {stale}"


def test_the_readme_is_the_index_notebook():
    from actloc.app.site import readme_text
    assert (ROOT / "README.md").read_text() == readme_text(ROOT / "nbs/index.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_budget(path):
    assert path.stat().st_size < 100_000, "outputs of a notebook stay under 100 kB"
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        assert cell.execution_count is None and set(cell.metadata) <= {"tags"}, "run nbdev_clean"
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", f"a warning or an error was kept: {cell.source[:60]}"


def test_library_notebooks_test_what_they_define():
    for path in NOTEBOOKS:
        cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        if not any("#| default_exp" in c for c in cells): continue
        visible = sum(len(c.splitlines()) for c in cells if "#| export" not in c and any(w in c for w in ("assert", "test_eq", "test_close", "test_fail")))
        assert visible >= 3, f"{path}: no test in sight"


def test_experiments_have_one_tagged_parameters_cell():
    for path in (ROOT / "nbs/experiments").glob("*.ipynb"):
        tags = [cell.metadata.get("tags", []) for cell in nbformat.read(path, 4).cells]
        assert sum("parameters" in t for t in tags) == 1, f"{path}: papermill needs exactly one cell tagged parameters"


def test_cleaning_keeps_the_parameters_tag(tmp_path):
    source = ROOT / "nbs/experiments/train_actionformer.ipynb"
    copy = shutil.copy(source, tmp_path / "nb.ipynb")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", copy], cwd=tmp_path, check=True, capture_output=True)
    assert json.loads(Path(copy).read_text())["cells"] == json.loads(source.read_text())["cells"]


@pytest.mark.parametrize("code", ["import actloc", "import actloc.app.cli", "import actloc.core.records", "import actloc.evaluation.temporal"])
def test_light_imports_stay_light(code):
    program = f"import sys; {code}; print([m for m in ('torch', 'plotly', 'papermill') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_pickle_is_ever_executed():
    for path in [*modules(), *(ROOT / "data_scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load", "pickle.load", "pickle.loads"):
                words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert words.get("weights_only") == "True" or words.get("allow_pickle") == "False", f"{path}:{node.lineno}"


def test_the_wheel_carries_the_experiments(tmp_path):
    copy = tmp_path / "actloc_source"
    copy.mkdir()
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT / name, copy)
    for name in ("actloc", "nbs"): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "built")], cwd=copy, check=True, capture_output=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert (tmp_path / "built/lib/actloc/experiments/train_actionformer.ipynb").exists()
    assert (tmp_path / "built/lib/actloc/app/cli.py").exists()
