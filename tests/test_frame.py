"""Frame evaluation and AVA's files: the definition in random sweeps, properties that must hold for any input, and bad input."""
import gzip
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from actloc.core import ava
from actloc.core.ava import (BoxTable, KeyFrames, LabelMap, box_table, read_boxes, read_boxes_by_definition, read_exclusions, read_label_map,
                             write_boxes)
from actloc.evaluation import matching
from actloc.evaluation.frame import aligned_boxes, cap_by_definition, evaluate_frame, frame_ap_by_definition, within_cap
from actloc.evaluation.tubes import CONVENTIONS, Tubes, evaluate_tubes, read_tubes, tube_table, write_tubes

SHARED = Path(__file__).parents[2] / "shared" / "data" / "ava"
needs = lambda name: pytest.mark.skipif(not (SHARED / name).exists(), reason=f"{SHARED / name} is not here (shared files are optional)")
quiet = pytest.mark.filterwarnings("ignore:.*(label map does not have|are not among)")
LABELS = LabelMap((2, 3, 5, 7, 11), ("two", "three", "five", "seven", "eleven"))
FEW = KeyFrames(("v1", "elsewhere"), [0, 1], [904, 902])


def random_tables(seed, n=500, g=90, ties=False, clean=False):
    """Ground truth and detections near it: unknown classes and key frames, empty, reversed and NaN boxes, repetitions (`clean`: none of these)."""
    rng = np.random.default_rng(seed)
    known = KeyFrames(("v0", "v1"), [0, 0, 0, 1, 1, 1], [902, 903, 904, 902, 904, 905])
    other = KeyFrames(("v1", "v2", "v0"), [0, 0, 1, 2, 2, 2, 0], [902, 904, 902, 902, 903, 904, 910])
    low = rng.integers(0, 6, (g, 2)) / 16 if not clean else rng.random((g, 2))
    size = rng.integers(0, 6, (g, 2)) / 16 if not clean else .1 + rng.random((g, 2))
    truth = BoxTable(rng.integers(0, 5, g), np.concatenate([low, low + size], 1), rng.choice([2, 3, 5, 7] if clean else [2, 3, 4, 5, 7, 80], g), None, known)
    near = rng.integers(0, g, n)
    boxes = truth.boxes[near] + (rng.normal(0, .05, (n, 4)) if clean else rng.integers(-2, 3, (n, 4)) / 32) * (rng.random((n, 1)) < .7)
    keyframe, labels = np.array([3, 4, 5, 0, 1])[truth.keyframe[near]], truth.labels[near]
    if not clean:
        boxes[rng.random(n) < .03, rng.integers(4)] = 9 if ties else np.nan      # a heap of equal scores has no order for NaN
        keyframe, labels = np.where(rng.random(n) < .15, rng.integers(0, 7, n), keyframe), np.where(rng.random(n) < .2, rng.choice([2, 3, 4, 11], n), labels)
    scores = rng.integers(0, 30, n) / 30 if ties else rng.permutation(n) / n
    return truth, BoxTable(keyframe, boxes, labels, scores, other)


def same(a, b): np.testing.assert_allclose(a.ap, b.ap, rtol=0, atol=1e-12)


def same_table(a, b):
    for name in ("keyframe", "boxes", "labels", "scores"): np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(a.keyframes.keys, b.keyframes.keys)
    assert a.keyframes.videos == b.keyframes.videos


# ---- the definition judges

@quiet
@pytest.mark.parametrize("seed", range(40))
def test_evaluation_is_the_definition(seed):
    truth, found = random_tables(seed, ties=seed % 2 == 1)
    counted = np.zeros(4)
    for unnamed, cap, iou, exclusions in (("ignore", 50, .5, FEW), ("miss", 50, .5, KeyFrames()), ("miss", 20, .25, FEW), ("ignore", 999, 1., KeyFrames())):
        result = evaluate_frame(truth, found, LABELS, exclusions, iou, unnamed, cap=cap)
        np.testing.assert_allclose(result.ap[0], frame_ap_by_definition(truth, found, LABELS, exclusions, iou, unnamed, cap), rtol=0, atol=1e-12)
        counted += result.capped, result.vanished, result.outside, sum(result.skipped.values())
    assert (counted > 0).all(), "a rule was not at work"


@pytest.mark.parametrize("seed", range(40))
def test_the_cap_is_the_heap(seed):
    rng = np.random.default_rng(seed)
    n, cap = 400, int(rng.choice([1, 2, 13, 50, 99]))
    table = BoxTable(rng.integers(0, 5, n), rng.integers(0, 3, (n, 4)), rng.integers(1, 4, n), rng.integers(0, rng.choice([1, 2, 9, 500]), n), KeyFrames(("v",), [0] * 5, range(5)))
    use, expected = rng.random(n) < .9, np.zeros(n, bool)
    for k in range(5):
        rows = np.flatnonzero(use & (table.keyframe == k))
        expected[rows[cap_by_definition([(s, c, y1, x1, y2, x2) for s, c, (x1, y1, x2, y2) in zip(table.scores[rows], table.labels[rows], table.boxes[rows].tolist())], cap)]] = True
    np.testing.assert_array_equal(within_cap(table, table.labels, use, cap), expected)
    np.testing.assert_array_equal(within_cap(table, table.labels, use, None), use)


def test_within_the_cap_the_class_decides_among_equal_scores():
    frame, box = [("v", 902)], [[0, 0, 1, 1]]
    # 50 places, 52 rows: one above, 51 equal. The last equal one comes when the heap is full and never enters, though its class is the largest.
    labels = [2] * 10 + [5] * 40 + [7] + [7]
    scores = [.5] * 50 + [.9] + [.5]
    found = box_table(frame, [box * 52], [labels], [scores])
    kept = aligned_boxes(box_table(frame, [box], [[7]]), found, LABELS)[1]
    assert np.bincount(kept.labels, minlength=5).tolist() == [9, 0, 40, 1, 0]      # one of the class 2 had to go for the 0.9


# ---- properties

@quiet
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("clean", [True, False])
def test_order_does_not_matter(seed, clean):
    truth, found = random_tables(seed, clean=clean)
    rng = np.random.default_rng(seed)
    result = evaluate_frame(truth, found, LABELS, FEW)
    assert 0 < result.mAP < 1
    same(result, evaluate_frame(truth, found[rng.permutation(len(found))], LABELS, FEW))
    if clean: same(result, evaluate_frame(truth[rng.permutation(len(truth))], found, LABELS, FEW))   # no two ground truths are equally near


@quiet
@pytest.mark.parametrize("seed", range(4))
def test_splitting_of_files_does_not_matter(seed, tmp_path):
    truth, found = random_tables(seed)
    whole, cut = tmp_path / "whole.csv", len(found) // 3
    write_boxes(whole, found)
    lines = whole.read_text().splitlines(keepends=True)
    (tmp_path / "parts.csv").write_text("".join(lines[cut:] + lines[:cut]))
    a, b = (evaluate_frame(truth, read_boxes(path, True), LABELS, FEW) for path in (whole, tmp_path / "parts.csv"))
    same(a, b)
    same(a, evaluate_frame(truth, found, LABELS, FEW))


@quiet
@pytest.mark.parametrize("seed", range(8))
def test_names_do_not_matter(seed):
    truth, found = random_tables(seed, n=200)       # below the cap: there the class id decides among equal scores
    rng = np.random.default_rng(seed)
    new = rng.permutation(100)
    k = np.argsort(new[list(LABELS.ids)])
    renamed = lambda t: BoxTable(t.keyframe, t.boxes, new[t.labels], t.scores, KeyFrames([f"the {v}" for v in t.keyframes.videos], t.keyframes.video, t.keyframes.second + 5))
    a = evaluate_frame(truth, found, LABELS)
    b = evaluate_frame(renamed(truth), renamed(found), LabelMap(tuple(new[list(LABELS.ids)].tolist()), LABELS.names))
    np.testing.assert_allclose(a.ap[:, k], b.ap, rtol=0, atol=1e-12)
    assert a.label_map.names[k[0]] == b.label_map.names[0]


@quiet
@pytest.mark.parametrize("seed", range(8))
def test_a_false_detection_below_all_others_never_helps(seed):
    truth, found = random_tables(seed, clean=True)
    result = evaluate_frame(truth, found, LABELS)
    assert result.capped                             # so it also competes for the places
    more = lambda label, score: BoxTable(np.r_[found.keyframe, 3], np.r_[found.boxes, [[8, 8, 9, 9]]], np.r_[found.labels, label], np.r_[found.scores, score], found.keyframes)
    for label in (2, 3, 5, 7):
        assert (evaluate_frame(truth, more(label, -1), LABELS).ap <= result.ap)[:, :4].all()
        assert evaluate_frame(truth, more(label, 2), LABELS).mAP < result.mAP


@pytest.mark.parametrize("seed", range(8))
def test_perfect_is_one(seed):
    truth, _ = random_tables(seed, clean=True)
    rng = np.random.default_rng(seed)
    for scores in (np.ones(len(truth)), rng.random(len(truth))):
        perfect = BoxTable(truth.keyframe, truth.boxes, truth.labels, scores, truth.keyframes)
        result = evaluate_frame(truth, perfect, LABELS, iou=(.1, .5, 1.))
        assert (result.mAP_per_threshold == 1).all() and result.mAP == 1 and set(result.tiers) == {"pose"} and result.tiers["pose"][0] == 1


# ---- one rule at a time

A, B, FRAME = [0, 0, .4, .8], [.5, 0, .9, .8], [("v", 902)]


def ap(truth, found, **options): return evaluate_frame(truth, found, LABELS, **options).ap[0, 0]


def test_best_only():
    near = [.05, 0, .45, .8]
    truth = box_table(FRAME, [[A, near]], [[2, 2]])
    assert ap(truth, box_table(FRAME, [[A, A]], [[2, 2]], [[.9, .8]])) == .5     # the second looks at A only, though `near` is free and close


def test_boxes_without_area():
    truth = box_table(FRAME, [[A]], [[2]])
    for bad in (A[::-1], [0, 0, 0, .8], [0, .5, .4, .5], [np.nan, 0, .4, .8], [0, 0, .4, np.nan]):
        found = box_table(FRAME, [[bad, A]], [[2, 2]], [[.9, .8]])
        result = evaluate_frame(truth, found, LABELS)
        assert result.vanished == 1 and result.mAP == 1                          # no miss
        assert evaluate_frame(truth, found, LABELS, cap=1).mAP == 0              # but it uses up a place
    point = box_table(FRAME, [[A, [.1, .1, .1, .1]]], [[2, 2]])
    assert ap(point, box_table(FRAME, [[A, [.1, .1, .1, .1]]], [[2, 2]], [[.9, .8]])) == .5      # counts, is never found
    outside = [-1, -1, 2, 2]
    assert ap(box_table(FRAME, [[outside]], [[2]]), box_table(FRAME, [[outside]], [[2]], [[1.]])) == 1   # not clipped


def test_duplicates():
    assert ap(box_table(FRAME, [[A, A]], [[2, 2]]), box_table(FRAME, [[A, A]], [[2, 2]], [[.9, .8]])) == .5    # the second is never found
    found = box_table(FRAME, [[A, A, B]], [[2, 2, 2]], [[.9, .8, .7]])
    assert ap(box_table(FRAME, [[A, B]], [[2, 2]]), found) == pytest.approx((1 + 2 / 3) / 2)


def test_of_equals_the_last_in_the_input_comes_first():
    truth = box_table(FRAME, [[A]], [[2]])
    assert ap(truth, box_table(FRAME, [[B] * 40 + [A]], [[2] * 41], [[.5] * 41])) == 1
    assert ap(truth, box_table(FRAME, [[A] + [B] * 40], [[2] * 41], [[.5] * 41])) == pytest.approx(1 / 41)


def test_threshold_is_inclusive():
    assert ap(box_table(FRAME, [[[0, 0, 1, 1]]], [[2]]), box_table(FRAME, [[[0, 0, .5, 1]]], [[2]], [[1.]])) == 1
    assert ap(box_table(FRAME, [[[0, 0, 1, 1]]], [[2]]), box_table(FRAME, [[[0, 0, .4999, 1]]], [[2]], [[1.]])) == 0


@quiet
def test_key_frames_that_are_named_and_not_named(tmp_path):
    (tmp_path / "g.csv").write_text("v,902,0,0,.4,.8,2\nv,903\nv,904,0,0,.4,.8,80\n")
    truth = read_boxes(tmp_path / "g.csv", False)
    for second, official, acar in ((903, .5, .5), (904, .5, .5), (905, 1, .5)):
        found = box_table([("v", second), ("v", 902)], [[A], [A]], [[2], [2]], [[.9], [.8]])
        assert (ap(truth, found), ap(truth, found, unnamed="miss")) == (official, acar)
    assert evaluate_frame(truth, found, LABELS).keyframes == 3
    out = KeyFrames(("v",), [0], [902])
    with pytest.raises(ValueError, match="no ground truth"): evaluate_frame(truth, found, LABELS, out)
    result = evaluate_frame(truth, found, LABELS, KeyFrames(("v", "w"), [0, 0, 1], [905, 904, 1]))
    assert (result.excluded, result.keyframes, result.detections, result.outside, result.mAP) == (3, 2, 1, 0, 1)


# ---- reading is the definition

def write_rows(path, rng, widths, n=500, keyframes=6):
    def row(width):
        low = rng.random(2)
        cells = [f"video {rng.integers(3)}", rng.choice(["{}", "0{}", "{}.0"]).format(rng.integers(902, 902 + keyframes)),
                 *(f"{x:.{rng.integers(1, 18)}g}" for x in (*low, *low + 1)), str(rng.integers(1, 81)), rng.choice(["{:.3f}", "{!r}", " {:e}"]).format(rng.random())]
        return ",".join(cells[:width])
    path.write_text(rng.choice(["\n", "\r\n", "\n\n"]).join(row(rng.choice(widths)) for _ in range(n)) + rng.choice(["", "\n", "\n \n"]))
    return path


@pytest.mark.parametrize("widths", [(8,), (7,), (8, 8, 8, 2), (2, 7, 7), (2,), (7, 8), (2, 7, 8)], ids=str)
@pytest.mark.parametrize("scores", [True, False])
def test_reading_is_the_definition(tmp_path, widths, scores):
    for seed in range(6):
        path = write_rows(tmp_path / "x.csv", np.random.default_rng(seed), widths)
        table = read_boxes(path, scores)
        same_table(table, read_boxes_by_definition(path, scores))
        packed = tmp_path / "x.csv.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()[:700]) + gzip.compress(path.read_bytes()[700:]))   # two members are one file
        same_table(table, read_boxes(packed, scores))
        write_boxes(tmp_path / "back.csv.gz", table)
        same_table(table, read_boxes(tmp_path / "back.csv.gz", scores))


def test_ordinary_files_are_read_in_blocks(tmp_path, monkeypatch):
    (tmp_path / "mark.csv").write_bytes(b"\xef\xbb\xbfv,902,0,0,1,1,2,.5\n")
    assert read_boxes_by_definition(tmp_path / "mark.csv", True).keyframes.videos == ("v",)
    monkeypatch.setattr(ava, "read_boxes_by_definition", lambda *_: pytest.fail("the slow reader was called"))
    for widths in ((8,), (7,), (8, 8, 2)):
        assert len(read_boxes(write_rows(tmp_path / "x.csv", np.random.default_rng(0), widths, n=3000, keyframes=1), True)) > 1900
    assert read_boxes(tmp_path / "mark.csv", True).keyframes.videos == ("v",)


def test_blocks_are_joined(tmp_path, monkeypatch):
    """More than one block of 8 MiB: videos come back in a later block, key frames keep their numbers."""
    monkeypatch.setattr(ava, "read_boxes_by_definition", lambda *_: pytest.fail("the slow reader was called"))
    line = "{},{},0.123456789,0.123456789,0.987654321,0.987654321,{},0.123456789\n"
    path = tmp_path / "x.csv"
    path.write_text("".join(line.format("abc"[i % 3], 902 + i % 7, i % 80 + 1) for i in range(200_000)) + line.format("d", 5, 7))
    assert path.stat().st_size > 1.3 * 2**23
    table = read_boxes(path, True)
    assert len(table) == 200_001 and len(table.keyframes) == 22 and table.keyframes.name(21) == "d,0005"
    np.testing.assert_array_equal(table.keyframe[:-1], np.arange(200_000) % 21)
    np.testing.assert_array_equal(table.labels[:-1], np.arange(200_000) % 80 + 1)
    assert (table.boxes == [.123456789, .123456789, .987654321, .987654321]).all() and (table.scores == .123456789).all()


def test_the_person_is_not_a_score(tmp_path):
    (tmp_path / "g.csv").write_text("v,902,0,0,1,1,2,17\nv,902,0,0,1,1,2,nan\nv,902,0,0,1,1,2,P\n")
    assert read_boxes(tmp_path / "g.csv", False).scores is None and len(read_boxes(tmp_path / "g.csv", False)) == 3
    with pytest.raises(ValueError, match="row 2: the score is NaN"): read_boxes(tmp_path / "g.csv", True)


def test_label_maps(tmp_path):
    path = tmp_path / "map.pbtxt"
    path.write_text('# AVA\nlabel {\n  name: "talk to (e.g., self {x})"\n  label_id: 79\n  label_type: PERSON_INTERACTION\n}\nitem{name:\'sit\' id:11 label_type:PERSON_MOVEMENT}')
    assert read_label_map(path) == LabelMap((11, 79), ("sit", "talk to (e.g., self {x})"), ("pose", "person"), "label_type")
    assert LabelMap((1, 14, 15, 63, 64, 80), tuple("abcdef")).tiers == ("pose", "pose", "object", "object", "person", "person")
    numbers = np.random.default_rng(0).integers(-100, 200, 500)
    assert LABELS.numbers(numbers).tolist() == [LABELS.ids.index(i) if i in LABELS.ids else -1 for i in numbers]
    assert LABELS.numbers(np.array([-2**31, 2**31 - 1, 2], np.int32)).tolist() == [-1, -1, 0]


# ---- bad input

GOOD = "v,902,0,0,1,1,2,.5\n"


@pytest.mark.parametrize("content, says", [
    (GOOD + "v,902,0,0,1,1\n", "row 2: 6 columns"), (GOOD + "\n\n" + "v,902,0,0,1,1,2,.5,9\n", "row 4: 9 columns"), (GOOD * 3 + "v\n", "row 4: 1 columns"),
    (GOOD + "v,902.5,0,0,1,1,2,.5\n", "row 2: the second '902.5'"), (GOOD + "v,902.5\n", "row 2: the second '902.5'"), (GOOD + "v,x\n", "row 2: the second 'x'"),
    (GOOD + "v,902,0,0,a,1,2,.5\n", "row 2: x2 'a'"), (GOOD + "v,902,0,,1,1,2,.5\n", "row 2: y1 ''"), (GOOD + "v,902,0,0,1,1,2,high\n", "row 2: the score 'high'"),
    (GOOD + "v,902,0,0,1,1,2,NaN\n", "row 2: the score is NaN"), (GOOD + "v,902,0,0,1,1,2.5,.5\n", "row 2: the class id '2.5'"), (GOOD + "v,902,0,0,1,1,9999999999,.5\n", "row 2: the class id"),
    (GOOD + " ,902,0,0,1,1,2,.5\n", "row 2: no video"), (GOOD + "v,902,0,0,1,1,stand,.5\n", "row 2: the class id 'stand'"), ("a,b,c,d,e,f,g,h\n" + GOOD, "row 1: the second 'b'"),
    ("", "empty"), (" \n\n", "empty"), (gzip.compress(GOOD.encode() * 5000)[:-12], "cut off"), (gzip.compress(b""), "empty"), (b"PK\x03\x04\xff\xfe", "no text"),
    (GOOD * 9 + GOOD[:11], "row 10: 5 columns"),
])
def test_bad_prediction_files(tmp_path, content, says):
    path = tmp_path / "p.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (read_boxes, read_boxes_by_definition):
        with pytest.raises(ValueError) as error: read(path, True)
        assert says in str(error.value) and str(path) in str(error.value)


def test_bad_ground_truth_and_exclusions(tmp_path):
    path = tmp_path / "g.csv"
    for row in ("v,902,.6,0,.5,1,2\n", "v,902,.1,.2,.5,.1,2,7\n", "v,902,0,0,nan,1,2\n"):
        path.write_text(",".join("v,902,0,0,1,1,2,7".split(",")[: len(row.split(","))]) + "\n" + row)
        for read in (read_boxes, read_boxes_by_definition):
            with pytest.raises(ValueError, match="g.csv, row 2: the box is reversed"): read(path, False)
    path.write_text("v,902\nv,902,1\n")
    with pytest.raises(ValueError, match="g.csv, row 2: 3 columns"): read_exclusions(path)
    for missing in (lambda p: read_boxes(p, True), read_exclusions, read_label_map):
        with pytest.raises(ValueError, match="no such file"): missing(tmp_path / "absent")
        with pytest.raises(ValueError, match="is a folder"): missing(tmp_path)


@pytest.mark.parametrize("content, says", [
    ("", "empty"), ("hello", "'hello' is no block"), ('item { name: "a" id: 1 } item { name: "b', "no block"), ('item { name: "a" }', "block 1"), ('item { id: 1 }', "block 1"),
    ('item { name: "a" id: x }', "block 1"), ('item { name: "a" id: 1 }\nitem { name: "b" id: 1 }', "1 came twice"), ('item { name: "a" id: 1 } item { name: "a" id: 2 }', "'a' came twice"),
])
def test_bad_label_maps(tmp_path, content, says):
    (tmp_path / "m.pbtxt").write_text(content)
    with pytest.raises(ValueError) as error: read_label_map(tmp_path / "m.pbtxt")
    assert says in str(error.value) and "m.pbtxt" in str(error.value)


def test_unknown_classes_and_key_frames_are_counted_but_not_fatal():
    truth = box_table(FRAME, [[A, B]], [[2, 80]])
    found = box_table([("v", 902), ("w", 902)], [[A, A, B], [A]], [[2, 80, 80], [2]], [[.9, .8, .7], [.6]])
    with pytest.warns(UserWarning) as said: result = evaluate_frame(truth, found, LABELS)
    text = " ".join(str(w.message) for w in said)
    assert "2 of 4 detections are of 1 classes" in text and "80 (2)" in text and "1 of the 2 key frames" in text and "1 of their 2 videos (50%)" in text and "'w,0902'" in text
    assert all(Path(w.filename) == Path(__file__) for w in said)
    assert (result.skipped, result.skipped_ground_truth, result.outside, result.mAP) == ({80: 2}, {80: 1}, 1, 1)
    with pytest.raises(ValueError, match=r"1 of the 1 key frames.*\(100.0%\).*1 of their 1 videos \(100%\)"): evaluate_frame(truth, box_table([("w", 902)], [[A]], [[2]], [[.9]]), LABELS)
    with pytest.raises(ValueError, match="100.0%.*0 of their 1 videos"): evaluate_frame(truth, box_table([("v", 7)], [[A]], [[2]], [[.9]]), LABELS)
    with pytest.raises(ValueError, match="1 of 1 detections.*is it the label map"): evaluate_frame(truth, box_table(FRAME, [[A]], [[80]], [[.9]]), LABELS)
    with pytest.raises(ValueError, match="no ground truth to find.*80"): evaluate_frame(box_table(FRAME, [[A]], [[80]]), found, LABELS)
    with pytest.raises(ValueError, match="row 1 of the ground truth .v,0902. has the reversed box"): evaluate_frame(box_table(FRAME, [[A, A[::-1]]], [[2, 2]]), found, LABELS)


def test_nothing_found():
    truth = box_table(FRAME, [[A]], [[2]])
    result = evaluate_frame(truth, box_table([], [], [], []), LABELS)
    assert result.mAP == 0 and result.detections == 0 and np.isnan(result.ap[0, 1:]).all()
    for options, says in (({"iou": 0}, "IoU"), ({"iou": []}, "IoU"), ({"iou": (.5, 2)}, "IoU"), ({"unnamed": "x"}, "'ignore', 'miss'"), ({"cap": 0}, "cap 0")):
        with pytest.raises(ValueError, match=says): evaluate_frame(truth, box_table([], [], [], []), LABELS, **options)
    with pytest.raises(ValueError, match="no scores"): evaluate_frame(truth, truth, LABELS)


def test_tables_refuse():
    one = KeyFrames(("v",), [0], [902])
    with pytest.raises(ValueError, match="one length"): BoxTable([0], [A, B], [2], None, one)
    with pytest.raises(ValueError, match="0..0 are named"): BoxTable([1], [A], [2], None, one)
    with pytest.raises(ValueError, match="row 1 .*v,0902.*NaN"): BoxTable([0, 0], [A, B], [2, 2], [.5, np.nan], one)
    with pytest.raises(ValueError, match="may come once"): KeyFrames(("v",), [0, 0], [902, 902])
    with pytest.raises(ValueError, match="0..0 are needed"): KeyFrames(("v",), [1], [902])
    with pytest.raises(ValueError, match="one entry per key frame"): box_table(FRAME, [[A], [B]], [[2], [2]])


def test_result_as_json():
    truth, found = random_tables(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = (evaluate_frame(truth, found, LABELS, FEW, iou, protocol="a test") for iou in (.5, (.5, .75)))
    written = json.loads(json.dumps(one.as_json(), allow_nan=False))
    assert written["mAP"] == one.mAP and 0 < written["mAP"] < 1 and written["protocol"] == "a test" and "mAP_per_threshold" not in written
    assert written["AP"]["eleven"] is None and written["AP"]["two"] == one.ap[0, 0] and written["cap"] == 50 and written["unnamed"] == "ignore"
    assert two.as_json()["mAP"] == one.mAP and two.as_json()["mAP_per_threshold"] == {"0.5": one.mAP, "0.75": two.mAP_per_threshold[1]}
    assert "a test: 5 key frames" in one.table() and "two (" in one.table(per_class=True) and "eleven" not in one.table(per_class=True) and "average" in two.table()


def test_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match="'a,b'"): write_boxes(path, box_table([("a,b", 1)], [[A]], [[2]]))
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt): write_boxes(path, box_table(FRAME, [[A]], [[2]]))
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


# ---- tubes

def random_tubes(seed, n=120, g=30):
    """Tubes in pixels and detections near them, with distinct scores."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (g, 2))
    boxes = [np.r_[c, c + rng.uniform(20, 60, 2)] + rng.normal(0, 2, (rng.integers(2, 20), 1)) for c in corner]
    names = [f"v{i}" for i in range(4)]
    truth = tube_table(names + rng.choice(names, g - 4).tolist(), rng.integers(0, 30, g), boxes, rng.integers(0, 3, g))
    near = rng.integers(0, g, n)
    moved = [truth.tube(i) + rng.normal(0, 3, 4) for i in near]
    return truth, tube_table([names[truth.video[i]] for i in near], truth.first_frame[near] + rng.integers(0, 3, n), moved, truth.labels[near], rng.permutation(n) / n)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_tubes(seed, convention, tmp_path):
    truth, found = random_tubes(seed)
    rng = np.random.default_rng(seed)
    evaluate = lambda t, f: evaluate_tubes(t, f, convention=convention).ap
    ap = evaluate(truth, found)
    assert 0 < ap.mean() < 1 and (np.diff(ap, axis=0) <= 1e-12).all()                       # in this data a higher threshold never helps
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    close(ap, evaluate(truth[rng.permutation(len(truth))], found[rng.permutation(len(found))]))
    label = rng.permutation(3)
    renamed = lambda t: Tubes(t.video, t.first_frame + 9, t.boxes + 5, t.starts, label[t.labels], t.scores, [f"the {v}" for v in t.ids])
    close(ap, evaluate(renamed(truth), renamed(found))[:, label])
    perfect = Tubes(truth.video, truth.first_frame, truth.boxes, truth.starts, truth.labels, rng.random(len(truth)), truth.ids)
    assert (evaluate(truth, perfect) == 1).all()
    boxes = [found.tube(i) for i in range(len(found))] + [np.array([[900., 900, 901, 901]] * 2)]
    more = tube_table([found.ids[v] for v in found.video] + ["v0"], [*found.first_frame, 1], boxes, [*found.labels, 0], [*found.scores, -1])
    assert (evaluate(truth, more) <= ap + 1e-12).all()
    write_tubes(tmp_path / "t.csv", truth, "abc"), write_tubes(tmp_path / "f.csv.gz", found[::-1], "abc")
    close(ap, evaluate(read_tubes(tmp_path / "t.csv", False)[0], read_tubes(tmp_path / "f.csv.gz", True, "abc")[0]))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_tubes_are_the_definition(convention):
    """Tubes as dictionaries frame -> box, one detection after the other."""
    c = CONVENTIONS[convention]

    def area(x1, y1, x2, y2): return max(0, x2 - x1 + c.pixel) * max(0, y2 - y1 + c.pixel)

    def overlap(a, b):
        shared, frames = sorted(set(a) & set(b)), sorted(set(a) | set(b))
        if not shared: return 0
        common = [area(*np.maximum(a[t][:2], b[t][:2]), *np.minimum(a[t][2:], b[t][2:])) for t in shared]
        mean = np.mean([n / (area(*a[t]) + area(*b[t]) - n) for n, t in zip(common, shared)])
        return mean * (shared[-1] - shared[0] + c.frame) / (frames[-1] - frames[0] + c.frame)

    for seed in range(6):
        truth, found = random_tubes(seed)
        frames = lambda tubes, i: {tubes.first_frame[i] + t: box for t, box in enumerate(tubes.tube(i))}
        result = evaluate_tubes(truth, found, (.3, .6), convention=convention)
        for threshold, row in zip(result.iou, result.ap):
            for k in range(3):
                own = np.flatnonzero(truth.labels == k)
                rows = sorted(np.flatnonzero(found.labels == k), key=lambda i: -found.scores[i])
                dense = [[overlap(frames(found, i), frames(truth, j)) * (found.ids[found.video[i]] == truth.ids[truth.video[j]]) for j in own] for i in rows]
                hits = matching.match_by_definition(np.array(dense), threshold, c.rule) >= 0
                points = np.r_[[[0, 1]], np.c_[np.cumsum(hits) / len(own), np.cumsum(hits) / np.arange(1, len(hits) + 1)]]
                expected = np.trapezoid(points[:, 1], points[:, 0]) if c.curve == "straight" else matching.average_precision(hits, len(own))
                assert row[k] == pytest.approx(expected, abs=1e-12)


# ---- the door itself, and real files

def test_import_is_light():
    code = "import sys, actloc.evaluation.frame; sys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'pyarrow', 'tqdm')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs("ava_val_v2.1.csv.gz")
@needs("ava_action_list_v2.1_for_activitynet_2018.pbtxt")
def test_ava_files():
    labels = read_label_map(SHARED / "ava_action_list_v2.1_for_activitynet_2018.pbtxt")
    assert (len(labels), labels.tiers_from) == (60, "AVA's ids") and [labels.tiers.count(t) for t in ("pose", "object", "person")] == [13, 32, 15]
    truth = read_boxes(SHARED / "ava_val_v2.1.csv.gz", False)
    same_table(truth, read_boxes_by_definition(SHARED / "ava_val_v2.1.csv.gz", False))
    assert (len(truth), len(truth.keyframes), len(truth.keyframes.videos)) == (93_400, 50_029, 64)
    # No box of this file comes twice with one class, none is empty, and no key frame has more than 12 rows:
    # so perfect predictions reach exactly 1, in any order and with any scores, and the cap takes nothing.
    for scores in (np.ones(len(truth)), np.random.default_rng(0).random(len(truth))):
        with pytest.warns(UserWarning, match=r"19 of 93400 detections.*2 \(19\)"):      # class 2, crawl, is not among the 60
            result = evaluate_frame(truth, BoxTable(truth.keyframe, truth.boxes, truth.labels, scores, truth.keyframes), labels)
        assert result.mAP == 1 and (result.instances > 0).sum() == 13 and result.instances.sum() == 93_381 and (result.capped, result.vanished) == (0, 0)
    rng = np.random.default_rng(1)       # a hundred repeated rows: their second halves can never be found
    again = rng.choice(len(truth), 100, replace=False)
    twice = truth[np.r_[np.arange(len(truth)), again]]
    found = BoxTable(twice.keyframe, twice.boxes, twice.labels, rng.random(len(twice)), twice.keyframes)
    with pytest.warns(UserWarning): assert .99 < evaluate_frame(twice, found, labels).mAP < 1
