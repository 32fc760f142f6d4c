"""Sweeps: whatever is killed, every run is done once; nothing unknown is passed on; engines are interchangeable."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from actloc.app.sweep import Limits, combinations, dask_executor, local_executor, read_grid, slurm_executor, sweep

ACTLOC = Path(sys.executable).with_name("actloc")
PARAMETERS = "seed = 0\nseconds = 0.0\nhow = 'well'\nout = ''"
BODY = """
import json, os, pathlib, time
folder = pathlib.Path(out)
with open(folder / 'starts.txt', 'a') as file: file.write(f'{os.getpid()}\\n')
checkpoint = folder / 'steps.txt'
steps = int(checkpoint.read_text()) if checkpoint.exists() else 0
with open(folder / 'trained.txt', 'a') as file:
    while steps < 10:
        time.sleep(seconds / 10)
        steps += 1
        file.write(f'{steps}\\n'); file.flush()
        checkpoint.write_text(str(steps))
if how == 'badly': raise ValueError('this went badly')
if how == 'greedily': memory = bytearray(3 * 2 ** 30)
if how == 'deadly': os.kill(os.getpid(), 9)
(folder / 'metrics.json').write_text(json.dumps({'average_mAP': seed / 10}))
"""


@pytest.fixture
def notebook(tmp_path):
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(BODY)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "tiny.ipynb")
    return tmp_path / "tiny.ipynb"


DEFAULTS = {"seed": 0, "seconds": 0., "how": "well", "out": ""}


def runs_of(*grid, out, **parameters): return combinations(read_grid(list(grid)), parameters, DEFAULTS, out)


def silent(line): pass


def test_nothing_that_happens_to_one_run_reaches_another(notebook, tmp_path):
    runs = runs_of("how=well,badly,deadly,greedily", out=tmp_path / "s")
    found = {s.name: s for s in sweep(notebook, runs, local_executor(2), Limits(memory_gb=2), tell=silent)}
    assert [s.state for s in found.values()] == ["done", "failed", "failed", "failed"]
    assert "this went badly" in found["how=badly"].error and "MemoryError" in found["how=greedily"].error and "killed" in found["how=deadly"].error
    assert "this went badly" in (tmp_path / "s/how=badly/tiny.ipynb").read_text()
    status = json.loads((tmp_path / "s/how=badly/status.json").read_text())
    assert status["state"] == "failed" and status["parameters"]["how"] == "badly"


def test_time_limit(notebook, tmp_path):
    quick, slow = sweep(notebook, runs_of("seconds=0,60", out=tmp_path / "s"), local_executor(2), Limits(seconds=6), tell=silent)
    assert quick.state == "done" and slow.state == "failed" and "time limit" in slow.error and slow.seconds < 30


def test_each_gpu_serves_one_run_at_a_time(notebook, tmp_path, monkeypatch):
    from actloc.app import sweep as module
    used = []
    monkeypatch.setattr(module, "run_one", lambda notebook, run, limits, gpu: (used.append(gpu), time.sleep(.1), used.remove(gpu), module.Status(run.name, "done" if used.count(gpu) == 0 else "shared"))[-1])
    found = sweep(notebook, runs_of("seed=1,2,3,4,5,6", out=tmp_path), local_executor(6), gpus=[0, 1], tell=silent)
    assert {s.state for s in found} == {"done"}


def test_a_killed_sweep_goes_on_where_it_stopped(notebook, tmp_path):
    "The whole process group is killed in the middle: what was done stays, what was begun continues from its checkpoint, no step is taken twice."
    words = [ACTLOC, "sweep", notebook, "--grid", "seed=1,2,3", "-p", "seconds=2.5", "--out", tmp_path / "s", "--max-parallel", "2"]
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = tmp_path / "s/seed=2/steps.txt"
    deadline = time.time() + 90
    while time.time() < deadline and not (second.exists() and second.read_text() > "2"): time.sleep(.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(4)                                             # kernels see that their parent is gone
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for seed in (1, 2, 3):
        assert json.loads((tmp_path / f"s/seed={seed}/metrics.json").read_text())["average_mAP"] == seed / 10
    taken = (tmp_path / "s/seed=2/trained.txt").read_text().split()
    assert set(map(int, taken)) == set(range(1, 11)) and len(taken) <= 11, "only the step that was being taken may be taken again"
    third = subprocess.run(words, capture_output=True, text=True)
    assert third.returncode == 0 and "3 done before" in third.stdout
    assert len((tmp_path / "s/seed=3/starts.txt").read_text().split()) == 1, "a finished run was started again"


def test_the_exit_code_counts_failures_and_a_folder_belongs_to_one_sweep(notebook, tmp_path):
    words = [ACTLOC, "sweep", notebook, "--out", tmp_path / "s", "--grid", "how=well,badly"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed" in done.stdout
    other = subprocess.run([*words[:-1], "how=well"], capture_output=True, text=True)
    assert other.returncode == 2 and "another sweep" in other.stderr
    for grid, says in (("sed=1", "did you mean 'seed'"), ("seed=x", "is needed"), ("seed", "name=value")):
        bad = subprocess.run([ACTLOC, "sweep", notebook, "--out", tmp_path / "t", "--grid", grid], capture_output=True, text=True)
        assert bad.returncode == 2 and says in bad.stderr, bad.stderr
    assert not (tmp_path / "t").exists()


def test_two_sweeps_in_one_folder(notebook, tmp_path):
    words = [ACTLOC, "sweep", notebook, "--out", tmp_path / "s", "--grid", "seed=1", "-p", "seconds=8"]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and not (tmp_path / "s/sweep.json").exists(): time.sleep(.05)
    second = subprocess.run(words, capture_output=True, text=True)
    assert second.returncode == 2 and "another process" in second.stderr
    assert first.wait(timeout=90) == 0


def test_submitit_runs_them_too(notebook, tmp_path):
    pytest.importorskip("submitit", reason="submitit is an extra")
    runs = runs_of("seed=1,2", out=tmp_path / "s")
    executor = slurm_executor(tmp_path, cluster="local", minutes=5)
    assert [s.state for s in sweep(notebook, runs, executor, tell=silent)] == ["done", "done"]
    assert [s.state for s in sweep(notebook, runs, executor, tell=silent)] == ["skipped", "skipped"]


def test_dask_with_a_killed_worker(notebook, tmp_path):
    "Four processes, one is killed while it works: every run is there, none was finished twice."
    distributed = pytest.importorskip("distributed", reason="distributed is an extra")
    with distributed.LocalCluster(n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        runs = runs_of("seed=" + ",".join(map(str, range(8))), out=tmp_path / "s", seconds=1.)
        victim = next(iter(cluster.workers.values())).pid
        threading.Timer(4, lambda: os.kill(victim, signal.SIGKILL)).start()
        found = sweep(notebook, runs, dask_executor(cluster.scheduler_address), tell=silent)
    assert {s.state for s in found} <= {"done", "skipped"}
    for seed in range(8): assert json.loads((tmp_path / f"s/seed={seed}/metrics.json").read_text())["average_mAP"] == seed / 10


def test_an_unreachable_scheduler_is_named(notebook, tmp_path):
    done = subprocess.run([ACTLOC, "sweep", notebook, "--out", tmp_path / "s", "--grid", "seed=1", "--executor", "dask", "--address", "tcp://127.0.0.1:9"], capture_output=True, text=True)
    assert done.returncode == 2 and "tcp://127.0.0.1:9" in done.stderr
