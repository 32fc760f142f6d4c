"""The published experiments: every model at its size, real annotation files, checkpoints, fusion, stand-in features; bad input at the door."""
import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from actloc.actionformer.model import ActionFormer
from actloc.actionformer.release import config_from_release
from actloc.app.evaluate import evaluate_segments
from actloc.app.localize import ModelCard, load_model, save_model
from actloc.app.published import Experiment, convert_checkpoint, evaluate_checkpoint, export_checkpoint, judged, model_of, read_experiment, simulate
from actloc.core.files import read_json
from actloc.core.pickles import read_pickle
from actloc.core.records import Detections, Recording
from actloc.core.segments import FeatureGrid
from actloc.data.loading import CropConfig, TrainingBatches
from actloc.data.recordings import Dataset, open_annotations, read_dataset
from actloc.data.simulated import draw_class_scores
from actloc.evaluation.fusion import VideoScores, fuse_actions, fuse_classes, read_video_scores
from actloc.evaluation.temporal import PROTOCOLS, Table, average_recall, evaluate_temporal, ground_truth_table, read_predictions
from actloc.training.learner import Learner, LearnerConfig
from test_golden_actionformer import golden

ROOT = Path(__file__).parents[1]
NAMES = ("thumos_i3d", "anet_tsp", "anet_i3d", "epic_verb", "epic_noun", "ego4d_slowfast", "ego4d_omnivore", "ego4d_egovlp", "ego4d_slowfast_egovlp", "ego4d_omnivore_egovlp",
         "ego4d_slowfast_omnivore_egovlp")
ACTLOC = Path(sys.executable).with_name("actloc")


def experiment(name, *changes): return read_experiment(ROOT / f"params/{name}.yaml", list(changes))


def channels(config): return config.input_dim if isinstance(config.input_dim, int) else sum(config.input_dim)


# ---- settings

# levels, channels, heads, classes, as published
SIZES = {"thumos_i3d": (6, 512, 4, 20), "anet_tsp": (6, 256, 4, 1), "anet_i3d": (6, 256, 4, 1), "epic_verb": (6, 512, 4, 97), "epic_noun": (6, 512, 4, 300), "ego4d_slowfast": (7, 512, 4, 110),
         "ego4d_omnivore": (8, 512, 4, 110), "ego4d_egovlp": (8, 384, 4, 110), "ego4d_slowfast_egovlp": (8, 768, 12, 110), "ego4d_omnivore_egovlp": (8, 768, 12, 110), "ego4d_slowfast_omnivore_egovlp": (8, 1024, 16, 110)}


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_built_at_full_size_and_runs(name):
    e = experiment(name)
    c = e.config
    assert (c.levels, c.width if isinstance(c.width, int) else sum(c.width), c.heads, c.num_classes) == SIZES[name]
    assert PROTOCOLS[e["protocol"]].name and 0 < e["expected"]["average_mAP"] < 1
    LearnerConfig(**e["training"]), CropConfig(**{"max_seq_len": c.max_seq_len, **e["loading"]})
    torch.manual_seed(0)
    model = ActionFormer(replace(c, pre_nms_threshold=.0)).eval()
    T = c.max_seq_len if c.max_seq_len == 192 else 60
    (found,) = model.predict(torch.randn(1, channels(c), T), torch.ones(1, T, dtype=torch.bool))
    assert 0 < len(found) <= c.max_segments and found.labels.max() < c.num_classes


def one_step(name, tmp_path, lengths):
    """A training step (loss, gradient, optimiser, average) and an evaluation step on recordings of these lengths."""
    e = experiment(name)
    c, random = e.config, np.random.default_rng(0)
    clock = FeatureGrid(30, 16, 32)
    recordings = [Recording(f"r{i}", random.normal(size=(channels(c), T)).astype(np.float32), clock, T * 16 / 30 + 1, [[3, 9], [T / 4, T / 3]], [0, c.num_classes - 1], "x") for i, T in enumerate(lengths)]
    torch.manual_seed(0)
    batches = TrainingBatches(recordings, CropConfig(**{"max_seq_len": c.max_seq_len, **e["loading"]}), len(recordings))
    learner = Learner(ActionFormer(c), batches, LearnerConfig(**{**e["training"], "epochs": 1, "warmup_epochs": 0}), tmp_path, device="cpu")
    rows = list(learner.train_epoch())
    assert len(rows) == 1 and np.isfinite(rows[0]["total"]) and rows[0]["gradient_norm"] > 0
    features = torch.from_numpy(recordings[0].features)[None]
    (found,) = learner.average.module.eval().predict(features, torch.ones(1, features.shape[2], dtype=torch.bool))
    assert torch.isfinite(found.scores).all() and len(found) <= c.max_segments


LARGE = ("thumos_i3d", "epic_verb", "epic_noun", "ego4d_slowfast_egovlp", "ego4d_omnivore_egovlp", "ego4d_slowfast_omnivore_egovlp")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NAMES])
def test_a_full_size_step(name, tmp_path):
    e = experiment(name)
    one_step(name, tmp_path, [e.config.max_seq_len] * (e["batch_size"] if e.config.max_seq_len == 192 else 1))


def test_the_settings_name_what_they_need():
    for name in NAMES:
        written = yaml.safe_load((ROOT / f"params/{name}.yaml").read_text())
        assert {"data", "data_settings", "train_subset", "test_subset", "protocol", "expected", "model", "loading", "training"} <= set(written), name
    with pytest.raises(ValueError, match="did you mean 'fusion'"): experiment("anet_tsp", "fussion.top=2")


def test_an_experiment_from_the_metrics_of_a_run_and_none_of_another_notebook(tmp_path):
    written, run = yaml.safe_load((ROOT / "params/hapt.yaml").read_text()), json.loads((ROOT / "results/hapt_seed1.json").read_text())
    e = read_experiment(ROOT / "results/hapt_seed1.json", ["seed=3"])
    assert e["seed"] == 3 and all(e[name] == written[name] for name in ("data", "model", "loading", "training", "tiou", "threads")) and e["protocol"] == run["protocol"]
    (tmp_path / "other.yaml").write_text("experiment: evaluate\n")
    with pytest.raises(ValueError, match="is for the experiment evaluate; train_actionformer came"): read_experiment(tmp_path / "other.yaml")
    (tmp_path / "same.yaml").write_text("experiment: actionformer\nseed: 4\n")
    assert read_experiment(tmp_path / "same.yaml")["seed"] == 4


# ---- real annotation files

def test_thumos_is_judged_as_it_is_written(shared):
    data = shared / "data/thumos14.json"
    known = open_annotations(data, bad_segments="keep")
    assert len(known) == 412 and sum(len(r.labels) for r in known.recordings) == 6365
    repaired = open_annotations(data, bad_segments="repair")
    assert sum(len(r.labels) for r in repaired.recordings) == 6365 - 30 and len(repaired.repaired) == 5
    test = Dataset(tuple(Recording(r.id, np.zeros((1, 1)), FeatureGrid(30, 4, 16), r.duration_s, r.segments_s, r.labels, r.subset) for r in repaired.subset("test")), repaired.classes)
    found = [Detections(r.segments_s, r.labels, np.ones(len(r.labels))) for r in test]
    result = evaluate_segments(judged(found, test, data, {"strict": False}, "test", "thumos14"))
    assert result.videos == 212 and result.protocol == PROTOCOLS["thumos14"].name and .97 < result.average_mAP < 1   # segments behind the end of their video are there to be missed
    fewer = evaluate_segments(judged(found[:-2], test[:-2], data, {"strict": False}, "test", "thumos14_211"))
    assert "210 of 212 videos" in fewer.protocol and fewer.videos == 209


def test_activitynet_repetitions(shared):
    known = open_annotations(shared / "data/anet13_groundtruth.json.gz", bad_segments="repair", repetitions="remove")
    assert len(known) == 19228 and len(known.classes) == 200 and sum("repetition" in why for why in known.repaired.values()) == 26


@pytest.mark.parametrize("task, classes", [("verb", 97), ("noun", 300), ("action", 1352)])
def test_epic_from_the_official_csvs(shared, task, classes):
    known = open_annotations(shared / "data/epic_kitchens_100", bad_segments="keep", task=task)
    assert len(known) == 138 and sum(len(r.labels) for r in known.recordings) == 9668 and len(known.classes) == classes
    assert all(r.duration_s > 1 and r.segments_s.max() < r.duration_s + 1 for r in known.recordings)
    with pytest.raises(ValueError, match="task: verb, noun or action"): open_annotations(shared / "data/epic_kitchens_100")


# ---- checkpoints

@pytest.fixture
def released(tmp_path):
    """The golden checkpoint with a settings file, features and annotations as a user would have them."""
    data, config = np.load(golden("actionformer_checkpoint_expected.npz")), config_from_release(json.loads(golden("actionformer_checkpoint.json").read_text()))
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features/v_one.npy", data["feats"].T)
    rows = [{"label": f"c{k}", "label_id": k, "segment": [2. + k, 5.]} for k in range(3)]
    (tmp_path / "annotations.json").write_text(json.dumps({"database": {"one": {"subset": "validation", "duration": float(data["duration"]), "fps": 25., "annotations": rows}}}))
    settings = {"features": {"folder": str(tmp_path / "features"), "stride": float(data["feat_stride"]), "num_frames": float(data["feat_num_frames"]), "prefix": "v_"}}
    model = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()} | {"regression_ranges": [list(r) for r in config.regression_ranges]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"data": str(tmp_path / "annotations.json"), "data_settings": settings, "model": model, "protocol": "golden", "expected": {}}))
    return tmp_path, data


def test_a_release_checkpoint_is_evaluated(released):
    folder, data = released
    done = evaluate_checkpoint(read_experiment(folder / "params.yaml"), golden("actionformer_checkpoint.pth.tar"), predictions=folder / "found.json")
    found = read_predictions(folder / "found.json", ("c0", "c1", "c2"))
    order = np.argsort(-data["scores"], kind="stable")
    np.testing.assert_array_equal(found.labels, data["labels"][order])
    np.testing.assert_allclose(found.scores, data["scores"][order], atol=1e-5)
    np.testing.assert_allclose(found.segments, data["segments"][order], atol=1e-3)
    truth = ground_truth_table(open_annotations(folder / "annotations.json").recordings)
    judge = evaluate_temporal(truth, Table(np.zeros(50), data["segments"], data["labels"], data["scores"], ("one",)))
    assert done.result.average_mAP == pytest.approx(judge.average_mAP, abs=1e-9) and done.result.protocol == "golden"


def test_there_and_back(released):
    folder, _ = released
    e = read_experiment(folder / "params.yaml")
    convert_checkpoint(e, golden("actionformer_checkpoint.pth.tar"), folder / "model")
    export_checkpoint(folder / "model", folder / "epoch_035.pth.tar", 35)
    ours, theirs = (torch.load(p, weights_only=True) for p in (folder / "epoch_035.pth.tar", golden("actionformer_checkpoint.pth.tar")))
    weights = {k: v for k, v in theirs["state_dict_ema"].items() if k in ours["state_dict_ema"]}
    assert len(weights) == len(ours["state_dict_ema"]) and all(torch.equal(v, ours["state_dict_ema"][k]) and v.shape == ours["state_dict_ema"][k].shape for k, v in weights.items())
    assert set(theirs["state_dict_ema"]) - set(weights) == {k for k in theirs["state_dict_ema"] if "point_generator" in k or "pos_embd" in k}
    assert ours["epoch"] == 35 and load_model(folder / "model")[1].classes == ("c0", "c1", "c2")
    raw, average = (model_of(e, golden("actionformer_checkpoint.pth.tar"), w) for w in ("raw", "ema"))
    assert any(not torch.equal(a, b) for a, b in zip(raw.parameters(), average.parameters()))


@pytest.mark.parametrize("change, says", [("model.num_classes=5", "shape [3, 16, 3] came, [5, 16, 3] is needed"), ("model.arch=[2, 2, 4]", "5 levels, but 4 regression_ranges"),
                                          ("model.arch=[2, 3, 3]", "missing in the checkpoint"), ("data=nowhere.json", "does not exist")])
def test_settings_and_checkpoint_of_two_experiments(released, change, says):
    with pytest.raises(ValueError) as error: evaluate_checkpoint(read_experiment(released[0] / "params.yaml", [change]), golden("actionformer_checkpoint.pth.tar"))
    assert says in str(error.value), str(error.value)


# ---- readers: any format gives the same numbers

@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5", "one.h5"])
def test_every_format_gives_the_same_dataset(tmp_path, suffix):
    numbers = {id: np.random.default_rng(i).normal(size=(38 + i, 6)).astype(np.float32) for i, id in enumerate("abc")}
    database = {id: {"subset": "train", "duration": 20., "annotations": [{"label": "wave", "segment": [2, 6]}]} for id in numbers}
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    (tmp_path / "f").mkdir()
    if "h5" in suffix: h5py = pytest.importorskip("h5py")
    for id, x in numbers.items():
        if suffix == ".npy": np.save(tmp_path / f"f/{id}.npy", x)
        elif suffix == ".npz": np.savez_compressed(tmp_path / f"f/{id}.npz", feats=x)
        elif suffix == ".pt": torch.save(torch.from_numpy(x), tmp_path / f"f/{id}.pt")
        elif suffix == ".h5":
            with h5py.File(tmp_path / f"f/{id}.h5", "w") as file: file["feats"] = x
        else:
            with h5py.File(tmp_path / "f/all.h5", "a") as file: file[id] = x
    files = {"folder": str(tmp_path / ("f/all.h5" if suffix == "one.h5" else "f")), "stride": 5, "num_frames": 10, "fps": 10, "channels": 6, "suffix": suffix if suffix != "one.h5" else ".h5"}
    data = read_dataset(tmp_path, files, cache=False)
    for r in data: np.testing.assert_array_equal(r.features, numbers[r.id].T)
    database["d"] = database["a"]
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    assert list(read_dataset(tmp_path, files, strict=False).left_out) == ["d"]
    with pytest.raises(ValueError, match="1 of 4 recordings have no features: d"): read_dataset(tmp_path, files)
    wrong = {**files, "fps": 25}
    with pytest.raises(ValueError, match="3 of 3 recordings do not fit their feature files: a, b, c; the first"): read_dataset(tmp_path, wrong, strict=False)


def test_an_epoch_reads_no_more_than_it_needs(tmp_path):
    """Memory-mapped features are not copied whole: a window of a long recording is a view into the file."""
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f/a.npy", np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32))
    (tmp_path / "annotations.json").write_text(json.dumps({"database": {"a": {"subset": "x", "duration": 2501.5, "annotations": [{"label": "w", "segment": [2, 2000]}]}}}))
    data = read_dataset(tmp_path, {"folder": str(tmp_path / "f"), "stride": 5, "num_frames": 10, "fps": 10}, cache=False)
    assert isinstance(data[0].features.base, np.memmap)
    (batch,) = TrainingBatches(data, CropConfig(max_seq_len=100, trunc_thresh=0.), 1).epoch(0)
    assert batch.features.shape == (1, 8, 100) and batch.features.is_contiguous()
    before = (tmp_path / "f/a.npy").read_bytes()
    batch.features.zero_(), data[0].features.__imul__(0)
    assert (tmp_path / "f/a.npy").read_bytes() == before


def test_fixed_length_keeps_the_seconds():
    """A step of activity is found at the same second after resizing, whatever the length was."""
    from actloc.data.features import FeatureFiles, grid_of, resized_features
    for steps in (60, 192, 193, 700):
        clock = FeatureGrid(15, 16, 16)
        middle = clock.to_seconds(np.arange(steps))
        duration = steps * 16 / 15
        lo, hi = .25 * duration, .6 * duration
        x = ((middle > lo) & (middle < hi)).astype(np.float32)[None]
        grid = grid_of(FeatureFiles("f", 16, 16, fps=15, resize=192), "f", steps, duration, 15)
        active = grid.to_seconds(np.flatnonzero(resized_features(x, 192)[0] > .5))
        assert abs(active.min() - grid.stride / 30 - lo) < 2 * 16 / 15 and abs(active.max() + grid.stride / 30 - hi) < 2 * 16 / 15
        assert grid.to_seconds(191.5) == pytest.approx(duration) and grid.to_seconds(-.5) == pytest.approx(0)


# ---- fusion

def test_fused_truth_is_found(shared):
    known = open_annotations(shared / "data/anet13_groundtruth.json.gz", bad_segments="keep")
    entries = known.subset("validation")[:600]
    truth = ground_truth_table(entries)
    proposals = Table(truth.video, truth.segments, np.zeros(len(truth)), np.full(len(truth), .9), truth.ids)
    tiou = PROTOCOLS["activitynet"].tiou
    assert average_recall(truth, proposals, tiou).average_recall[-1] == 1
    sure = VideoScores(truth.ids, np.array([np.bincount(r.labels[:1], minlength=200) for r in entries], float))
    guessed = draw_class_scores(entries, 200)
    guess = VideoScores(tuple(guessed), np.array(list(guessed.values())))
    best, likely = (evaluate_temporal(truth, fuse_classes(proposals, s, 2), tiou, known.classes).average_mAP for s in (sure, guess))
    assert best > .99 and .6 < likely < best


def test_actions_of_true_verbs_and_nouns_are_found(shared, tmp_path):
    verbs, nouns, actions = (open_annotations(shared / "data/epic_kitchens_100", bad_segments="repair", task=t) for t in ("verb", "noun", "action"))
    table = lambda known, score: (lambda t: replace(t, scores=np.full(len(t), score)))(ground_truth_table(known.recordings[:20]))
    fused, names = fuse_actions(table(verbs, .9), table(nouns, .4), min_tiou=.99)
    number = {name: k for k, name in enumerate(actions.classes)}
    known = np.array([number.get(name, -1) for name in names])
    truth = ground_truth_table(actions.recordings[:20])
    found = Table(fused.video, fused.segments, known[fused.labels], fused.scores, fused.ids)
    result = evaluate_temporal(truth, found, PROTOCOLS["epic100"].tiou, actions.classes)
    assert result.recall[:, 1].min() > .98 and result.average_mAP > .9      # two actions at one time make two more that are none


def test_score_files_never_run(tmp_path):
    """Damaged and hostile pickles give an answer or a sentence, and touch nothing."""
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'ran'}",)
    whole = pickle.dumps({"a": np.arange(4.), "b": [Evil()]}), pickle.dumps({"a": np.arange(4., dtype=np.float32), "b": ([1, 2.5], "text")}, 2), pickle.dumps([np.float64(3)], 5)
    draw, answers = random.Random(0), 0
    for i in range(600):
        data = bytearray(whole[i % 3])
        for _ in range(draw.randrange(0, 4)): data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "x.pkl").write_bytes(data[: draw.randrange(len(data) // 2, len(data) + 1)] if draw.random() < .3 else data)
        try: read_pickle(tmp_path / "x.pkl"); answers += 1
        except ValueError as error: assert str(tmp_path / "x.pkl") in str(error)
    assert answers > 20 and not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="posix.system|os.system"):
        (tmp_path / "x.pkl").write_bytes(whole[0]); read_video_scores(tmp_path / "x.pkl", ("p", "q"))


# ---- stand-in features: from the real annotations to a result that says what it is made of

def test_simulated_from_end_to_end(shared, tmp_path):
    e = experiment("thumos_i3d", f"data={shared / 'data/thumos14.json'}", "data_settings.features={folder: f, stride: 4, num_frames: 16, channels: 24}")
    done, written = simulate(e, tmp_path / "sim", videos=3, half=True)
    assert done.recordings == 6 and done.gigabytes < .01
    small = ("model={input_dim: 24, num_classes: 20, width: 16, arch: [1, 1, 2], max_seq_len: 128, regression_ranges: [[0, 4], [4, 16], [16, 10000]]}", "training={epochs: 1, warmup_epochs: 1, learning_rate: 1e-3}", "workers=0", "timelines=0")
    words = [w for change in small for w in ("-p", change)]
    run = subprocess.run([ACTLOC, "train", "-f", written, *words, "--out", "run"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "SIMULATED" in metrics["protocol"] and "3 of 212 videos" in metrics["protocol"] and "seed 0" in metrics["simulated"] and len(metrics["left_out"]) >= 406
    assert "SIMULATED" in run.stdout and "SIMULATED" in json.loads((tmp_path / "run/model.json").read_text())["protocol"]
    with pytest.raises(ValueError, match="class_scores|does not exist|no such"): judged([], Dataset((), ("action",)), "nowhere.json", {"class_free": True}, "validation", "activitynet", fusion={"scores": "no.json"})


def test_simulated_class_free_is_fused(shared, tmp_path):
    content = read_json(shared / "data/anet13_groundtruth.json.gz")
    keep = [id for s in ("training", "validation") for id in [k for k, v in content["database"].items() if v["subset"] == s][:8]]
    (tmp_path / "anet.json").write_text(json.dumps({"database": {id: content["database"][id] for id in keep}}))
    small = "model={input_dim: 12, num_classes: 1, width: 16, arch: [1, 1, 2], max_seq_len: 192, nms_per_class: false, voting_threshold: 0.9, regression_ranges: [[0, 4], [4, 16], [16, 10000]]}"
    e = experiment("anet_tsp", f"data={tmp_path / 'anet.json'}", "data_settings={features: {folder: f, stride: 16, num_frames: 16, fps: 15, prefix: v_, channels: 12, resize: 192}, strict: false, class_free: true}", small)
    _, written = simulate(e, tmp_path / "sim")
    e = read_experiment(written)
    torch.manual_seed(0)
    save_model(tmp_path / "model", ActionFormer(e.config), ModelCard(e.config, ("action",), FeatureGrid(15, 16, 16)))
    done = evaluate_checkpoint(e, tmp_path / "model", predictions=tmp_path / "out.json.gz")
    assert done.result.videos == 8 and len(done.result.classes) > 4 and 0 <= done.proposals.auc <= 1 and "SIMULATED" in done.table()
    alone = evaluate_checkpoint(Experiment("x", {**e.parameters, "fusion": {}}), tmp_path / "model").result
    assert alone.classes == ("action",) and "proposals of one class" in alone.protocol
    (tmp_path / "sim/class_scores.json").write_text("{}")
    with pytest.raises(ValueError, match="has no class scores"): evaluate_checkpoint(e, tmp_path / "model")
