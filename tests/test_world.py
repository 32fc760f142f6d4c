"""What guards the synthetic world but does not teach: the same files again, distances and rounds in any world, interrupted writing, bad values."""
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import av
import numpy as np
import pytest

from actloc.core.ava import read_boxes, read_boxes_by_definition, read_label_map
from actloc.data import world as world_module
from actloc.data.world import (CLASSES, class_list, LIMITS, MARGIN, NEAR_S, SCREEN, WorldConfig, box_of, chance, detections, labels, make_world, parts, render,
                               rounds, scene, write_film)

FEW = WorldConfig(train_videos=2, test_videos=1, duration_s=16)
ODD = (FEW, WorldConfig(duration_s=18, fps=5, wave_hz=1, width=240, height=120, shirts=4, min_actors=4, max_actors=4, size_spread=0, walk=5, hold_s=1, seed=5),
       WorldConfig(duration_s=50, fps=12, shirts=6, hold_s=6, pose_s=1, screen_s=1, noise=0, clutter=0, brightness=0, seed=6), WorldConfig(duration_s=16, min_actors=1, max_actors=1, width=64))
BELOW = 3 + SCREEN[1]   # first row under the screen


def fingerprint(config):
    """Pixels and tables of two videos."""
    digest = hashlib.sha256()
    for subset in ("train", "test"):
        play = scene(config, subset, 1)
        for frame in render(config, play, range(0, config.duration_s * config.fps, 7)): digest.update(frame.tobytes())
        for lines in world_module._rows(config, play, True): digest.update("".join(lines).encode())
    return digest.hexdigest()


def near(config, play, actor, second, margin=MARGIN):
    """Rows and columns of the box and a margin."""
    x1, y1, x2, y2 = (box_of(config, play, actor, second * config.fps) * np.tile((config.width, config.height), 2)).round().astype(int)
    return slice(max(y1 - margin, 0), y2 + margin), slice(max(x1 - margin, 0), x2 + margin)


def clip(config, play, second, wide=.5):
    """All frames within `wide` seconds of a key frame."""
    first, last = (round((second + side * wide) * config.fps) for side in (-1, 1))
    return np.stack(list(render(config, play, range(max(first, 0), min(last, config.duration_s * config.fps)))))


def test_another_process_makes_the_same_pixels_and_rows():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(FEW)


def test_seeds_and_subsets_differ_and_the_global_random_state_is_left_alone():
    np.random.seed(1)
    before = fingerprint(FEW)
    drawn = np.random.rand()
    np.random.seed(2)
    assert fingerprint(FEW) == before != fingerprint(replace(FEW, seed=1))
    np.random.seed(1)
    assert np.random.rand() == drawn
    assert not np.array_equal(scene(FEW, "train", 0).screen, scene(FEW, "test", 0).screen)


def test_a_scene_does_not_depend_on_how_many_there_are_nor_on_how_it_is_filmed():
    a, b = scene(FEW, "train", 1), scene(replace(FEW, train_videos=9, noise=30, clutter=50, brightness=0, quality=40, missed=.5), "train", 1)
    for field in fields(a): assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_a_world_of_more_shirts_has_more_classes(tmp_path):
    world = make_world(tmp_path / "w", replace(FEW, shirts=6))
    assert read_label_map(world.classes).names == tuple(name for name, _ in class_list(6)) and len(class_list(6)) == 19 and class_list(3) == CLASSES == class_list(6)[:16]
    assert all(labels(s).shape[2] == 19 for s in world.scenes("train")) and len(chance(world.scenes("train"))[0]) == 19
    assert read_boxes(world.train, False).labels.max() <= 19


def test_two_folders_hold_the_same_bytes(tmp_path):
    one, two = (make_world(tmp_path / name, FEW) for name in "ab")
    for path in sorted(p for p in one.folder.rglob("*") if p.is_file()):
        twin = two.folder / path.relative_to(one.folder)
        if path.suffix != ".mp4": assert path.read_bytes() == twin.read_bytes(), path.name
        else: assert np.array_equal(decoded(path), decoded(twin)), path.name
    assert sorted(p.name for p in one.folder.iterdir()) == ["classes.pbtxt", "detections_test.csv", "detections_train.csv", "test.csv", "train.csv", "videos", "world.json"]
    assert sorted(p.name for p in one.videos.iterdir()) == ["test_000.mp4", "train_000.mp4", "train_001.mp4"]


def decoded(path):
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.frames == len(frames)
        return frames


def test_the_files_hold_what_the_scripts_say(tmp_path):
    world = make_world(tmp_path / "w", FEW)
    classes = read_label_map(world.classes)
    assert classes.names == tuple(name for name, _ in CLASSES) and classes.tiers_from == "label_type" and world.num_poses == 4
    for subset in ("train", "test"):
        truth, found = read_boxes(getattr(world, subset), False), read_boxes(getattr(world, f"detections_{subset}"), True)
        for table, path, scores in ((truth, getattr(world, subset), False), (found, getattr(world, f"detections_{subset}"), True)):
            again = read_boxes_by_definition(path, scores)
            assert np.array_equal(table.boxes, again.boxes) and np.array_equal(table.labels, again.labels)
            assert ((table.boxes >= 0) & (table.boxes <= 1)).all() and (table.boxes[:, :2] < table.boxes[:, 2:]).all()
            assert set(table.keyframes.second.tolist()) == set(range(1, 16)) and len(table.keyframes.videos) == len(world.scenes(subset))
        rows = [line.split(",") for line in getattr(world, subset).read_text().splitlines()]
        told = {(name, int(second), int(person), int(label)) for name, second, *_, label, person in rows}
        wanted = {(s.name, t, a + 1, k + 1) for s in world.scenes(subset) for a, t, k in np.argwhere(labels(s)) if 1 <= t <= 15}
        assert told == wanted and len(rows) == len(wanted)
        video = decoded(world.videos / f"{subset}_000.mp4").astype(int)
        raw = np.stack(list(render(FEW, world.scenes(subset)[0], range(16 * 8))))
        assert video.shape == raw.shape == (128, 96, 208, 3) and abs(video - raw).mean() < 6
    assert set(found.labels.tolist()) == {-1}


def test_training_detections_carry_the_actions_of_their_person():
    config = replace(FEW, false_boxes=1.)
    for number in range(3):
        play = scene(config, "train", number)
        rows = [line.split(",") for line in world_module._rows(config, play, True)[1]]
        actions = {}
        for _, second, *box, label, score in rows: actions.setdefault((int(second), tuple(box), score), set()).add(int(label))
        want = [(t, set((np.flatnonzero(labels(play)[a, t]) + 1).tolist()) if a >= 0 else {-1}) for t, a, _, _ in detections(config, play)]
        assert [(key[0], value) for key, value in actions.items()] == want
        assert {-1} in actions.values()


def test_ground_truth_taken_for_detections_is_perfect(tmp_path):
    from actloc.evaluation.frame import evaluate_frame
    world = make_world(tmp_path / "w", FEW)
    truth = read_boxes(world.train, False)
    result = evaluate_frame(truth, replace(truth, scores=np.ones(len(truth))), read_label_map(world.classes))
    assert result.mAP == 1 and list(result.tiers) == ["pose", "object", "person", "long-term"]


@pytest.mark.parametrize("config", ODD, ids=range(len(ODD)))
def test_what_others_do_changes_no_pixel_near_a_person(config):
    for number in range(2):
        play = scene(config, "train", number)
        for a in range(len(play)):
            rest = np.arange(len(play)) != a
            changed = {name: np.where(rest[:, None], (getattr(play, name) + 1) % n, getattr(play, name)) for name, n in (("pose", 4), ("flag", config.shirts), ("thing", 3), ("case", 3))}
            shirt = np.where(rest, (play.shirt + 1) % config.shirts, play.shirt)
            other = replace(play, shirt=shirt, screen=(play.screen + 2) % config.shirts, walk=np.where(rest[:, None], -play.walk, play.walk), **changed)
            for second in range(1, config.duration_s, 5):
                rows, columns = near(config, play, a, second)
                before, after = clip(config, play, second), clip(config, other, second)
                assert np.array_equal(before[:, rows, columns], after[:, rows, columns])
                assert not np.array_equal(before, after)


@pytest.mark.parametrize("config", ODD, ids=range(len(ODD)))
def test_what_is_carried_changes_no_pixel_of_the_seconds_around(config):
    play = scene(config, "test", 0)
    other = replace(play, thing=np.where(play.thing < 0, -1, (play.thing + 1) % 3), case=np.where(play.case < 0, -1, (play.case + 1) % 3))
    seconds = np.flatnonzero((play.case >= 0).any(0)).tolist()
    assert seconds
    for second in seconds[::2]:
        assert (labels(play)[:, second, 10:13] != labels(other)[:, second, 10:13]).any()
        assert np.array_equal(clip(config, play, second, 2), clip(config, other, second, 2))


def test_pixels_follow_their_cause():
    """The opposite of the two above: where the cause is, something changes."""
    play = scene(FEW, "train", 0)
    dark = replace(play, screen=np.full(17, -1))
    lit = np.flatnonzero(play.screen >= 0)[2]
    differ = (clip(FEW, play, lit) != clip(FEW, dark, lit)).any((0, 3))
    assert differ[:BELOW].any() and not differ[BELOW:].any()
    a, t = np.argwhere((play.thing >= 0) & (np.arange(17) > 0))[0]
    empty = replace(play, thing=np.full_like(play.thing, -1))
    assert (clip(FEW, play, t)[:, *near(FEW, play, a, t, 0)] != clip(FEW, empty, t)[:, *near(FEW, play, a, t, 0)]).any()


@pytest.mark.parametrize("config", ODD, ids=range(len(ODD)))
def test_boxes_hold_their_people_and_people_keep_their_distance(config):
    for number in range(3):
        play = scene(config, "train", number)
        for frame in range(config.fps, (config.duration_s - 1) * config.fps, 3):
            corners = [np.array([part[:4] for part in parts(config, play, a, frame)]) for a in range(len(play))]
            for a, own in enumerate(corners):
                left, top, right, bottom = box_of(config, play, a, frame) * np.tile((config.width, config.height), 2)
                assert left > 0 and right < config.width and bottom < config.height and top >= BELOW + MARGIN - 1
                assert np.allclose([own[:, 0].min(), own[:, 1].min(), own[:, 2].max(), own[:, 3].max()], [left, top, right, bottom])
                for other in corners[a + 1:]: assert other[:, 0].min() - right >= MARGIN - 1 or left - other[:, 2].max() >= MARGIN - 1   # - 1: whole pixels


def test_the_clip_of_a_key_frame_shows_one_state():
    play = scene(FEW, "train", 0)
    for second in range(1, 16):
        kinds = [[tuple(material for *_, material in parts(FEW, play, a, frame)) for frame in range(8 * second - 4, 8 * second + 4)] for a in range(len(play))]
        assert all(len(set(kind)) == 1 for kind in kinds)
        screens = clip(replace(FEW, noise=0, brightness=0), play, second)[:, :BELOW]
        assert (screens == screens[0]).all()


@pytest.mark.parametrize("hold_s", [1, 3, 6])
@pytest.mark.parametrize("duration_s", [19, 40, 41, 63, 64, 130])
def test_rounds_are_matched_once_in_any_world(hold_s, duration_s):
    config = WorldConfig(duration_s=duration_s, hold_s=hold_s, shirts=4, max_actors=4)
    assert len(rounds(np.random.default_rng(0), duration_s, hold_s)) == 1 + (duration_s - 13 - hold_s) // (20 + hold_s)
    for number in range(12):
        play = scene(config, "test", number)
        assert not ((play.thing >= 0).any(0) & (play.case >= 0).any(0)).any() and (play.thing[:, 0] < 0).all()
        assert (play.case >= 0).sum() == len(play) * 6 * len(rounds(np.random.default_rng(0), duration_s, hold_s)) and (play.case[:, duration_s] < 0).all()
        for a, t in np.argwhere(play.case >= 0):
            seconds = np.arange(max(t - 10, 0), min(t + 10, duration_s) + 1)
            seen = seconds[play.thing[a, seconds] >= 0]
            assert set(play.thing[a, seen].tolist()) == {play.case[a, t]}
            assert NEAR_S <= (t - seen).min() <= (t - seen).max() <= 10 and len(seen) == seen[-1] - seen[0] + 1


def test_contents_are_handed_out_evenly():
    config = WorldConfig(min_actors=3)
    plays = [scene(config, "train", n) for n in range(30)]
    for a in range(3): assert [sum((s.thing[a] == thing).sum() for s in plays) for thing in range(3)] == [60, 60, 60]
    assert all(len({s.thing[a, t] for a, t in np.argwhere(s.thing >= 0) if t < 20}) == 3 for s in plays)


@pytest.mark.parametrize("seed", range(4))
def test_classes_are_balanced(seed):
    config = WorldConfig(seed=seed, train_videos=80)
    blind, boxed = chance([scene(config, "train", n) for n in range(80)])
    assert (abs(blind[:4] - .25) < .03).all() and (abs(blind[4:7] - .05) < .01).all()
    assert abs(blind[7] - .233) < .03 and (abs(blind[8:10] - .36) < .05).all() and (abs(blind[10:13] - .1) < .015).all() and (abs(blind[13:] - 1 / 3) < .05).all()
    assert (boxed[:7] == 1).all() and (boxed[13:] == 1).all() and np.array_equal(boxed[7:10], blind[7:10]) and (abs(boxed[10:13] - 1 / 3) < .03).all()


def test_the_box_says_nothing_about_relations():
    """Share of positives given anything inside the box, against the share of all: within four standard errors of independent bouts."""
    config = WorldConfig()
    plays = [scene(config, "train", n) for n in range(300)]
    active = np.concatenate([labels(s)[:, 1:-1].reshape(-1, 16) for s in plays])[:, 7:10]
    for name in ("pose", "flag", "thing", "case", "shirt"):
        state = np.concatenate([np.broadcast_to(getattr(s, name).reshape(len(s), -1), s.pose.shape)[:, 1:-1].ravel() for s in plays])
        for value in np.unique(state).tolist():
            rows = active[state == value]
            bout = 2.5 if name != "shirt" else 1.
            error = np.sqrt(active.mean(0) * (1 - active.mean(0)) * bout / len(rows) * 3)
            assert (abs(rows.mean(0) - active.mean(0)) < 4 * error + .01).all(), (name, value, rows.mean(0), active.mean(0))


def test_a_write_that_fails_leaves_no_half_video_and_can_be_repeated(tmp_path, monkeypatch):
    def broken(*args):
        for i, frame in enumerate(render(*args)):
            if i == 50: raise OSError("disk full")
            yield frame
    with pytest.raises(ValueError, match="v.mp4: cannot be written .disk full"): write_film(tmp_path / "v.mp4", broken(FEW, scene(FEW, "train", 0), range(128)), FEW)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(world_module, "detections", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): make_world(tmp_path / "w", FEW)
    assert not (tmp_path / "w/world.json").exists()
    monkeypatch.undo()
    make_world(tmp_path / "w", FEW)
    assert (tmp_path / "w/world.json").exists() and len(list((tmp_path / "w").rglob("*.part"))) == 0


def test_a_second_call_does_nothing_and_a_missing_file_comes_back(tmp_path):
    world = make_world(tmp_path / "w", FEW)
    before = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")}
    assert make_world(str(tmp_path / "w"), FEW) == world
    assert {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")} == before
    text = world.test.read_bytes()
    for path in (world.test, world.videos / "train_001.mp4"): path.unlink()
    make_world(tmp_path / "w", FEW)
    assert world.test.read_bytes() == text and (world.videos / "train_001.mp4").exists()


def test_another_world_in_the_folder_is_refused(tmp_path):
    make_world(tmp_path, FEW)
    with pytest.raises(ValueError, match="noise = 4.0, not 5.0"): make_world(tmp_path, replace(FEW, noise=5))
    mark = json.loads((tmp_path / "world.json").read_text())
    (tmp_path / "world.json").write_text(json.dumps(mark | {"version": 0}))
    with pytest.raises(ValueError, match="version 0 of the generator"): make_world(tmp_path, FEW)
    (tmp_path / "world.json").write_text(json.dumps(mark | {"config": mark["config"] | {"moon": 1}}))
    with pytest.raises(ValueError, match="moon = 1, not None"): make_world(tmp_path, FEW)
    (tmp_path / "world.json").write_text("[]")
    with pytest.raises(ValueError, match="no mark of a world"): make_world(tmp_path, FEW)
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(ValueError, match="cut off"): make_world(tmp_path, FEW)


@pytest.mark.parametrize("name", [field.name for field in fields(WorldConfig)])
def test_every_field_has_limits_and_refuses_what_is_outside(name):
    low, high = LIMITS[name]
    whole = type(getattr(WorldConfig(), name)) is int
    for value in (low - 1, high + 1, float("nan"), float("inf"), "3", None, True, *([low + .5] if whole else [])):
        with pytest.raises(ValueError, match=f"{name} = "): WorldConfig(**{name: value})
    assert type(getattr(WorldConfig(**{name: np.float32(getattr(WorldConfig(), name))}), name)) is type(getattr(WorldConfig(), name))


def test_a_configuration_survives_json():
    config = WorldConfig(noise=3, seed=np.int64(4))
    assert WorldConfig(**json.loads(json.dumps(asdict(config)))) == config and hash(config)


def test_frames_and_subsets_that_do_not_exist_are_refused():
    play = scene(FEW, "test", 0)
    for frame in (-1, 128):
        with pytest.raises(ValueError, match="frames 0 to 127"): next(iter(render(FEW, play, [frame])))
    with pytest.raises(ValueError, match="'validation'"): scene(FEW, "validation", 0)
    with pytest.raises(ValueError, match="number -1"): scene(FEW, "test", -1)


if __name__ == "__main__":
    print(fingerprint(FEW))
