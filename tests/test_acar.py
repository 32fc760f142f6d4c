"""The ACAR line as a whole: published settings, clips among others, memory, data sets in AVA's layout, bad input at the door."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from actloc.acar.bank import fingerprint_of, open_bank
from actloc.acar.heads import arranged
from actloc.acar.model import ACAR, ACARConfig
from actloc.acar.release import release_state
from actloc.acar.slowfast import slowfast_small
from actloc.app.actions import (ActionCard, MemoryConfig, attention_of, begin_with, judge, load_action_model, model_config, open_actions, read_scores, remembering,
                                save_action_model, score_actions)
from actloc.app.experiments import ask
from actloc.data.clips import ClipBatches, ClipConfig, every_look
from actloc.training.learner import Learner, LearnerConfig

ROOT = Path(__file__).parents[1]
SMALL = ClipConfig(num_frames=4, stride=2, short_side=96)


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("acar")


@pytest.fixture(scope="module")
def data(home): return open_actions("world", dict(folder=home / "world", train_videos=2, test_videos=1, duration_s=17))


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    return ACAR(ACARConfig(slowfast_small(norm="frozen"), len(data.label_map), data.poses, reduced=16, hidden=8, depth=1)).eval()


def clips_of(data, subset="test", **how): return ClipBatches(getattr(data, subset).people, data.videos, SMALL, 4, training=subset == "train", **how)


# ---- settings

# depth, output convolution of one tap, blocks of the third stage, epochs, first decay
PUBLISHED = {"ava_r50": (2, False, 6, 6, 5.6, .2783), "ava_r101": (1, True, 23, 5, 4.6, .3169), "ava_kinetics_r101": (1, True, 23, 5, 4.6, .3374)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    asked = ask(ROOT / f"params/{name}.yaml", [])
    p = {**asked.defaults, **asked.parameters}
    assert asked.notebook.stem == "train_acar"
    config, clips, how = ACARConfig.from_dict({"backbone": p["backbone"], **p["model"]}), ClipConfig(**p["clips"]), LearnerConfig.from_dict(p["training"])
    assert (config.depth, config.mlp_1x1, config.backbone.depths[2], how.epochs + how.warmup_epochs, how.milestones[0], p["expected"]["mAP"]) == PUBLISHED[name]
    assert (config.num_classes, config.poses, config.reduced, config.hidden, config.backbone.norm) == (60, 13, 1024, 512, "frozen")
    assert (clips.num_frames, clips.stride, clips.short_side, clips.min_score_train, clips.min_score_test, p["cap"]) == (32, 2, 256, .9, .85, 50)
    with torch.device("meta"): model = ACAR(config)
    assert model.head.classifier.weight.shape == (60, 1024) and sum(model.backbone.channels) == 2304


@pytest.mark.parametrize("name", ["acar_synthetic", "acar_synthetic_memory"])
def test_settings_of_the_world(name):
    p = yaml.safe_load((ROOT / f"params/{name}.yaml").read_text())
    ClipConfig(**p["clips"]), LearnerConfig.from_dict(p["training"])
    if p.get("memory"): MemoryConfig.from_dict(p["memory"])
    else: ACARConfig.from_dict({"backbone": p["backbone"], **p["model"]})


# ---- the model

def test_a_clip_gets_what_it_gets_alone(model):
    rng = np.random.default_rng(0)
    for _ in range(3):
        sizes = torch.from_numpy(rng.integers(60, 120, (3, 2)))
        clip = torch.from_numpy(rng.permutation(np.repeat([0, 1, 2], 2)))
        boxes = torch.from_numpy(np.sort(rng.random((6, 2, 2)), 1).reshape(6, 4)).float()
        frames = torch.zeros(3, 3, 4, *sizes.amax(0).tolist())
        for one, (h, w) in zip(frames, sizes.tolist()): one[..., :h, :w] = torch.randn(3, 4, h, w)
        with torch.no_grad():
            together = model(frames, sizes, boxes, clip)
            for c, (h, w) in enumerate(sizes.tolist()):
                alone = model(frames[c:c + 1, ..., :h, :w], sizes[c:c + 1], boxes[clip == c], clip[clip == c] * 0)
                assert (together[clip == c] - alone).abs().max() < 1e-5


def test_sixty_actors_in_a_clip(model):
    boxes = torch.tensor([[.1, .1, .4, .9]]).repeat(60, 1) + torch.rand(60, 1) / 2
    with torch.no_grad(): logits = model(torch.randn(1, 3, 4, 96, 208), torch.tensor([[96, 208]]), boxes, torch.zeros(60, dtype=torch.long))
    assert logits.shape == (60, model.config.num_classes) and logits.isfinite().all()


def test_views_are_averaged(data, model, home):
    looks = tuple(every_look((96,), flips=(False, True)))
    one, two = score_actions(model, clips_of(data)), score_actions(model, clips_of(data), looks, keep=home / "scores.npz")
    assert (two.counts == 2).all() and (two.rows == one.rows).all() and not np.allclose(one.scores, two.scores)
    np.testing.assert_array_equal(read_scores(home / "scores.npz").scores, two.scores)


def test_perfect_scores_find_everything(data):
    """The ground truth as a model's answer, in the boxes of the ground truth."""
    from actloc.app.actions import Subset
    from actloc.data.clips import Averages
    from actloc.data.people import read_people
    people = read_people(Path(data.videos.folder).parent / "test.csv", label_map=data.label_map)
    rows = np.arange(len(people))
    result = judge(Subset(people, data.test.truth, people), Averages(rows, people.targets + 0., rows * 0 + 1, rows[:0]), cap=None)
    assert result.mAP == 1


# ---- memory

def test_a_memory_is_asked_and_starts_without_a_say(data, model, home):
    save_action_model(home / "model", model, ActionCard(model.config, SMALL, data.label_map))
    config = model_config(data, {}, {}, str(home / "model"), memory=True)
    net = ACAR(config).eval()
    begin_with(net, str(home / "model"), frozen=True)
    batches = remembering(clips_of(data), data.test.detected, home / "bank", net, MemoryConfig(window_s=3.))
    without = score_actions(model, clips_of(data)).scores
    np.testing.assert_allclose(score_actions(net, batches).scores, without, atol=1e-6)
    train = remembering(clips_of(data, "train"), data.train.detected, home / "bank train", net, MemoryConfig(window_s=3.))
    learner = Learner(net, train, LearnerConfig(epochs=1, warmup_epochs=0, learning_rate=1e-2, ema_decay=0), home / "run", device="cpu").fit(progress=False)
    assert learner.iteration > 3 and fingerprint_of(net) == fingerprint_of(model), "what makes the maps is frozen"
    assert np.abs(score_actions(net, batches).scores - score_actions(net, clips_of(data)).scores).max() > 1e-3, "the memory has a say now"
    batch = next(batches.in_order(keyframes=[5]))
    among, past = attention_of(net.eval(), batch)
    assert among.shape[:2] == (len(batch.boxes),) * 2 and past.shape[:2] == (len(batch.boxes), len(batch.memory[0]))
    torch.testing.assert_close(past.sum(1), torch.ones_like(past[:, 0]))
    torch.nn.init.normal_(model.head.pair.weight)
    with pytest.raises(ValueError, match="mean nothing to it"): open_bank(home / "bank", fingerprint_of(model))


def test_entries_of_the_same_clip_lie_where_its_maps_lie(model):
    for pooled in (True, False):
        model.head.pooled = pooled
        features, boxes, clip = torch.randn(2, sum(model.backbone.channels), 9, 12), torch.tensor([[.1, .1, .6, .9], [.2, .2, .9, 1.]]), torch.tensor([0, 1])
        first = model.head.first_order(features, None, boxes, clip)
        memory = arranged([m[None] for m in first.maps], model.head.map_sizes(features, None), first.maps.shape[1:3], torch.float32)
        assert memory.sizes is None and torch.equal(memory.maps, first.maps)
    model.head.pooled = True


# ---- where a training begins

def test_checkpoints_of_the_release(data, home):
    torch.manual_seed(1)
    config = ACARConfig(slowfast_small(norm="frozen"), len(data.label_map), data.poses, reduced=16, hidden=8)
    one, other = ACAR(config), ACAR(config)
    torch.save({"state_dict": release_state(one)}, home / "whole.pth.tar")
    assert "of the model" in begin_with(other, str(home / "whole.pth.tar"))
    for name, x in one.state_dict().items(): assert torch.equal(x, other.state_dict()[name])
    smaller = ACAR(replace(config, hidden=4))
    with pytest.raises(ValueError, match="do not fit"): begin_with(smaller, str(home / "whole.pth.tar"))
    with pytest.raises(ValueError): begin_with(other, str(home / "nowhere.pth"))


def test_a_folder_that_does_not_fit(home):
    folder = home / "odd"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps({"model": "ACAR", "config": {}}))
    with pytest.raises(ValueError, match="not written by save_action_model"): load_action_model(folder)


# ---- data sets in AVA's layout

def ava(folder, data, change=lambda text: text):
    world = Path(data.videos.folder).parent
    folder.mkdir()
    for name in ("train.csv", "test.csv", "detections_test.csv", "classes.pbtxt"): (folder / name).write_text(change((world / name).read_text()) if name == "train.csv" else (world / name).read_text())
    (folder / "excluded.csv").write_text("train_000,0003\n")
    (folder / "videos").symlink_to(data.videos.folder)
    return {"videos": "videos", "classes": "classes.pbtxt", "poses": 4, "train": {"ground_truth": ["train.csv"], "exclusions": "excluded.csv"},
            "test": {"ground_truth": "test.csv", "detections": "detections_test.csv"}}


def test_files_in_avas_layout(data, tmp_path):
    opened = open_actions(tmp_path / "ava", ava(tmp_path / "ava", data))
    names = {opened.train.people.keyframes.name(k) for k in range(len(opened.train.people.keyframes))}
    assert not any("train_000" in str(n) and "3" == str(n).split(",")[-1].strip(" )'").lstrip("0") for n in names)
    assert len(opened.test.people) == len(data.test.people) and (opened.test.people.scores < 1).all()
    assert asdict(MemoryConfig(grid=[2, 2]))["grid"] == (2, 2)


@pytest.mark.parametrize("wrong, says", [({"window_s": -1}, "a window of 0 s or more"), ({"window_s": float("nan")}, "a window of 0 s"), ({"window_s": "10"}, "a window of 0 s"), ({"per_second": 0}, "at least one actor"),
                                         ({"per_second": 2.5}, "at least one actor"), ({"grid": [0, 2]}, "two whole numbers from 1"), ({"grid": [2]}, "two whole numbers"), ({"grid": 2}, "two whole numbers")])
def test_a_memory_that_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says): MemoryConfig.from_dict(wrong)


@pytest.mark.parametrize("change, says", [
    (lambda text: text.replace(",1,", ",99,", 1), "99"),
    (lambda text: "train_000,0005,0.5,0.5,0.2,0.9,1,1\n" + text, "row 1"),
    (lambda text: "train_000,0005,0.5,0.5,1.7,0.9,1,1\n" + text, "row 1"),
    (lambda text: "train_000,0005,0.5\n" + text, "row 1")])
def test_bad_rows_are_named(data, tmp_path, change, says):
    settings = ava(tmp_path / "ava", data, change)
    with pytest.raises(ValueError, match=says) as error: open_actions(tmp_path / "ava", settings)
    assert "train.csv" in str(error.value)


def test_key_frames_outside_the_video_and_missing_videos(data, tmp_path):
    settings = ava(tmp_path / "ava", data, lambda text: text.replace("train_000,0005", "train_000,0500"))
    opened = open_actions(tmp_path / "ava", settings)
    batches = ClipBatches(opened.train.people, opened.videos, SMALL, 4)
    with pytest.raises(ValueError, match="train.csv"): list(batches.in_order())
    other = ava(tmp_path / "other", data, lambda text: text.replace("train_001", "lost_film"))
    lost = open_actions(tmp_path / "other", other)
    with pytest.raises(ValueError, match="lost_film"): ClipBatches(lost.train.people, lost.videos, SMALL, 4)
