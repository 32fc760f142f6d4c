"""The three heads on the generated world, and what they are made of: trains everything, keeps every metrics.json in results/world. By hand: make world.

Nothing that is finished is trained again; an interrupted run goes on with its checkpoint.
"""
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS, RESULTS, ACTLOC = ROOT / "runs/world", ROOT / "results/world", Path(sys.executable).with_name("actloc")
PLAIN, MEMORY, SEEDS = "params/acar_synthetic.yaml", "params/acar_synthetic_memory.yaml", (1, 2, 3)
# name -> file, changes, the run whose weights it starts from
MAIN = {f"{name}_seed{s}": (file, [f"seed={s}", *changes], base and f"acar_seed{s}") for s in SEEDS for name, file, changes, base in (
    ("acar", PLAIN, [], ""), ("linear", PLAIN, ["model.head=linear"], ""), ("memory", MEMORY, [], "acar"))}
ABLATION = {f"{name}_seed{s}": (file, [f"seed={s}", *changes], base and f"acar_seed{s}") for s in SEEDS for name, file, changes, base in (
    ("depth2", PLAIN, ["model.depth=2"], ""), ("memory_pooled", MEMORY, ["memory.grid=[2, 2]"], "acar"), ("memory_vectors", MEMORY, ["memory.grid=[1, 1]"], "acar"))}


def train(name, file, changes, base):
    if (RESULTS / f"{name}.json").exists(): return f"{name}: is there"
    words = [w for change in changes + ([f"start_from={RUNS / base}"] if base else []) for w in ("-p", change)]
    (RUNS / name).mkdir(parents=True, exist_ok=True)
    with open(RUNS / f"{name}.log", "a") as log: code = subprocess.call([ACTLOC, "train", "-f", file, *words, "--out", RUNS / name], cwd=ROOT, stdout=log, stderr=log)
    if code: return f"{name}: FAILED, see {RUNS / name}.log"
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(RUNS / name / "metrics.json", RESULTS / f"{name}.json")
    return f"{name}: done"


def main(wanted, parallel=2):
    todo = {name: run for name, run in wanted.items() if not (RESULTS / f"{name}.json").exists()}
    first, then = ({name: run for name, run in todo.items() if bool(run[2]) is later} for later in (False, True))
    for runs in (first, then):      # what others start from comes first
        with ThreadPoolExecutor(parallel) as pool:
            for said in pool.map(lambda item: train(item[0], *item[1]), runs.items()): print(said, flush=True)


if __name__ == "__main__": main({"main": MAIN, "ablation": ABLATION, "all": {**MAIN, **ABLATION}}[sys.argv[1] if len(sys.argv) > 1 else "all"])
