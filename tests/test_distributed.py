"""Several processes train what one would: shares, sums, restarts with another number, failures and kills. gloo, on the CPU."""
import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from actloc.acar.model import ACAR, ACARConfig
from actloc.acar.slowfast import slowfast_small
from actloc.actionformer.model import ActionFormer, ActionFormerConfig
from actloc.app.actions import open_actions
from actloc.app.distributed import launch, run_cells
from actloc.app.experiments import defaults_of, notebook
from actloc.app.localize import localize, open_dataset, read_detections
from actloc.core.processes import gathered, joined, processes, summed
from actloc.data.clips import ClipBatches as ActorClips
from actloc.data.clips import ClipConfig
from actloc.data.loading import CropConfig, TrainingBatches
from actloc.training import learner as learner_module
from actloc.training.learner import Learner, LearnerConfig, load_checkpoint

SMALL = ActionFormerConfig(input_dim=8, num_classes=3, arch=(1, 1, 2), width=16, heads=2, window=5, max_seq_len=64,
                           regression_ranges=((0, 4), (4, 8), (8, 1e4)), dropout=0., drop_path=0., offset_activation="softplus", init_loss_norm=5.)
REFINED = replace(SMALL, refine_radius=2., neck="fpn", loss_weight=-1., label_smoothing=.1)
HOW = {"epochs": 2, "warmup_epochs": 1, "learning_rate": 1e-3}
CASES = {   # model, batch of all processes together, settings of the learner
    "uneven": (SMALL, 3, {}),
    "refined and balanced": (REFINED, 4, {"clip_norm": .1}),
    "accumulated": (SMALL, 2, {"accumulate": 2, "clip_norm": .5}),
    "sgd": (SMALL, 4, {"optimiser": "sgd", "learning_rate": .02, "clip_norm": 0., "ema_decay": 0., "reference_batch": 8}),
    "bfloat16": (SMALL, 4, {"precision": "bfloat16"}),
}


def recordings(n=8):
    return open_dataset("synthetic", dict(num_recordings=n, num_classes=3, channels=8, validation_share=0.))


def learner(name, folder):
    model, batch, how = CASES[name]
    torch.manual_seed(processes()[0])              # other weights in every process: the first one's count
    return Learner(ActionFormer(model), TrainingBatches(recordings(), CropConfig(max_seq_len=64), batch), LearnerConfig(**HOW | how), folder, device="cpu")


class BoxLoss(NamedTuple): total: torch.Tensor


@dataclass(frozen=True)
class Clips:
    """Like ACAR's: a dataclass that iterates over tensors, lists and None."""
    frames: torch.Tensor
    boxes: list
    memory: None = None

    def to(self, device): return self
    def __iter__(self): return iter((self.frames, self.boxes, self.memory))


class Boxes(torch.nn.Module):
    """A mean over all boxes of the batch; one weight that nobody ever uses."""

    def __init__(self):
        super().__init__()
        self.linear, self.spare = torch.nn.Linear(3, 1), torch.nn.Linear(2, 2)

    def loss(self, frames, boxes, memory):
        count = summed(torch.tensor(sum(map(len, boxes)))).clamp(min=1)
        if not sum(map(len, boxes)): return BoxLoss(torch.zeros(()))
        return BoxLoss(sum((self.linear(f + b) - b.sum(1, keepdim=True)).square().sum() for f, b in zip(frames, boxes)) / count)


class ClipBatches:
    batch_size = 2

    def __init__(self): self.share = processes()
    def __len__(self): return 6

    def epoch(self, epoch):
        rank, world = self.share
        g = torch.Generator().manual_seed(epoch)
        for i in range(6):
            clips = [(torch.rand(1, 3, generator=g), torch.rand((0 if i == 4 else i % 3 * (1 - row)), 3, generator=g)) for row in range(2)]   # the second clip never has a box
            yield Clips(torch.cat([f for f, _ in clips])[rank::world], [b for _, b in clips][rank::world])


def boxes_learner(folder):
    torch.manual_seed(0)
    how = LearnerConfig(epochs=2, warmup_epochs=1, learning_rate=.05, weight_decay=.5, decay_everything=True)
    return Learner(Boxes(), ClipBatches(), how, folder, device="cpu")


def acar_learner(world, folder):
    """ACAR with frozen norms and a share of the clips of the generated world."""
    data = open_actions("world", dict(folder=world, train_videos=2, test_videos=1, duration_s=17))
    torch.manual_seed(processes()[0])
    model = ACAR(ACARConfig(slowfast_small(norm="frozen"), len(data.label_map), data.poses, reduced=16, hidden=8, depth=1, relation_dropout=0.))
    batches = ActorClips(data.train.people, data.videos, ClipConfig(num_frames=4, stride=2, short_side=96), batch_size=4, share=processes())
    return Learner(model, batches, LearnerConfig(epochs=1, warmup_epochs=0, learning_rate=1e-3, ema_decay=0.), folder, device="cpu")


def localizer(): torch.manual_seed(3); return ActionFormer(replace(SMALL, pre_nms_threshold=.02))


def rows_of(folder): return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(folder / "log.csv"))]


def everything(folder: Path, names: list, until: int):
    """What each of several processes does: trains the cases, goes on with the interrupted one, localizes."""
    report, writes, replacing = {}, [], learner_module.replacing
    learner_module.replacing = lambda path, *how, **more: writes.append(str(path)) or replacing(path, *how, **more)
    with joined("cpu", timeout_s=60):
        rank, world = processes()
        for name in names: learner(name, folder / f"{name} {world}").fit(progress=False)
        learner("uneven", folder / "resumed").fit(until=until, progress=False)
        if world == 2:
            with contextlib.redirect_stderr(io.StringIO()) as bar: boxes_learner(folder / "boxes").fit()
            report["bar"] = bool(bar.getvalue())
            acar_learner(folder / "world", folder / "acar").fit(progress=False)
        model, sizes = localizer(), []
        predict = model.predict
        model.predict = lambda features, mask: sizes.append(len(mask)) or predict(features, mask)
        found = localize(model, recordings(7), batch_size=2, keep=folder / f"found {world}.npz")
        one = localize(model, recordings(1), keep=folder / f"one {world}.npz")
        report |= {"localized": sum(sizes), "writes": writes, "answers": [len(found), len(one)]}
        reports = [json.loads(r) for r in gathered(json.dumps(report).encode())]
        if rank == 0: (folder / f"report {world}.json").write_text(json.dumps(reports))


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(world, *words):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), __file__, *map(str, words)]
    return subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All cases by one, two and three processes, and a run that each of them trained for an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    for name in CASES: learner(name, folder / f"{name} 1").fit(progress=False)
    boxes_learner(folder / "boxes alone").fit(progress=False)
    acar_learner(folder / "world", folder / "acar alone").fit(progress=False)
    learner("uneven", folder / "resumed").fit(until=1, progress=False)
    two = torchrun(2, folder, ";".join(CASES), 2)
    assert two.returncode == 0, two.stderr
    three = torchrun(3, folder, "uneven", 3)
    assert three.returncode == 0, three.stderr
    return folder, two.stdout


@pytest.mark.parametrize("name, world", [*((name, 2) for name in CASES), ("uneven", 3)])
def test_several_processes_train_what_one_would(trained, name, world):
    alone, together = (trained[0] / f"{name} {n}" for n in (1, world))
    close = 2e-2 if name == "bfloat16" else 1e-5      # three digits, and the length of the padding already changes the rounding
    a, b = rows_of(alone), rows_of(together)
    assert len(a) == len(b) > 2 and list(a[0]) == list(b[0])
    for one, other in zip(a, b): assert one == pytest.approx(other, rel=close, abs=close)
    a, b = load_checkpoint(alone / "checkpoint.pt"), load_checkpoint(together / "checkpoint.pt")
    for part in ("model", "average") if a["average"] else ("model",):
        for name, x in a[part].items(): torch.testing.assert_close(b[part][name], x, rtol=close, atol=10 * close)   # Adam makes rounding of tiny gradients visible


def test_two_processes_train_an_acar_model_as_one_would(trained):
    a, b = (rows_of(trained[0] / name) for name in ("acar alone", "acar"))
    assert len(a) == len(b) > 2
    for one, other in zip(a, b): assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_a_run_goes_on_with_any_number_of_processes(trained):
    folder, whole = trained[0] / "resumed", trained[0] / "uneven 1"
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 3          # by one, two and three processes, an epoch each
    for one, other in zip(rows_of(whole), rows_of(folder), strict=True): assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert len(learner("uneven", folder).fit(progress=False).rows) == len(rows_of(whole))


def test_a_share_without_boxes_takes_part(trained):
    alone, together = rows_of(trained[0] / "boxes alone"), rows_of(trained[0] / "boxes")
    assert len(alone) == 18 and sum(r["total"] == 0 for r in alone) >= 6
    for one, other in zip(alone, together): assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    a, b = (load_checkpoint(trained[0] / name / "checkpoint.pt")["model"] for name in ("boxes alone", "boxes"))
    torch.manual_seed(0)
    for name, start in Boxes().state_dict().items():
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(b[name], start) == name.startswith("spare")      # decay touches no weight without a gradient


@pytest.mark.parametrize("world", [2, 3])
def test_every_recording_is_localized_once_and_comes_back_in_order(trained, world):
    reports = json.loads((trained[0] / f"report {world}.json").read_text())
    assert sum(r["localized"] for r in reports) == 8 and max(r["localized"] for r in reports) < 7
    assert all(r["answers"] == [7, 1] for r in reports)
    for name, n in (("found", 7), ("one", 1)):
        alone, together = localize(localizer(), recordings(n), batch_size=2 if n > 1 else 4), read_detections(trained[0] / f"{name} {world}.npz")
        assert len(together) == n and sum(map(len, alone)) > n
        for a, b in zip(alone, together):
            for column in ("segments", "labels", "scores"): np.testing.assert_array_equal(getattr(a, column), getattr(b, column))


def test_the_first_process_writes_and_speaks(trained):
    for world in (2, 3):
        first, *others = json.loads((trained[0] / f"report {world}.json").read_text())
        assert len(first["writes"]) > 5 and not any(r["writes"] for r in others)
    first, other = json.loads((trained[0] / "report 2.json").read_text())
    assert first["bar"] and not other["bar"]
    assert trained[1].count("was published for batches of 8; with 4 it is 0.01") == 1


TROUBLE = """
import os, time, torch
from pathlib import Path
from actloc.core.processes import gathered, processes
rank = processes()[0]
(Path(out) / f'{rank}.pid').write_text(str(os.getpid()))
gathered(b'')
if rank == 1 and how == 'fails':
    torch.distributed.destroy_process_group()      # the other one hears of it a second before the reason is out
    time.sleep(1)
    raise ValueError('recording 17: the file is cut off')
if rank == 1 and how == 'dies': os.kill(os.getpid(), 9)
if rank == 1 and how == 'aborts': os.abort()
if rank == 1 and how == 'exits': raise SystemExit('no such folder: films')
if how == 'ends badly': __import__('atexit').register(os.abort)     # as gloo's threads may do when Python is taken down around them
if rank == 1 and how == 'hangs': time.sleep(40)
if how == 'lasts': time.sleep(600)
gathered(b'')
"""


@pytest.fixture
def trouble(tmp_path):
    cells = [("parameters", "out = ''\nhow = ''\ndevice = 'cpu'"), ("every-process", TROUBLE)]
    content = {"cells": [{"cell_type": "code", "source": source, "metadata": {"tags": [tag]}} for tag, source in cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "trouble.ipynb").write_text(json.dumps(content))
    return str(tmp_path / "trouble.ipynb")


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end: time.sleep(.05)
    assert condition()


def living(folder): return [pid for p in folder.glob("*.pid") if p.read_text() and Path(f"/proc/{(pid := int(p.read_text()))}").exists()
                            and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"]


@pytest.mark.parametrize("how, says", [("fails", "ValueError: recording 17: the file is cut off"), ("dies", r"killed \(signal 9\).*want of memory"), ("aborts", r"(?s)killed \(signal 6\).*Fatal Python error: Aborted"), ("exits", r"(?s)exit code 1;.*no such folder: films"),
                                       ("hangs", "process 0 of 2: another process stopped or did not answer")])
def test_one_that_fails_takes_the_others_down_with_its_own_message(trouble, tmp_path, how, says, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ChildProcessError, match=says) as caught: launch(trouble, 2, {"out": str(tmp_path), "how": how, "device": "cpu"}, timeout_s=8 if how == "hangs" else 60)
    assert ("ConnectionError" in str(caught.value)) == (how == "hangs")
    assert len(list(tmp_path.glob("*.pid"))) == 2 and not living(tmp_path)


def test_the_threads_of_a_group_end_with_it():
    program = "import os\nfrom pathlib import Path\nfrom actloc.core.processes import gathered, joined\nsay = lambda: print(sum('gloo' in (task / 'comm').read_text() for task in Path('/proc/self/task').iterdir()))\n"
    program += "with joined('cpu'):\n    import torch._dynamo     # as every optimizer does\n    gathered(b'')\n    say()\nsay()"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ran = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT | alone, capture_output=True, text=True, timeout=120)
    inside, after = map(int, ran.stdout.split())
    assert inside > 0 and after == 0, ran.stdout + ran.stderr


def test_a_process_that_has_done_its_work_leaves_without_taking_python_down(trouble, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(trouble, 2, {"out": str(tmp_path), "how": "ends badly", "device": "cpu"}, timeout_s=60)
    assert len(list(tmp_path.glob("*.pid"))) == 2 and not living(tmp_path)


def test_who_stops_the_notebook_stops_its_processes(trouble, tmp_path):
    program = "import sys\nfrom actloc.app.distributed import launch\nlaunch(sys.argv[1], 2, {'out': sys.argv[2], 'how': 'lasts', 'device': 'cpu'})"
    started = {}
    for sign in (signal.SIGINT, signal.SIGKILL):
        (tmp_path / sign.name).mkdir()
        started[sign] = subprocess.Popen([sys.executable, "-c", program, trouble, tmp_path / sign.name], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for sign, process in started.items():
        wait_for(lambda: len(living(tmp_path / sign.name)) == 2)
        process.send_signal(sign)
    for sign, process in started.items():
        said = process.communicate(timeout=300)[1]
        assert process.returncode and ("KeyboardInterrupt" in said) == (sign is signal.SIGINT)
        wait_for(lambda: not living(tmp_path / sign.name))


def test_the_notebook_by_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = notebook("train_actionformer")
    defaults = defaults_of(path)
    given = {"model": {**defaults["model"], "drop_path": 0.}, "data_settings": {**defaults["data_settings"], "num_recordings": 12}, "training": {**defaults["training"], "epochs": 1}}
    alone, together = (run_cells(path, {**defaults, **given, "nproc": n, "out": str(tmp_path / str(n))}) for n in (1, 2))
    assert (tmp_path / "2/detections.npz").exists() and len(together["learner"].rows) == len(alone["learner"].rows) > 5
    for a, b in zip(alone["learner"].rows, together["learner"].rows): assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    for a, b in zip(alone["found"], together["found"], strict=True):
        assert len(a) == len(b)
        np.testing.assert_allclose(a.segments, b.segments, atol=1e-3)


@pytest.mark.parametrize("change, says", [({"training": {"epoch": 3}}, "did you mean 'epochs'"), ({"loading": {"crop_ratios": 1}}, "did you mean 'crop_ratio'")])
def test_unknown_settings_get_the_nearest_name(tmp_path, change, says):
    path = notebook("train_actionformer")
    with pytest.raises(ValueError, match=says): run_cells(path, {**defaults_of(path), **change, "out": str(tmp_path)})


def test_more_processes_than_recordings_in_a_batch_are_refused():
    with pytest.raises(ValueError, match="at most as many processes as recordings"): TrainingBatches(recordings(), CropConfig(), 2, share=(0, 3))


if __name__ == "__main__": everything(Path(sys.argv[1]), sys.argv[2].split(";"), int(sys.argv[3]))
