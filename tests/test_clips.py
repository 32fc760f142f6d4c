"""Clips and batches: a plain-Python definition in random sweeps, the same draws for everybody, and bad input."""
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actloc.core.ava import KeyFrames, LabelMap, box_table
from actloc.data import clips
from actloc.data.clips import (CROPS, Clip, ClipBatches, ClipConfig, Look, VideoFolder, averaged, collate_clips, draw_look, every_look, make_clip, place_of, unreadable)
from actloc.data.people import people_from, read_people
from actloc.data.video import open_video, write_video

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs = lambda name: pytest.mark.skipif(not (SHARED / name).exists(), reason=f"{SHARED / name} is not here (shared files are optional)")
LABELS = LabelMap((1, 2, 3), ("one", "two", "three"))
FPS = 8
CONFIG = ClipConfig(num_frames=4, stride=2, short_side=32, crop_size=24, scales=(24, 40), flip=.5)


def scene(i, height=36, width=48):
    """A picture that says its number by its shades, with a white square at x 12..24, y 9..27."""
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 10 + 6 * (i % 40), 90, np.linspace(0, 120, width)
    image[height // 4:3 * height // 4, width // 4:width // 2] = 255
    return image


SQUARE = (.25, .25, .5, .75)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos")
    for name, n, size in (("a", 40, (36, 48)), ("b.c", 40, (48, 36)), ("short", 5, (36, 48))):
        write_video(path / f"{name}.mp4", [scene(i, *size) for i in range(n)], FPS, options={"g": "8", "crf": "4"})
    return path


def some_people(seed=0, videos=("a", "b.c"), seconds=(0, 1, 2, 3, 4), empty=.2):
    """Random boxes, some of them detections of any score, at some key frames none."""
    rng, frames, boxes, labels, scores = np.random.default_rng(seed), [(v, s) for v in videos for s in seconds], [], [], []
    for _ in frames:
        n = 0 if rng.random() < empty else rng.integers(1, 4)
        low = rng.random((n, 2)) * .6
        boxes.append(np.concatenate([low, low + .05 + rng.random((n, 2)) * .3], 1)), labels.append(rng.integers(1, 4, n)), scores.append(rng.choice([.5, .85, .9], n))
    truth = box_table(frames[::2], boxes[::2], labels[::2])
    return people_from(truth, box_table(frames, boxes, labels, scores), label_map=LABELS)


def same_batch(a, b):
    for name in ("sizes", "boxes", "clip", "targets", "rows", "keyframe", "dropped", "frames"): assert torch.equal(getattr(a, name), getattr(b, name)), name


# ---- looks

@pytest.mark.parametrize("seed", range(40))
def test_looks_are_pixels(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        height, width, short = *rng.integers(10, 200, 2).tolist(), int(rng.integers(10, 100))
        ratio = float(rng.choice([0, 1, 1.3, 2]))
        look = Look(short, int(rng.integers(0, 2) and rng.integers(1, short + 1)), tuple(rng.random(2)) if rng.random() < .5 else CROPS["bottom right"], bool(rng.integers(2)), ratio)
        (h, w), view = look.of(height, width)
        long = int(short * max(height, width) / min(height, width) + 1e-9)
        long = min(long, int(short * ratio)) if ratio else long
        assert (h, w) == ((short, long) if height <= width else (long, short))
        x1, y1, x2, y2 = view.pixels(h, w)
        if look.crop_size:
            assert x2 - x1 == y2 - y1 == look.crop_size and 0 <= x1 <= x2 <= w and 0 <= y1 <= y2 <= h
            assert abs(x1 - look.place[0] * (w - look.crop_size)) <= .5 and abs(y1 - look.place[1] * (h - look.crop_size)) <= .5
        else: assert (x1, y1, x2, y2) == (0, 0, w, h)
        assert view.flip == look.flip and np.allclose(view.crop, np.array([x1, y1, x2, y2]) / (w, h, w, h), atol=1e-12)


def test_places():
    (h, w), view = Look(100, 40, CROPS["top right"]).of(100, 200)
    assert view.pixels(h, w) == (160, 0, 200, 40)
    assert Look(100, 40, CROPS["bottom left"]).of(100, 200)[1].pixels(h, w) == (0, 60, 40, 100)
    assert Look(100, 40, CROPS["centre"]).of(100, 200)[1].pixels(h, w) == (80, 30, 120, 70)


def test_drawn_looks():
    draw = lambda config, n=400: [draw_look(config, np.random.default_rng(i)) for i in range(n)]
    assert set(draw(ClipConfig(flip=0))) == {Look(256)} and set(draw(ClipConfig(flip=1))) == {Look(256, flip=True)}
    assert set(draw(ClipConfig(flip=0, crop="centre"))) == {Look(256, 224)}
    assert {look.place for look in draw(ClipConfig(crop="corner"))} == set(CROPS.values())
    drawn = draw(ClipConfig(crop="random", scales=(230, 232)))
    assert {look.short_side for look in drawn} == {230, 231, 232} and {look.crop_size for look in drawn} == {224} and len({look.place for look in drawn}) == 400
    assert {look.max_ratio for look in draw(ClipConfig(max_ratio=1.5))} == {1.5}


def test_every_look():
    looks = every_look((224, 256), ("whole", "centre", "top left"), (False, True), 200, max_ratio=2.)
    assert len(looks) == len(set(looks)) == 12 and {l.max_ratio for l in looks} == {2.} and {(l.crop_size, l.place) for l in looks} == {(0, (.5, .5)), (200, (.5, .5)), (200, (0, 0))}


# ---- a clip is what its definition says

def clip_by_definition(video, centre, boxes, look, config):
    """Frames one by one and boxes one by one, without View, window or normalised."""
    span = config.num_frames * config.stride
    first = centre - span // 2
    if video.frames >= span: first = max(0, min(first, video.frames - span))
    else: first = 0
    numbers = [(first + i) % video.frames for i in range(0, span, config.stride)]
    (h, w), view = look.of(video.height, video.width)
    x1, y1, x2, y2 = view.pixels(h, w)
    frames = []
    for n in numbers:
        picture = video.read([n], (h, w))[0][y1:y2, x1:x2].astype(float)
        if look.flip: picture = picture[:, ::-1]
        frames.append((picture / (255 if config.scale_255 else 1) - config.mean) / config.std)
    kept = []
    for i, (a, b, c, d) in enumerate(boxes):
        left, top, right, bottom = max(a * w, x1), max(b * h, y1), min(c * w, x2), min(d * h, y2)
        share = max(right - left, 0) * max(bottom - top, 0) / max((c - a) * w * (d - b) * h, 1e-12)
        if share <= config.keep_ratio: continue
        left, right = (x2 - right, x2 - left) if look.flip else (left - x1, right - x1)
        kept.append((i, left / (x2 - x1), (top - y1) / (y2 - y1), right / (x2 - x1), (bottom - y1) / (y2 - y1)))
    return np.stack(frames).transpose(3, 0, 1, 2), np.array(kept).reshape(-1, 5)


@pytest.mark.parametrize("seed", range(12))
def test_a_clip_is_its_definition(seed, folder):
    rng, people, videos = np.random.default_rng(seed), some_people(seed, ("a", "b.c", "short"), (0, .5)), VideoFolder(folder)
    for k in range(len(people.keyframes)):
        config = replace(CONFIG, num_frames=int(rng.integers(1, 7)), stride=int(rng.integers(1, 4)), scale_255=bool(seed % 2), mean=(.4, .5, .6), std=(.2, .3, .4), keep_ratio=float(rng.choice([0, .3, .8])))
        look = Look(int(rng.integers(24, 41)), int(rng.choice([0, 16, 24])), tuple(rng.random(2)), bool(rng.integers(2)), float(rng.choice([0, 1.1])))
        video, centre = videos.place(people.video(k), people.time_s[k])
        rows = np.arange(*people.of(k).indices(len(people)))
        clip = make_clip(people, k, rows, video, centre, look, config)
        frames, kept = clip_by_definition(video, centre, people.boxes[rows], look, config)
        np.testing.assert_allclose(clip.frames, frames, atol=2e-5 * (1 if config.scale_255 else 255))
        np.testing.assert_allclose(clip.boxes, kept[:, 1:], atol=1e-6)
        assert clip.rows.tolist() == rows[kept[:, 0].astype(int)].tolist() and clip.dropped == len(rows) - len(kept) and clip.keyframe == k
        np.testing.assert_array_equal(clip.targets, people.targets[clip.rows.numpy()])
        assert clip.frames.dtype == clip.boxes.dtype == clip.targets.dtype == torch.float32 and clip.rows.dtype == torch.int64


@pytest.mark.parametrize("crop", ["whole", "centre", "corner", "random"])
def test_boxes_stay_on_their_pixels(crop, folder):
    """Through the whole training path: where the box is, the picture is white."""
    table = box_table([("a", t) for t in (1, 2, 3)], [[SQUARE]] * 3, [[1]] * 3)
    config = replace(CONFIG, crop=crop, jitter=0., mean=(0., 0., 0.), std=(1., 1., 1.), short_side=36)
    batches = ClipBatches(people_from(table, label_map=LABELS), VideoFolder(folder), config, 1)
    seen, flips = 0, set()
    for epoch in range(8):
        for batch in batches.epoch(epoch):
            if not len(batch.boxes): continue
            h, w = batch.sizes[0].tolist()
            x1, y1, x2, y2 = (batch.boxes[0].numpy() * (w, h, w, h))
            white = batch.frames[0, :, 2].amin(0).numpy() > .8
            mine = np.zeros((h, w), bool)
            mine[round(y1):round(y2), round(x1):round(x2)] = True
            assert (white != mine).mean() < .08, "more than a seam of the square differs"
            seen, flips = seen + 1, flips | {bool(batch.frames[0, 2, 0, 0, 0] > batch.frames[0, 2, 0, 0, -1])}
    assert seen >= 8 and flips == {True, False}


def shown(frames):
    """[B, F] number of each frame of `scene`, by its red (of frames in 0..255)."""
    return ((frames[:, 0, :, 2:7, 2:9].mean((2, 3)) - 10) / 6).round()


def test_the_window_around_a_key_frame(folder):
    """The shade of red says which frame it is."""
    table = box_table([("a", t) for t in (0, 2, 4)] + [("short", 0)], [[SQUARE]] * 4, [[1]] * 4)
    config = replace(CONFIG, mean=(0., 0., 0.), std=(1 / 255,) * 3, short_side=36)
    people, videos = people_from(table, label_map=LABELS), VideoFolder(folder)
    (batch,) = ClipBatches(people, videos, config, 4).in_order()
    numbers = shown(batch.frames).tolist()
    assert numbers == [[0, 2, 4, 6], [12, 14, 16, 18], [28, 30, 32, 34], [0, 2, 4, 1]]


def test_the_shift(folder):
    table = box_table([("a", 2)], [[SQUARE]], [[1]])
    people, videos, first = people_from(table, label_map=LABELS), VideoFolder(folder), []
    for shift in (0, 3):
        config = replace(CONFIG, mean=(0., 0., 0.), std=(1 / 255,) * 3, short_side=36, shift=shift, flip=0.)
        batches = ClipBatches(people, videos, config, 1)
        first.append({int(shown(b.frames)[0, 0]) for e in range(40) for b in batches.epoch(e)})
    assert first == [{12}, set(range(9, 16))]
    for second in (0, 4):                                                                # never leaves the video
        edge = people_from(box_table([("a", second)], [[SQUARE]], [[1]]), label_map=LABELS)
        for epoch in range(10): list(ClipBatches(edge, videos, replace(CONFIG, shift=30), 1).epoch(epoch))


def test_jitter(folder):
    people = people_from(box_table([("a", 2)], [[SQUARE] * 30], [[1] * 30], [np.linspace(.9, .99, 30)]), label_map=LABELS)
    assert len(people) == 1                                                              # equal rows are one box
    boxes = np.tile(SQUARE, (30, 1)) + np.arange(30)[:, None] * 1e-3
    people = people_from(box_table([("a", 2)], [boxes], [[1] * 30]), label_map=LABELS)
    batches = ClipBatches(people, VideoFolder(folder), replace(CONFIG, flip=0., jitter=.05), 1)
    (moved,) = [(b.boxes.numpy() - boxes) / (.25, .5, .25, .5) for b in batches.epoch(0)]
    assert .035 < abs(moved).max() <= .05 + 1e-6 and len(np.unique(moved)) > 100
    two = people_from(box_table([("a", 1), ("a", 2)], [[SQUARE]] * 2, [[1]] * 2), label_map=LABELS)
    (pair,) = ClipBatches(two, VideoFolder(folder), replace(CONFIG, flip=0.), 2).epoch(0)
    assert not torch.equal(pair.boxes[0], pair.boxes[1])                                 # each key frame draws its own
    (still,) = ClipBatches(people, VideoFolder(folder), replace(CONFIG, flip=0., jitter=0.), 1).epoch(0)
    np.testing.assert_allclose(still.boxes, boxes, atol=1e-6)
    (plain,) = batches.in_order()
    np.testing.assert_allclose(plain.boxes, boxes, atol=1e-6)
    np.testing.assert_array_equal(people.boxes, boxes)                                   # the input stays


# ---- the same draws, whoever draws

def by_keyframe(batches):
    """{key frame: (its frames without padding, boxes, rows, targets)}."""
    return {int(k): (b.frames[i, :, :, :b.sizes[i, 0], :b.sizes[i, 1]], b.boxes[b.clip == i], b.rows[b.clip == i], b.targets[b.clip == i]) for b in batches for i, k in enumerate(b.keyframe)}


@pytest.mark.parametrize("crop", ["whole", "random"])
def test_draws_depend_on_seed_epoch_and_key_frame_only(crop, folder):
    people, videos, config = some_people(3), VideoFolder(folder), replace(CONFIG, crop=crop, shift=2)
    base = ClipBatches(people, videos, config, 1, seed=7)
    one = by_keyframe(base.epoch(2))
    for other in (replace(base, batch_size=3), replace(base, workers=2, batch_size=2), ClipBatches(people, VideoFolder(folder), config, 2, seed=7)):
        for k, clip in by_keyframe(other.epoch(2)).items():
            for a, b in zip(clip, one[k]): assert torch.equal(a, b)
    for other, epoch in ((base, 3), (replace(base, seed=8), 2)):
        clip = by_keyframe(other.epoch(epoch))
        assert all(not torch.equal(clip[k][1], one[k][1]) for k in clip if clip[k][1].shape == one[k][1].shape and len(one[k][1]))
        assert list(clip) != list(one)
    for a, b in zip(base.epoch(2), base.epoch(2)): same_batch(a, b)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_shares_are_the_whole(world, training, folder):
    people, videos = some_people(5), VideoFolder(folder)
    whole = ClipBatches(people, videos, CONFIG, 4, seed=1, training=training)
    run = lambda batches: list(batches.epoch(1) if training else batches.in_order())
    parts = [run(replace(whole, share=(rank, world))) for rank in range(world)]
    for i, batch in enumerate(run(whole)):
        for rank in range(world):
            mine = batch.keyframe[rank::world].tolist()
            if not mine:
                assert len(parts[rank]) <= i
                continue
            assert parts[rank][i].keyframe.tolist() == mine
            a, b = by_keyframe([batch]), by_keyframe([parts[rank][i]])
            for k in mine:
                for x, y in zip(a[k], b[k]): assert torch.equal(x, y)
    assert sum(len(p.keyframe) for part in parts for p in part) == (len(whole) * 4 if training else len(people.keyframes))


def test_an_epoch_is_a_permutation_of_key_frames_with_boxes(folder):
    people = some_people(1)
    batches = ClipBatches(people, VideoFolder(folder), CONFIG, 3)
    with_boxes = sorted({int(k) for k, s in zip(people.keyframe, people.scores) if s >= .9})
    assert 0 < len(with_boxes) < len(people.keyframes) and batches.visited.tolist() == with_boxes
    seen = [k for b in batches.epoch(0) for k in b.keyframe.tolist()]
    assert len(seen) == len(set(seen)) == len(with_boxes) // 3 * 3 == len(batches) * 3 and set(seen) <= set(with_boxes) and seen != sorted(seen)
    for b in batches.epoch(0):
        assert (people.scores[b.rows.numpy()] >= .9).all() and (people.keyframe[b.rows.numpy()] == b.keyframe[b.clip].numpy()).all()
        assert len(b.rows) + b.dropped.sum() == sum((people.scores[people.of(k)] >= .9).sum() for k in b.keyframe.tolist())


def test_in_order_shows_every_key_frame_once(folder):
    people = some_people(1)
    test = ClipBatches(people, VideoFolder(folder), CONFIG, 4, training=False)
    batches = list(test.in_order())
    assert len(batches) == len(test) == 3 and [len(b) for b in batches] == [4, 4, 2]
    assert [k for b in batches for k in b.keyframe.tolist()] == list(range(10))
    rows = [r for b in batches for r in b.rows.tolist()]
    assert rows == test.rows.tolist() == np.flatnonzero(people.scores >= .85).tolist()
    np.testing.assert_allclose(np.concatenate([b.boxes for b in batches]), people.boxes[rows], atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([b.targets for b in batches]), people.targets[rows])
    assert {tuple(s) for b in batches for s in b.sizes.tolist()} == {(32, 42), (42, 32)}
    some = list(test.in_order(keyframes=[7, 2, 2]))
    assert [k for b in some for k in b.keyframe.tolist()] == [7, 2, 2]


def test_nobody_is_there(folder):
    people = people_from(detections=box_table([("a", 1), ("a", 2)], [[SQUARE], []], [[1], []], [[.3], []]), label_map=LABELS)
    (batch,) = ClipBatches(people, VideoFolder(folder), CONFIG, 2, training=False).in_order()
    assert [tuple(x.shape) for x in batch] == [(2, 3, 4, 32, 42), (2, 2), (0, 4), (0,), (0, 3)] and batch.rows.tolist() == [] and batch.dropped.tolist() == [0, 0]
    assert batch.clip.dtype == torch.int64 and batch.boxes.dtype == torch.float32


def test_zero_area_boxes_are_dropped_and_counted(folder):
    people = people_from(box_table([("a", 1)], [[SQUARE, (.3, .3, .3, .6), (.9, .9, 1, 1)]], [[1, 2, 3]]), label_map=LABELS)
    test = ClipBatches(people, VideoFolder(folder), CONFIG, 1, training=False)
    (plain,), (cropped,) = test.in_order(), test.in_order([Look(32, 24, (0., 0.))])
    assert (plain.dropped.tolist(), plain.rows.tolist()) == ([1], [0, 2]) and (cropped.dropped.tolist(), cropped.rows.tolist()) == ([2], [0])
    result = averaged([plain.rows, cropped.rows], [np.ones((2, 3)), np.zeros((1, 3))], test.rows)
    assert (result.rows.tolist(), result.counts.tolist(), result.lost.tolist()) == ([0, 2], [2, 1], [1]) and result.scores[:, 0].tolist() == [.5, 1]


# ---- views

def test_views_come_one_after_another_and_share_what_they_read(folder, monkeypatch):
    people, test = some_people(2), None
    test = ClipBatches(people, VideoFolder(folder), CONFIG, 4, training=False)
    looks, reads = every_look((32, 36), ("whole", "centre"), (False, True), crop_size=24), []
    original = clips.Video.read
    monkeypatch.setattr(clips.Video, "read", lambda self, numbers, size=None: reads.append(size) or original(self, numbers, size))
    batches = list(test.in_order(looks))
    assert len(reads) == 2 * len(people.keyframes) and len(batches) == 8 * 3
    for i in range(0, 24, 8):
        assert len({tuple(b.keyframe.tolist()) for b in batches[i:i + 8]}) == 1
    for i, look in enumerate(looks):
        for a, b in zip(batches[i::8], test.in_order([look])): same_batch(a, b)


@pytest.mark.parametrize("seed", range(20))
def test_averages_are_their_definition(seed):
    rng = np.random.default_rng(seed)
    expected = np.flatnonzero(rng.random(30) < .7)
    rows = [rng.choice(expected, rng.integers(0, 9), replace=False) for _ in range(rng.integers(0, 12))]
    scores = [rng.random((len(r), 4)) for r in rows]
    result = averaged([torch.from_numpy(r) for r in rows], [torch.from_numpy(s) for s in scores], expected)
    collected = {r: [] for r in expected.tolist()}
    for r, s in zip(rows, scores):
        for one, score in zip(r.tolist(), s): collected[one].append(score)
    assert result.rows.tolist() == [r for r, s in collected.items() if s] and result.lost.tolist() == [r for r, s in collected.items() if not s]
    assert result.counts.tolist() == [len(s) for s in collected.values() if s]
    if len(result.rows): np.testing.assert_allclose(result.scores, [np.mean(s, 0) for s in collected.values() if s], atol=1e-12)
    outside = np.setdiff1d(np.arange(31), expected)
    for row in (outside[0], 30):
        with pytest.raises(ValueError, match=f"row {row}, which is not expected"): averaged([*rows, [row]], [*scores, np.zeros((1, 4))], expected)


# ---- batches

@pytest.mark.parametrize("seed", range(10))
def test_collate(seed):
    rng = np.random.default_rng(seed)
    def clip(k):
        h, w, n = *rng.integers(1, 9, 2).tolist(), int(rng.integers(0, 4))
        return Clip(torch.from_numpy(rng.random((3, 2, h, w), np.float32)) + 1, torch.from_numpy(rng.random((n, 4), np.float32)), torch.ones(n, 5), torch.from_numpy(rng.integers(0, 99, n)), k, n + 1)
    several = [clip(k) for k in range(rng.integers(1, 5))]
    batch = collate_clips(several)
    assert batch.frames.shape[3:] == (max(c.frames.shape[2] for c in several), max(c.frames.shape[3] for c in several)) and batch.frames.is_contiguous()
    assert batch.sizes.tolist() == [list(c.frames.shape[2:]) for c in several] and len(batch) == len(several)
    for i, c in enumerate(several):
        h, w = c.frames.shape[2:]
        assert torch.equal(batch.frames[i, :, :, :h, :w], c.frames) and not batch.frames[i, :, :, h:].any() and not batch.frames[i, :, :, :, w:].any()
        assert torch.equal(batch.boxes[batch.clip == i], c.boxes) and torch.equal(batch.rows[batch.clip == i], c.rows)
    assert batch.dropped.tolist() == [c.dropped for c in several] and batch.keyframe.tolist() == list(range(len(several)))


def test_a_batch_unpacks_into_a_loss(folder):
    (batch, *_) = ClipBatches(some_people(), VideoFolder(folder), CONFIG, 2).in_order()
    frames, sizes, boxes, clip, targets = batch.to("cpu")
    assert frames is batch.frames and targets.shape == (len(boxes), 3)
    banked = replace(batch, memory=[torch.zeros(3, 2, 2, 8), torch.zeros(0, 2, 2, 8)])
    away = banked.to("meta")
    assert len([*banked]) == 6 and [*banked][5] is banked.memory and all(x.device.type == "meta" for x in (*away.memory, away.frames, away.dropped))


# ---- videos

def test_frames_of_a_second(folder, tmp_path):
    assert VideoFolder(folder).place("a", 2.)[1] == 16 and VideoFolder(folder, first_second=1).place("a", 2.)[1] == 8
    assert place_of(lambda name: open_video(folder / f"{name}.mp4"), "a", 2.3)[1] == 18
    (tmp_path / "film").mkdir()
    for i in range(1, 31): Image.fromarray(scene(i)).save(tmp_path / f"film/image_{i:06d}.jpg")
    ava = VideoFolder(tmp_path, first_second=900, fps=5)
    for t in (900, 902, 905): assert ava.place("film", t)[1] + 1 == (t - 900) * 5 + 1                  # the published rule; files count from 1
    with pytest.raises(ValueError, match="second 6 lies outside"): ava.place("film", 906)
    with pytest.raises(ValueError, match="outside"): ava.place("film", 899)
    with pytest.raises(ValueError, match="fps"): VideoFolder(tmp_path).place("film", 1)


def test_kinetics_names(tmp_path):
    (tmp_path / "dancing").mkdir()
    for name in ("x_y-z_000010_000014", "x_y-z_000012_000016", "x_y-z_000030_000034", "plain"): write_video(tmp_path / f"dancing/{name}.mp4", [scene(i) for i in range(32)], FPS)
    videos = VideoFolder(tmp_path, "name", pattern="*/*")
    assert set(videos.files) == {"x_y-z"}
    assert [videos.find("x_y-z", t) and videos.find("x_y-z", t)[0] for t in (9.9, 10, 11.9, 12.9, 13.1, 15.9, 16, 31)] == [None, 10, 10, 10, 12, 12, None, 30]
    assert videos.place("x_y-z", 31.26)[1] == 10
    with pytest.raises(ValueError, match="no video 'x_y-z' that shows second 20"): videos.place("x_y-z", 20)
    with pytest.raises(ValueError, match="3 videos are called"): videos("x_y-z")


def test_two_files_of_one_name(folder, tmp_path):
    for name in ("v.mp4", "v.mkv"): write_video(tmp_path / name, [scene(i) for i in range(3)], FPS)
    (tmp_path / "v.txt").write_text("no video")
    videos = VideoFolder(tmp_path)
    assert set(videos.files) == {"v"}
    with pytest.raises(ValueError, match="v.mkv and .*v.mp4 are both called so"): videos.find("v", 0)
    with pytest.raises(ValueError, match="2 videos are called 'v'"): videos("v")


def test_few_videos_stay_open(folder, tmp_path, monkeypatch):
    for i in range(6): write_video(tmp_path / f"v{i}.mp4", [scene(n) for n in range(3)], FPS)
    one = open_video(tmp_path / "v0.mp4")
    monkeypatch.setattr(clips, "OPEN_BYTES", 2 * clips.open_bytes(one)), monkeypatch.setattr(clips, "TABLES_BYTES", 3 * clips.table_bytes(one))
    videos, made = VideoFolder(tmp_path), []
    monkeypatch.setattr(clips, "open_video", lambda *a: made.append(a[0].stem) or open_video(*a))
    for i in (0, 1, 2, 0, 3, 4, 0, 5, 1, 1): videos(f"v{i}").read([0])
    assert made == ["v0", "v1", "v2", "v3", "v4", "v5", "v1"]                    # v0 was always among the last three
    assert [p.stem for p in videos.known.things] == ["v0", "v5", "v1"] and [p.stem for p in videos.open.things] == ["v5", "v1"]
    assert [len(v.decoders.free) for v in videos.known.things.values()] == [0, 1, 1]
    monkeypatch.setattr(videos.known, "room", 1)                                  # a table that goes takes its open file along
    videos("v2").read([0])
    assert list(videos.known.things) == list(videos.open.things) == [tmp_path / "v2.mp4"] and videos.known.held == clips.table_bytes(one)
    monkeypatch.undo()
    again = pickle.loads(pickle.dumps(videos))
    np.testing.assert_array_equal(again("v5").read([2]), videos("v5").read([2]))


def test_several_folders_and_functions(folder, tmp_path):
    write_video(tmp_path / "other.mp4", [scene(i) for i in range(40)], FPS)
    people = people_from(box_table([("a", 1), ("other", 902)], [[SQUARE]] * 2, [[1]] * 2), label_map=LABELS)
    (batch,) = ClipBatches(people, [VideoFolder(folder), VideoFolder(tmp_path, first_second=900)], CONFIG, 2).in_order()
    (plain,) = ClipBatches(people_from(box_table([("a", 1), ("a", 2)], [[SQUARE]] * 2, [[1]] * 2), label_map=LABELS), lambda name: open_video(folder / f"{name}.mp4"), CONFIG, 2).in_order()
    assert (batch.frames - plain.frames).abs().max() < .3                        # the same scenes, encoded twice


# ---- bad input: file and row are named

def csv_people(tmp_path, *lines):
    (tmp_path / "truth.csv").write_text("\n".join(f"{line},.2,.2,.5,.5,1" for line in lines))
    return read_people(tmp_path / "truth.csv", label_map=LABELS)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_key_frame_outside_its_video(workers, folder, tmp_path):
    batches = ClipBatches(csv_people(tmp_path, "a,1", "b.c,2", "a,5"), VideoFolder(folder), CONFIG, 1, workers=workers)
    for run in (lambda: list(batches.in_order()), lambda: list(batches.epoch(0))):
        with pytest.raises(ValueError, match=r"^\S*truth.csv, row 3 \(video a, second 5\): \S*a.mp4: second 5 lies outside"): run()
    wrong, texts = unreadable(batches.people, batches.videos)
    assert [wrong.name(i) for i in range(len(wrong))] == ["a,0005"] and len(texts) == 1 and "row 3" in texts[0]


def test_missing_videos(folder, tmp_path):
    people = csv_people(tmp_path, "a,1", "gone,1", "gone,2", "also gone,7", "b.c,1")
    with pytest.raises(ValueError, match=r"2 videos are missing in \S+ \(3 of 5 key frames; .*row 2 \(video gone, second 1\)\): also gone, gone\. .*skip_missing"): ClipBatches(people, VideoFolder(folder), CONFIG, 1)
    with pytest.warns(UserWarning, match="2 videos are missing.*also gone, gone.*left out"): batches = ClipBatches(people, VideoFolder(folder), CONFIG, 2, skip_missing=True)
    assert [people.video(k) for k in batches.present] == ["a", "b.c"] and batches.rows.tolist() == [0, 4] and batches.visited.tolist() == batches.present.tolist()
    assert len(list(batches.epoch(0))) == len(list(batches.in_order())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipBatches(csv_people(tmp_path, "a,1"), VideoFolder(folder), CONFIG, 1)


def test_missing_and_broken_frames(folder, tmp_path):
    (tmp_path / "film").mkdir()
    for i in range(1, 41): Image.fromarray(scene(i)).save(tmp_path / f"film/image_{i:06d}.jpg")
    (tmp_path / "film/image_000011.jpg").write_bytes(b"no picture")
    videos = VideoFolder(tmp_path, fps=FPS)
    with pytest.raises(ValueError, match=r"truth.csv, row 1 \(video film, second 1\): .*image_000011.jpg: this frame cannot be read"): list(ClipBatches(csv_people(tmp_path, "film,1"), videos, CONFIG, 1).in_order())
    (tmp_path / "film/image_000011.jpg").unlink()
    with pytest.raises(ValueError, match=r"row 1 \(video film, second 3\): .*film: 1 of 40 images are missing: image_000011.jpg"):
        list(ClipBatches(csv_people(tmp_path, "film,3"), VideoFolder(tmp_path, fps=FPS), CONFIG, 1).in_order())
    whole = (folder / "a.mp4").read_bytes()
    for name, data in (("cut", whole[:len(whole) // 2]), ("text", b"hello"), ("none", b"")):
        (tmp_path / f"{name}.mp4").write_bytes(data)
        with pytest.raises(ValueError, match=rf"row 1 \(video {name}, second 1\): .*{name}.mp4: "): list(ClipBatches(csv_people(tmp_path, f"{name},1"), VideoFolder(tmp_path), CONFIG, 1).in_order())


def test_settings():
    assert ClipConfig(mean=[.1, .2, .3], std=[1, 1, 1], scales=[224, 300]) == ClipConfig(mean=(.1, .2, .3), std=(1, 1, 1), scales=(224, 300))
    for wrong in (dict(crop="left"), dict(num_frames=0), dict(stride=0), dict(short_side=0), dict(shift=-1), dict(flip=-.1), dict(keep_ratio=1.5), dict(jitter=.5), dict(crop="centre", crop_size=300),
                  dict(crop="random", crop_size=300), dict(crop="random", scales=(320, 256)), dict(max_ratio=.5), dict(num_frames=2.), dict(flip=float("nan")), dict(crop="random", scales=(256, 300, 320))):
        with pytest.raises(ValueError, match="ClipConfig: "): ClipConfig(**wrong)
    ClipConfig(short_side=100)                                                  # nothing is cropped, so a crop need not fit


def test_batches_that_cannot_be(folder):
    people, videos = some_people(), VideoFolder(folder)
    for wrong in (dict(batch_size=99), dict(batch_size=0), dict(batch_size=3, share=(0, 2)), dict(batch_size=2, share=(2, 2)), dict(batch_size=2, share=(-1, 2))):
        with pytest.raises(ValueError, match="ClipBatches: "): ClipBatches(people, videos, CONFIG, **wrong)
    with pytest.raises(ValueError, match="use in_order"): ClipBatches(people, videos, CONFIG, 99, training=False).epoch(0)
    with pytest.raises(ValueError, match="no such folder"): VideoFolder(folder / "nowhere")
    with pytest.raises(ValueError, match="first_second"): VideoFolder(folder, "names")
    with pytest.raises(ValueError, match="crop 'left'"): every_look(crops=("left",))
    with pytest.raises(ValueError, match="row 1 .*does not fit into 42 x 32"): list(ClipBatches(csv_like(), videos, CONFIG, 1).in_order([Look(32, 40)]))
    with pytest.raises(ValueError, match="4, 5"): collate_clips([Clip(torch.zeros(3, f, 2, 2), torch.zeros(0, 4), torch.zeros(0, 1), torch.zeros(0), 0, 0) for f in (4, 5)])


def csv_like(): return people_from(box_table([("a", 1)], [[SQUARE]], [[1]]), label_map=LABELS)


@needs("videos/demo.mp4")
def test_a_real_clip():
    people = people_from(box_table([("demo", t) for t in (1, 5, 9)], [[(.1, .1, .5, .9)]] * 3, [[1]] * 3), label_map=LABELS)
    batches = list(ClipBatches(people, VideoFolder(SHARED / "videos"), ClipConfig(), 2).in_order())
    assert [tuple(b.frames.shape) for b in batches] == [(2, 3, 32, 256, 340), (1, 3, 32, 256, 340)]
    assert all(b.frames.isfinite().all() and -2.01 < b.frames.min() < b.frames.max() < 2.46 for b in batches) and batches[0].frames.std() > .3
