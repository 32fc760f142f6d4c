"""Sweeps under fire, by hand on a quiet machine (pytest does not collect this file); writes results/sweep_reach_{hapt,dask}.json.

  python tests/reach_sweep.py hapt      nine runs on HAPT; one is killed (SIGKILL) in its middle, then the whole sweep once; about 10 minutes on 2 cores
  python tests/reach_sweep.py dask      200 smoke runs by 4 Dask workers, two of which are killed while they work; about 20 minutes on 2 cores

Small, to see that it works:
  python tests/reach_sweep.py dask --runs 8 --workers 2 --kills 1 --json /tmp/dask.json
  python tests/reach_sweep.py hapt -p training.epochs=1 -p training.warmup_epochs=2 --json /tmp/hapt.json

Every run is the training notebook with three more cells, which write down when a process begins, which iterations it trains, which checkpoints
it has saved, and when it is through (events.txt in the folder of the run). From these the counts are made.
Exit code: 0 if nothing was lost and nothing done twice, else 1.
"""
import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

from actloc.app.experiments import notebook
from actloc.app.runs import environment
from actloc.core.files import read_json, replacing

ROOT = Path(__file__).resolve().parents[1]
ACTLOC = Path(sys.executable).with_name("actloc")
GRID = {"hapt": ["seed=1,2,3", "model.window=5,9,19"]}
SMALL = ["data_settings={num_recordings: 6, num_classes: 2, channels: 8}", "training={epochs: 1, warmup_epochs: 1, learning_rate: 1e-3, ema_warmup: true}", "model.width=16", "timelines=0", "threads=1"]

BEGAN = """
import os as _os, time as _time
def _note(*words):
    with open(_os.path.join(str(out), 'events.txt'), 'a') as file: file.write(' '.join(map(str, (words[0], _os.getpid(), *words[1:]))) + '\\n')
_note('began', _time.time())
"""
WATCHED = """
_train_epoch, _save = Learner.train_epoch, Learner.save
def _watched(self):
    for row in _train_epoch(self):
        _note('trained', row['iteration'])
        yield row
def _saved(self):
    _save(self)
    _note('saved', self.iteration)
Learner.train_epoch, Learner.save = _watched, _saved
"""
ENDED = "_note('ended', _time.time())"


def watched_notebook(path: Path) -> Path:
    "The training notebook that writes down what happens."
    book = nbformat.read(notebook("train_actionformer"), 4)
    cells, new = [], nbformat.v4.new_code_cell
    for cell in book.cells:
        if cell.cell_type == "code" and "learner = Learner(" in cell.source: cells.append(new(WATCHED))
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", []): cells.append(new(BEGAN))
    if len(cells) != len(book.cells) + 2: raise SystemExit("the training notebook is not built as this script knows it: one cell tagged parameters, one with `learner = Learner(`")
    book.cells = [*cells, new(ENDED)]
    nbformat.write(book, path)
    return path


# ---- what happened

@dataclass(frozen=True)
class Event:
    what: str      # began, trained, saved, ended
    pid: int
    value: float   # time, or iteration


def events_of(folder: Path) -> list[Event]:
    "Of one run; a line that is being written does not count yet."
    try: lines = (folder / "events.txt").read_text().splitlines(keepends=True)
    except OSError: return []
    return [Event(words[0], int(words[1]), float(words[2])) for line in lines if line.endswith("\n") for words in [line.split()]]


@dataclass(frozen=True)
class Story:
    "One run, from its events."
    processes: int             # that began it
    ended: int                 # how often it came to its end
    overlapping: bool          # two processes at one time
    trained: int               # iterations, each counted as often as it was trained
    again: int                 # of these, trained before, but lost with the process: after its last checkpoint
    again_though_saved: int    # of these, trained before and saved


def story_of(events: list[Event]) -> Story:
    "By one pass over the events."
    order = [e.pid for i, e in enumerate(events) if i == 0 or e.pid != events[i - 1].pid]
    done, lost, wasted, saved = set(), 0, 0, {}
    for e in events:
        if e.what == "saved": saved[e.pid] = e.value
        if e.what != "trained": continue
        before = max((n for pid, n in saved.items() if pid != e.pid), default=0)      # what earlier processes have saved
        if e.value < before: wasted += 1
        elif e.value in done: lost += 1
        done.add(e.value)
    return Story(len(set(order)), sum(e.what == "ended" for e in events), len(order) > len(set(order)), sum(e.what == "trained" for e in events), lost, wasted)


def check_story_of():
    "The counting itself, by hand: killed at iteration 5 after a checkpoint of 4; then as it should be, and twice as it should not."
    def events(text): return [Event(w[0], int(w[1]), float(w[2])) for w in (line.split() for line in text.split(","))]
    first = "began 1 0,trained 1 0,trained 1 1,trained 1 2,trained 1 3,saved 1 4,trained 1 4,trained 1 5"
    assert story_of(events(first + ",began 2 9,trained 2 4,trained 2 5,saved 2 6,ended 2 9")) == Story(2, 1, False, 8, 2, 0)
    assert story_of(events(first + ",began 2 9,trained 2 2,trained 2 3,saved 2 4,ended 2 9")) == Story(2, 1, False, 8, 0, 2)
    assert story_of(events(first + ",began 2 9,saved 1 6,ended 1 9,ended 2 9")) == Story(2, 2, True, 6, 0, 0)


def summary(out: Path, kind: str, expected: int, began: float, killed: dict) -> dict:
    "All runs of a sweep: counts, cost, and whether everything is as it must be."
    folders = sorted(path.parent for path in out.glob("*/events.txt"))
    stories = [story_of(events_of(folder)) for folder in folders]
    metrics = [read_json(folder / "metrics.json") for folder in folders if (folder / "metrics.json").exists()]
    states = [read_json(folder / "status.json")["state"] for folder in folders if (folder / "status.json").exists()]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    counts = {"runs": expected, "results": sum(isinstance(m["average_mAP"], float) and math.isfinite(m["average_mAP"]) for m in metrics), "done": states.count("done"),
              "different_results": len({json.dumps([m["parameters"]["seed"], m["parameters"]["model"]], sort_keys=True) for m in metrics}),
              "duplicated": sum(s.ended > 1 for s in stories), "overlapping": sum(s.overlapping for s in stories), "begun_more_than_once": sum(s.processes > 1 for s in stories),
              "iterations": sum(s.trained for s in stories), "iterations_again_after_the_last_checkpoint": sum(s.again for s in stories),
              "iterations_again_though_saved": sum(s.again_though_saved for s in stories)}
    fine = counts["results"] == counts["done"] == counts["different_results"] == expected and not (counts["duplicated"] or counts["overlapping"] or counts["iterations_again_though_saved"])
    return {"what": kind, "as_it_must_be": fine, **counts, "killed": killed, "wall_s": round(time.time() - began, 1), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
            "cpu_of": "all processes but the kernels that were killed with the process that started them", "average_mAP": [round(m["average_mAP"], 4) for m in metrics][:9],
            "environment": environment()}


# ---- under fire

def until(found, what: str, seconds: float = 3600):
    "Waits for a true answer and gives it."
    end = time.time() + seconds
    while not (answer := found()):
        if time.time() > end: raise SystemExit(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(.2)
    return answer


def in_its_middle(out: Path, without: tuple = ()) -> tuple[Path, int] | None:
    "A run that has saved a checkpoint and trained on, and its process."
    for path in sorted(out.glob("*/events.txt")):
        events = events_of(path.parent)
        if path.parent in without or not events or any(e.what == "ended" for e in events): continue
        mine = [e for e in events if e.pid == events[-1].pid]
        if any(e.what == "saved" for e in mine) and sum(e.what == "trained" for e in mine[[e.what for e in mine].index("saved"):]) >= 2 and mine[-1].what == "trained": return path.parent, events[-1].pid
    return None


def at_work(out: Path) -> list[tuple[Path, int]]:
    "Runs that have begun and not ended, and their processes."
    last = [(path.parent, events[-1]) for path in sorted(out.glob("*/events.txt")) if (events := events_of(path.parent))]
    return [(folder, event.pid) for folder, event in last if event.what != "ended" and Path(f"/proc/{event.pid}").exists()]


def finished(out: Path) -> int:
    "Runs whose sweep has noted that they are done; a run that is killed between its last cell and this note is evaluated once more, though not trained."
    return sum(read_json(path)["state"] == "done" for path in out.glob("*/status.json"))


def ended(out: Path) -> int: return sum(any(e.what == "ended" for e in events_of(path.parent)) for path in out.glob("*/events.txt"))


def hapt(args, work: Path) -> dict:
    data, out = ROOT / "data/hapt", work / "sweep"
    if not (data / "annotations.json").exists():
        data = work / "hapt"
        subprocess.run([sys.executable, ROOT / "data_scripts/prepare_hapt.py", ROOT.parent / "shared/data/hapt.zip", data], check=True)
    words = [ACTLOC, "sweep", watched_notebook(work / "train_actionformer.ipynb"), "-f", ROOT / "params/hapt.yaml", "-p", f"data={data}", "--out", out, "--max-parallel", str(args.workers),
             *(w for grid in GRID["hapt"] for w in ("--grid", grid)), *(w for change in args.parameter for w in ("-p", change))]
    began, codes = time.time(), []
    sweep = subprocess.Popen(words, start_new_session=True)
    victim, pid = until(lambda: in_its_middle(out), "a run in its middle")
    os.kill(pid, signal.SIGKILL)
    print(f"killed {victim.name}, process {pid}", flush=True)
    another = until(lambda: finished(out) >= 3 and in_its_middle(out, (victim,)), "three runs that are done and another in its middle")
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    print(f"killed the sweep, process {sweep.pid}, while {another[0].name} was trained", flush=True)
    while not codes or (codes[-1] and len(codes) < 3): codes.append(subprocess.run(words).returncode)
    return {**summary(out, "hapt", 9, began, {"runs": 1, "sweeps": 1}), "exit_codes_after_the_kill": codes}


def dask(args, work: Path) -> dict:
    from distributed import LocalCluster

    out = work / "sweep"
    changes = [w for change in (*SMALL, *args.parameter) for w in ("-p", change)]
    book = watched_notebook(work / "train_actionformer.ipynb")
    with LocalCluster(n_workers=args.workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        words = [ACTLOC, "sweep", book, *changes, "--grid", "seed=" + ",".join(map(str, range(args.runs))), "--out", out, "--executor", "dask", "--address", cluster.scheduler_address]
        began, killed = time.time(), []
        sweep = subprocess.Popen(words)
        while len(killed) < args.kills and sweep.poll() is None:
            until(lambda: sweep.poll() is not None or ended(out) >= (len(killed) + 1) * args.runs // (args.kills + 1), "the runs before a kill")
            for folder, kernel in at_work(out):
                try: worker = int(Path(f"/proc/{kernel}/stat").read_text().rpartition(")")[2].split()[1])      # the kernel's parent
                except OSError: continue                                                                       # it has just ended
                os.kill(worker, signal.SIGKILL)
                killed.append(folder.name)
                print(f"killed worker {worker} while it had {folder.name}", flush=True)
                break
        code = sweep.wait()
    found = summary(out, "dask", args.runs, began, {"workers": len(killed)})
    return {**found, "as_it_must_be": found["as_it_must_be"] and code == 0 and len(killed) == args.kills, "workers": args.workers, "exit_code": code}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("hapt", "dask"))
    parser.add_argument("--runs", type=int, default=200, help="of dask (default %(default)s)")
    parser.add_argument("--workers", type=int, help="at the same time (default: 2 for hapt, 4 for dask)")
    parser.add_argument("--kills", type=int, default=2, help="workers of dask that are killed (default %(default)s)")
    parser.add_argument("-p", "--parameter", metavar="NAME=VALUE", action="append", default=[], help="change a parameter of all runs")
    parser.add_argument("--work", type=Path, help="folder of the runs, which is kept (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="default: results/sweep_reach_WHAT.json")
    args = parser.parse_args()
    args.workers = args.workers or {"hapt": 2, "dask": 4}[args.what]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    check_story_of()
    work = (args.work or Path(tempfile.mkdtemp(prefix="reach_"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()): raise SystemExit(f"{work} is not empty; give another --work")
    found = {"hapt": hapt, "dask": dask}[args.what](args, work)
    path = args.json or ROOT / f"results/sweep_reach_{args.what}.json"
    with replacing(path) as file: json.dump(found, file, indent=1)
    print(json.dumps(found, indent=1), f"written to {path}", sep="\n")
    if not args.work and found["as_it_must_be"]: shutil.rmtree(work)
    elif not found["as_it_must_be"]: print(f"NOT AS IT MUST BE; the runs are in {work}")
    return 0 if found["as_it_must_be"] else 1


if __name__ == "__main__": sys.exit(main())
