"""Sweeps: whatever is killed, every run is done once; nothing unknown is passed on; engines are interchangeable. And single runs: chosen, refused, repeated."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from actloc.app.cli import main
from actloc.app.experiments import ask, defaults_of, notebook as experiment
from actloc.app.sweep import Limits, combinations, dask_executor, local_executor, read_grid, run_one, slurm_executor, sweep

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


def write_notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def notebook(tmp_path): return write_notebook(tmp_path / "tiny.ipynb", BODY)


def wait_for(condition, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(.05)


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
    wait_for(lambda: second.exists() and second.read_text() > "2")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
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
    wait_for((tmp_path / "s/sweep.json").exists)
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


def test_an_unreachable_scheduler_is_named_and_falling_back_is_asked_for(notebook, tmp_path):
    words = [ACTLOC, "sweep", notebook, "--out", tmp_path / "s", "--grid", "seed=1", "--executor", "dask", "--address", "tcp://127.0.0.1:9"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "tcp://127.0.0.1:9" in done.stderr and "dask scheduler" in done.stderr and "--fall-back local" in done.stderr
    assert not (tmp_path / "s").exists(), "a refused sweep leaves nothing behind"
    done = subprocess.run([*words[:-1], "nowhere", "--fall-back", "local"], capture_output=True, text=True)
    assert done.returncode == 0 and "no Dask scheduler answers at nowhere" in done.stderr and "Falling back, as asked" in done.stderr and "1 done" in done.stdout


@pytest.mark.skipif(bool(shutil.which("srun")), reason="Slurm is here")
def test_no_slurm_is_said(notebook, tmp_path, capsys):
    words = ["sweep", str(notebook), "--out", str(tmp_path / "s"), "--grid", "seed=1", "--executor", "slurm"]
    assert main(words) == 2 and not (tmp_path / "s").exists()
    said = capsys.readouterr().err
    assert ("pip install submitit" in said or "srun" in said) and "--executor local" in said
    assert main([*words, "--fall-back", "local"]) == 0 and "1 done" in capsys.readouterr().out


# ---- a kernel outlives its worker

LEAVES_SLOWLY = """
import os, pathlib, time
folder = pathlib.Path(out)
def note(word):
    with open(folder / 'log.txt', 'a') as file: file.write(f'{word} {os.getpid()}\\n')
first, leave = not (folder / 'log.txt').exists(), os._exit
def slowly(code):
    time.sleep(4)
    note('gone'); leave(code)
os._exit = slowly
note('began')
time.sleep(60 if first else 0)
note('ended')
"""


def killed_worker(notebook, out, prctl):
    "A process that executes a run and is killed when its kernel has begun; then the run is executed here. What the kernels noted."
    run, = runs_of("seed=1", out=out)
    program = f"import sys; sys.platform = {'linux' if prctl else 'other'!r}\nfrom actloc.app.sweep import *; run_one({str(notebook)!r}, Run({run.name!r}, {run.folder!r}, {run.parameters!r}))"
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = Path(run.folder) / "log.txt"
    wait_for(lambda: log.exists() and log.read_text())
    worker.kill()
    worker.wait()
    assert run_one(str(notebook), run).state == "done"
    return [line.split()[0] for line in log.read_text().splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_kernel_is_killed_with_its_worker(tmp_path):
    assert killed_worker(write_notebook(tmp_path / "slow.ipynb", LEAVES_SLOWLY), tmp_path / "s", True) == ["began", "began", "ended"]


def test_nobody_begins_a_run_while_a_kernel_still_has_it(tmp_path):
    "As on systems where a kernel only notices later that it was left alone."
    assert killed_worker(write_notebook(tmp_path / "slow.ipynb", LEAVES_SLOWLY), tmp_path / "s", False) == ["began", "gone", "began", "ended"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_kernel_that_dies_before_anything_ran_is_started_again(tmp_path, monkeypatch):
    import papermill
    from nbclient.exceptions import DeadKernelError
    from actloc.app.sweep import Limits, execute_notebook
    def run(*errors):
        left = list(errors)
        def once(*args, **options):
            if left: raise left.pop(0)
        monkeypatch.setattr(papermill, "execute_notebook", once)
        return execute_notebook("x.ipynb", tmp_path / "x.ipynb", {}, Limits(), None, 0), len(left)
    early = RuntimeError("Kernel died before replying to kernel_info")
    assert run(early, early) == ("", 0)
    said, left = run(early, early, early, early)
    assert "was killed" in said and left == 1
    said, left = run(DeadKernelError("Kernel died"), early)
    assert "was killed" in said and left == 1, "what has begun is not begun again behind the back"


def test_interrupted_means_stopped(notebook, tmp_path):
    "Ctrl-C: the command ends at once, and so does what it runs; what is not begun stays so."
    words = [ACTLOC, "sweep", notebook, "--grid", "seed=1,2", "-p", "seconds=600", "--out", tmp_path / "s"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    starts = tmp_path / "s/seed=1/starts.txt"
    wait_for(lambda: starts.exists() and starts.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130 and "the same command goes on" in process.stderr.read()
    wait_for(lambda: not Path(f"/proc/{int(starts.read_text())}").exists(), 120)
    assert not (tmp_path / "s/seed=2").exists()


# ---- no room on the disk

FULL = "import os, pathlib, shutil\nfrom actloc.core.files import replacing\n"
WRITERS = {
    "torch": FULL + "import torch\nwith replacing(pathlib.Path(out) / 'big', 'wb') as file: torch.save(torch.zeros(2 << 20), file)",
    "leaving": FULL + "with open(pathlib.Path(out) / 'big', 'wb', buffering=0) as file:\n    while True: file.write(bytes(4096))",     # the rest of the disk, and it stays full
}


def on_a_small_disk(command, folder, megabytes=4):
    "Runs a command in a mount namespace of its own, in which `folder` is a disk of a few megabytes; skips where that is not permitted."
    folder.mkdir()
    inside = f'mount -t tmpfs -o size={megabytes}m tmpfs "$0" || exit 77; {command}'
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, folder], capture_output=True, text=True, timeout=300) if shutil.which("unshare") else None
    if done is None or done.returncode == 77 or "unshare failed" in done.stderr: pytest.skip("a small disk cannot be mounted here")
    return done


@pytest.mark.parametrize("how", WRITERS)
def test_a_full_disk(tmp_path, how):
    "A real one: the run that fills it fails with a message. The next is done if there is room again, else it fails with a message as well. In the end all is done."
    body = f"if how == 'badly' and not os.path.exists(out + '/../room'): exec({WRITERS[how]!r})\nopen(out + '/metrics.json', 'w').write('{{\"average_mAP\": 0.5}}')"
    path = write_notebook(tmp_path / "writes.ipynb", "import os", body)
    words = f'{ACTLOC} sweep {path} --grid how=badly,well --out "$0/s"'
    done = on_a_small_disk(f'{words}; echo "first $?"; rm -f "$0"/s/*/big; touch "$0/s/room"; {words}; echo "second $?"; cat "$0"/s/*/status.json', tmp_path / "disk")
    first, second = done.stdout.partition("first ")[::2]
    failed, more = [line for line in first.splitlines() if line.startswith("failed")], 1 + (how == "leaving")
    assert len(failed) == more and all("No space left on device" in line for line in failed) and f"{2 - more} done, 0 done before, {more} failed" in first, done.stdout + done.stderr
    assert second.startswith(f"{more}\n") and f"{more} done, {2 - more} done before, 0 failed" in second and "second 0" in second and second.count('"state": "done"') == 2, second


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_room_for_one_file(notebook, tmp_path):
    "Files of a run, written by papermill, by the sweep, by the kernel, meet a disk without room: these runs fail with a message, the other is done."
    runs = runs_of("seed=1,2,3,4", out=tmp_path / "s")
    spoiled = [Path(run.folder) / name for run, name in zip(runs, ("tiny.ipynb", f".status.json.{os.getpid()}.part", "metrics.json"))]
    for path in spoiled:
        path.parent.mkdir(parents=True)
        path.symlink_to("/dev/full")
    *failed, done = sweep(notebook, runs, local_executor(1), tell=silent)
    assert done.state == "done" and [s.state for s in failed] == ["failed"] * 3 and all("No space left on device" in s.error for s in failed), failed
    for i in (0, 2): assert json.loads((Path(runs[i].folder) / "status.json").read_text())["state"] == "failed"
    for path in spoiled: path.unlink(missing_ok=True)
    assert [s.state for s in sweep(notebook, runs, local_executor(1), tell=silent)] == ["done", "done", "done", "skipped"]


# ---- one run: which experiment, and once more

def test_which_experiment(notebook, tmp_path):
    (tmp_path / "p.yaml").write_text(f"experiment: {notebook}\nhow: well\n")
    asked = ask(tmp_path / "p.yaml", ["seed=3"])
    assert asked.notebook == notebook and asked.parameters == {"how": "well", "seed": 3}
    assert ask(tmp_path / "p.yaml", [], str(notebook)).notebook == notebook
    with pytest.raises(ValueError, match="is for the experiment .*tiny.ipynb; train_actionformer came"): ask(tmp_path / "p.yaml", [], "train_actionformer")
    with pytest.raises(ValueError, match="tiny has no parameter 'sed'; did you mean 'seed'"): ask(tmp_path / "p.yaml", ["sed=3"])
    (tmp_path / "metrics.json").write_text(json.dumps({"experiment": str(notebook), "parameters": {"seed": 8}, "environment": {}}))
    assert ask(tmp_path / "metrics.json").notebook == notebook and ask(tmp_path / "metrics.json").parameters == {"seed": 8}
    for words in (["actionformer"], ["--experiment", "actionformer"], ["--experiment", "train_actionformer"], []):
        assert ask(None, [], words[-1] if words else "").notebook == experiment("train_actionformer")
    assert main(["train", "-f", str(tmp_path / "p.yaml"), "-p", "seed=4", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == {"average_mAP": .4}


def test_parameters_of_every_settings_file_are_known_and_of_their_type():
    for path in sorted((Path(__file__).parents[1] / "params").glob("*.yaml")): assert ask(path).parameters
    for word in ("seed=two", "batch_size=2.5", "tiou=0.5", "model.window=big", "training=3", "timelines=[1]", "data=1"):
        with pytest.raises(ValueError, match="is needed"): ask(None, [word])
    for word in ("seed=", "model.width=[64, 32]", "training.learning_rate=1", "expected.average_mAP=0.5"): ask(None, [word])


def test_a_run_is_repeated_from_its_metrics_json_alone(tmp_path, capsys):
    "The smoke run once more: losses bit for bit; then what differs is said."
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    def train(*words): return subprocess.run([ACTLOC, "train", *words], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert train("--out", "first", "-p", "threads=1", "-p", "seed=5", "-p", "training.epochs=1").returncode == 0
    first = json.loads((tmp_path / "first/metrics.json").read_text())
    asked = ask(tmp_path / "first/metrics.json")
    assert set(asked.untold) <= {"device", "workers", "timelines", "nproc"}, "a parameter that decides the losses is not in metrics.json"
    assert asked.parameters["seed"] == 5 and asked.parameters["training"]["epochs"] == 1

    (tmp_path / "sent").mkdir()                                 # the file alone, from somewhere else
    first["environment"] |= {"commit": "0123456789ab", "torch": "1.0"}
    first["data"]["test"]["sha256"] = "0" * 16
    (tmp_path / "sent/metrics.json").write_text(json.dumps(first))
    again = train("-f", "sent/metrics.json")
    assert again.returncode == 0, again.stderr
    note, = [line for line in again.stderr.splitlines() if "the numbers may differ" in line]
    assert "commit 0123456789ab there" in note and "torch 1.0 there" in note and "numpy" not in note
    told, = [line for line in again.stdout.splitlines() if line.startswith("repeated")]
    assert "losses unknown there" in told and "the same mAP" in told and "data (test) 0000000000000000 there" in told and "train" not in told
    here = tmp_path / "runs/sent_again"
    assert (here / "log.csv").read_bytes() == (tmp_path / "first/log.csv").read_bytes()
    losses = [row["total"] for row in csv.DictReader(open(here / "log.csv"))]
    assert len(losses) == 18 == len(set(losses))
    second = json.loads((here / "metrics.json").read_text())
    assert all(second[key] == first[key] for key in ("parameters", "average_mAP", "mAP", "AP", "recall")) and second["data"]["train"] == first["data"]["train"]
    assert main(["train", "-f", str(tmp_path / "first/metrics.json"), "--out", str(tmp_path / "first")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_the_exit_code_is_explained(capsys):
    with pytest.raises(SystemExit): main(["sweep", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "so many runs failed" in said and "|| echo" in said


def test_the_script_that_kills_fits_the_training_notebook(tmp_path):
    import reach_sweep
    reach_sweep.check_story_of()
    path = reach_sweep.watched_notebook(tmp_path / "watched.ipynb")
    assert defaults_of(path) == defaults_of(experiment("train_actionformer"))
