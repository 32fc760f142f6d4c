"""The learner and the whole run: published schedules, killed and continued runs, odd data, bad input at the door."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actloc.actionformer.model import ActionFormer, ActionFormerConfig
from actloc.app.localize import evaluate, localize, open_dataset
from actloc.core.records import Recording
from actloc.core.segments import FeatureGrid
from actloc.data.loading import CropConfig, TrainingBatches
from actloc.training.learner import Learner, LearnerConfig, learning_rate, load_checkpoint, optimiser_of
from test_golden_actionformer import golden

ACTLOC = Path(sys.executable).with_name("actloc")
SMALL = ActionFormerConfig(input_dim=8, num_classes=3, arch=(1, 1, 2), width=16, heads=2, window=5, max_seq_len=64,
                           regression_ranges=((0, 4), (4, 8), (8, 1e4)), dropout=.1, offset_activation="softplus")


def test_published_schedules():
    data = np.load(golden("lr_schedules.npz"))
    for name in data.files:
        kind = "multistep" if "multi" in name else "cosine"
        ours = [learning_rate(i, 300, 50, 1e-3, (100, 200), .1, kind) for i in range(300)]
        np.testing.assert_allclose(ours, data[name], rtol=1e-6, atol=1e-12)
    assert len(data.files) == 2


class Line(torch.nn.Linear):
    def loss(self, batch): pass


class FortyBatches:
    batch_size = 8
    def __len__(self): return 40


ACAR = dict(epochs=5, warmup_epochs=1, learning_rate=.064, warmup_start=.008, warmup_inclusive=False, optimiser="sgd", weight_decay=1e-7, decay_everything=True,
            clip_norm=0., ema_decay=0., milestones=[5.6, 5.8], milestones_from_start=True, minimum_rate=1e-5)


@pytest.mark.parametrize("name, schedule", [("step", "multistep"), ("cosine", "cosine")])
def test_published_schedules_of_acar(tmp_path, name, schedule):
    expected = np.load(golden("acar_lr_schedules.npz"))[name]
    for batch, scale in ((0, 1), (8, 1), (16, .5)):
        trainer = Learner(Line(1, 1), FortyBatches(), LearnerConfig.from_dict({**ACAR, "schedule": schedule, "reference_batch": batch}), tmp_path, device="cpu")
        ours = []
        for trainer.iteration in range(len(expected)): ours.append(trainer.rate())
        np.testing.assert_allclose(ours, expected * scale, rtol=0, atol=1e-12)


def test_the_published_optimiser_of_acar():
    "Nesterov's momentum and decay of everything, step by step."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    sgd = optimiser_of(net, LearnerConfig.from_dict({**ACAR, "weight_decay": .1}))
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for step in range(4):
        for group in sgd.param_groups: group["lr"] = rate = .1 / (step + 1)
        expected = []
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn_like(p)
            pull = p.grad + .1 * p.detach()
            velocity[i] = .9 * velocity[i] + pull
            expected.append(p.detach() - rate * (pull + .9 * velocity[i]))
        sgd.step()
        for p, e in zip(net.parameters(), expected): torch.testing.assert_close(p.detach(), e)


def recordings(n=6, seed=0):
    return open_dataset("synthetic", dict(num_recordings=n, num_classes=3, channels=8, seed=seed, validation_share=0.))


def learner(folder, data=None, config=SMALL, **settings):
    torch.manual_seed(0)
    settings = {"epochs": 3, "warmup_epochs": 1, "learning_rate": 1e-3, **settings}
    return Learner(ActionFormer(config), TrainingBatches(data or recordings(), CropConfig(max_seq_len=64)), LearnerConfig(**settings), folder, device="cpu")


def test_resuming_gives_the_same_losses_bit_for_bit(tmp_path):
    whole = learner(tmp_path / "whole").fit(progress=False)
    for epoch in (1, 2, 3): learner(tmp_path / "parts").fit(until=epoch, progress=False)
    parts = learner(tmp_path / "parts").fit(progress=False)
    assert [r["total"] for r in whole.rows] == [r["total"] for r in parts.rows]
    for a, b in zip(whole.average.state_dict().values(), parts.average.state_dict().values()): assert torch.equal(a, b)
    assert torch.equal(whole.model.loss_normaliser, parts.model.loss_normaliser)


def test_the_release_recipe_runs_too(tmp_path):
    released = learner(tmp_path, config=replace(SMALL, offset_activation="relu"), ema_warmup=False).fit(progress=False)
    assert all(np.isfinite(r["total"]) for r in released.rows)


def test_recordings_without_actions_and_no_detections(tmp_path):
    clock = FeatureGrid(25, 4, 16)
    silent = [Recording(f"silent{i}", np.random.default_rng(i).normal(size=(8, 40)).astype(np.float32), clock, 7.) for i in range(2)]
    trained = learner(tmp_path, [*recordings(2), *silent]).fit(progress=False)
    assert all(np.isfinite(r["total"]) for r in trained.rows)
    strict = ActionFormer(replace(SMALL, pre_nms_threshold=.999))
    data = recordings(3)
    found = localize(strict, data)
    assert [len(d) for d in found] == [0, 0, 0] and evaluate(found, data).average_mAP == 0


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    learner(tmp_path).fit(until=1, progress=False)
    with pytest.raises(ValueError, match="learning_rate: 0.001 there, 0.01 here"):
        learner(tmp_path, learning_rate=1e-2).fit(progress=False)


def test_a_checkpoint_from_before_a_setting_existed_goes_on(tmp_path):
    whole = learner(tmp_path / "whole").fit(progress=False)
    learner(tmp_path / "old").fit(until=2, progress=False)
    content = load_checkpoint(tmp_path / "old/checkpoint.pt")
    for name in ("optimiser", "reference_batch", "minimum_rate"): del content["settings"]["learner"][name]
    torch.save(content, tmp_path / "old/checkpoint.pt")
    with pytest.raises(ValueError, match="optimiser: adamw there, sgd here"): learner(tmp_path / "old", optimiser="sgd").fit(progress=False)
    assert [r["total"] for r in learner(tmp_path / "old").fit(progress=False).rows] == [r["total"] for r in whole.rows]


def test_without_an_average_the_model_is_what_was_trained(tmp_path):
    raw, averaged = (learner(tmp_path / str(d), ema_decay=d).fit(progress=False) for d in (0., .5))
    assert raw.averaged is raw.model and averaged.averaged is not averaged.model
    assert [r["total"] for r in raw.rows] == [r["total"] for r in averaged.rows]
    again = learner(tmp_path / "0.0", ema_decay=0.).fit(progress=False)
    for a, b in zip(raw.model.state_dict().values(), again.averaged.state_dict().values()): assert torch.equal(a, b)


PROGRAM = """
import sys, time
from pathlib import Path
import test_training as t
l = t.learner(Path(sys.argv[1]), epochs=30)
step = l.step
def slow_step():
    time.sleep(.01)
    return step()
l.step = slow_step
l.fit(progress=False)
"""


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    run = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}   # BLAS rounds differently with another number
    for delay in (.05, .35, .8):
        process = subprocess.Popen(run, env=environment)
        before = (tmp_path / "killed/checkpoint.pt").stat().st_mtime if (tmp_path / "killed/checkpoint.pt").exists() else 0
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            path = tmp_path / "killed/checkpoint.pt"
            if path.exists() and path.stat().st_mtime > before: break
            time.sleep(.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert learner(tmp_path / "killed", epochs=30).__class__ and (tmp_path / "killed/checkpoint.pt").exists()
    rest = learner(tmp_path / "killed", epochs=30).fit(progress=False)
    whole = learner(tmp_path / "whole", epochs=30).fit(progress=False)
    assert [r["total"] for r in rest.rows] == [r["total"] for r in whole.rows]


def actloc(*words, cwd):
    return subprocess.run([ACTLOC, *words], cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_train_from_the_command_line(tmp_path):
    words = ("train", "-p", "training.epochs=1", "-p", "training.warmup_epochs=1", "-p", "seed=7", "--out", "run")
    done = actloc(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"train_actionformer.ipynb", "metrics.json", "report.html", "log.csv", "checkpoint.pt", "model.json", "model.safetensors"} <= written
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["parameters"]["seed"] == 7 and 0 <= metrics["average_mAP"] <= 1 and set(metrics["mAP"]) == {"0.3", "0.4", "0.5", "0.6", "0.7"}
    assert "average mAP" in done.stdout and "report" in done.stdout
    again = actloc(*words, cwd=tmp_path)   # finished already: nothing is trained, the same numbers
    assert again.returncode == 0 and json.loads((tmp_path / "run/metrics.json").read_text())["average_mAP"] == metrics["average_mAP"]
    other = actloc(*words, "-p", "seed=8", cwd=tmp_path)
    assert other.returncode == 2 and "other settings" in other.stderr and "seed: 7 there, 8 here" in other.stderr


@pytest.mark.parametrize("change, says", [
    ("sed=3", "did you mean 'seed'"), ("data=nowhere", "does not exist"), ("model.windows=3", "did you mean 'window'"),
    ("test_subset=holiday", "holiday"), ("training.schedule=linear", "cosine, multistep"), ("seed", "name=value"),
    ("training.epoch=3", "did you mean 'epochs'")])
def test_bad_parameters_get_a_sentence(tmp_path, change, says):
    done = actloc("train", "-p", change, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr.split("actloc:")[-1], done.stderr


def test_tensorboard_and_csv_logs(tmp_path):
    trained = learner(tmp_path, tensorboard=True, epochs=1).fit(progress=False)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0].split(",")[:4] == ["iteration", "epoch", "learning_rate", "gradient_norm"] and len(lines) == len(trained.rows) + 1


def test_two_processes_never_share_a_seed_by_accident(tmp_path):
    one, two = (learner(tmp_path / name, seed=seed).fit(until=1, progress=False) for name, seed in (("one", 1), ("two", 2)))
    assert [r["total"] for r in one.rows] != [r["total"] for r in two.rows]


@pytest.mark.slow
def test_compiled_training_is_eager_training(tmp_path):
    "torch.compile of the loss: the first steps give the same losses (compiling takes about a minute)."
    quiet = replace(SMALL, dropout=0., drop_path=0.)      # compiled code draws other random numbers
    eager, compiled = (learner(tmp_path / str(c), config=quiet, compile=c, epochs=1, warmup_epochs=1).fit(progress=False).rows for c in (False, True))
    assert len(eager) == len(compiled) > 3
    np.testing.assert_allclose([r["total"] for r in compiled], [r["total"] for r in eager], rtol=1e-4)
