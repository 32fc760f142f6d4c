"""Temporal evaluation: golden numbers of the release, properties that must hold for any input, and bad input."""
import gzip
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from actloc.evaluation import matching
from actloc.evaluation.temporal import (LAYOUTS, PROTOCOLS, Table, average_recall, clean_ground_truth, evaluate_temporal, parse_tiou,
                                        precision_recall, read_ground_truth, read_json, read_predictions, write_predictions)

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs = lambda name: pytest.mark.skipif(not (SHARED / name).exists(), reason=f"{SHARED / name} is not here (shared files are optional)")
TIOU = (.2, .5, .75)


def random_tables(seed, n=400, g=80, videos=7, classes=5):
    "Cleaned ground truth and detections with distinct scores, some near an instance, some in unknown videos or classes."
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 100, g)
    truth = clean_ground_truth(Table(rng.integers(0, videos, g), np.stack([start, start + rng.uniform(1, 20, g)], 1), rng.integers(0, classes, g)))
    near = rng.integers(0, len(truth), n)
    segments = np.sort(truth.segments[near] + rng.normal(0, 3, (n, 2)), 1)
    elsewhere = rng.random(n) < .2
    return truth, Table(np.where(elsewhere, rng.integers(0, videos + 2, n), truth.video[near]), segments,
                        np.where(elsewhere, rng.integers(0, classes + 2, n), truth.labels[near]), rng.permutation(n) / n)


def same(a, b):
    np.testing.assert_allclose(a.mAP, b.mAP, rtol=0, atol=1e-12)
    np.testing.assert_allclose(a.recall, b.recall, rtol=0, atol=1e-12)


# ---- golden numbers

def golden_tables():
    truth, classes = read_ground_truth(GOLDEN / "detection_eval_gt.json", "validation")
    columns = json.loads((GOLDEN / "detection_eval_pred.json").read_text())
    ids = tuple(dict.fromkeys(columns["video-id"]))
    video = [ids.index(name) for name in columns["video-id"]]
    return truth, classes, Table(video, np.stack([columns["t-start"], columns["t-end"]], 1), columns["label"], columns["score"], ids)


@pytest.mark.filterwarnings("ignore:.*not among the")
@pytest.mark.parametrize("case", ["thumos", "anet", "ego4d"])
def test_golden(case):
    truth, classes, found = golden_tables()
    expected = json.loads((GOLDEN / "detection_eval_expected.json").read_text())[case]
    result = evaluate_temporal(truth, found, expected["tiou"], classes)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    close(result.mAP, expected["mAP"])
    close(result.average_mAP, expected["average_mAP"])
    close(result.recall, expected["recall_at_1x_5x"])
    close(result.ap[:, result.instances > 0], expected["ap_per_class"])
    for k in np.flatnonzero(result.instances):      # the curve for plots is the curve behind the number
        precision, recall, _ = precision_recall(truth, found, expected["tiou"][0], k)
        hits = np.diff(recall, prepend=0) > 0
        close(matching.average_precision(hits, result.instances[k]), result.ap[0, k])


@pytest.mark.filterwarnings("ignore:.*not among the")
def test_golden_through_files(tmp_path):
    truth, classes, found = golden_tables()
    known = found[(found.labels >= 0) & (found.labels < len(classes))]
    write_predictions(tmp_path / "p.json.gz", known, classes)
    back = read_predictions(tmp_path / "p.json.gz", classes)
    one, two = evaluate_temporal(truth, found, TIOU, classes), evaluate_temporal(truth, back, TIOU, classes)
    same(one, two)
    assert list(tmp_path.iterdir()) == [tmp_path / "p.json.gz"]     # nothing temporary stays
    written = json.dumps(two.as_json(), allow_nan=False)
    assert {"average_mAP", "mAP", "AP", "recall", "videos", "instances", "excluded", "protocol"} <= set(json.loads(written))


# ---- properties

@pytest.mark.parametrize("seed", range(8))
def test_order_does_not_matter(seed):
    truth, found = random_tables(seed)
    rng = np.random.default_rng(seed)
    result = evaluate_temporal(truth, found, TIOU)
    assert 0 < result.average_mAP < 1
    same(result, evaluate_temporal(truth, found[rng.permutation(len(found))], TIOU))
    same(result, evaluate_temporal(truth[rng.permutation(len(truth))], found, TIOU))


@pytest.mark.parametrize("seed", range(8))
def test_names_do_not_matter(seed):
    truth, found = random_tables(seed)
    rng = np.random.default_rng(seed)
    label, video = rng.permutation(9), rng.permutation(12)
    renamed = lambda t: Table(video[t.video], t.segments, label[t.labels], t.scores)
    same(evaluate_temporal(truth, found, TIOU), evaluate_temporal(renamed(truth), renamed(found), TIOU))
    a, b = (average_recall(t, f) for t, f in ((truth, found), (renamed(truth), renamed(found))))
    np.testing.assert_allclose(a.recall, b.recall, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*not among the")
def test_videos_are_matched_by_name():
    truth, found = random_tables(0)
    names = np.array([f"v{i}" for i in range(9)])
    order = np.random.default_rng(0).permutation(9)
    t = Table(truth.video, truth.segments, truth.labels, None, names[:7])
    shuffled = Table(np.argsort(order)[found.video], found.segments, found.labels, found.scores, names[order])
    same(evaluate_temporal(truth, found, TIOU), evaluate_temporal(t, shuffled, TIOU))


@pytest.mark.parametrize("seed", range(8))
def test_a_false_detection_below_all_others_never_helps(seed):
    truth, found = random_tables(seed)
    result = evaluate_temporal(truth, found, TIOU)
    for label in range(5):
        more = Table(np.r_[found.video, 0], np.r_[found.segments, [[900, 901]]], np.r_[found.labels, label], np.r_[found.scores, -1])
        assert (evaluate_temporal(truth, more, TIOU).ap <= result.ap).all()
        top = Table(np.r_[found.video, 0], np.r_[found.segments, [[900, 901]]], np.r_[found.labels, label], np.r_[found.scores, 2])
        assert evaluate_temporal(truth, top, TIOU).average_mAP < result.average_mAP


@pytest.mark.parametrize("seed", range(8))
def test_perfect_is_one(seed):
    truth, _ = random_tables(seed)
    rng = np.random.default_rng(seed)
    for scores in (np.ones(len(truth)), rng.random(len(truth))):
        result = evaluate_temporal(truth, Table(truth.video, truth.segments, truth.labels, scores), (.1, .5, .95, 1.))
        assert (result.mAP == 1).all() and (result.recall == 1).all() and result.average_mAP == 1


@pytest.mark.parametrize("rule", matching.RULES)
def test_matching_is_the_definition(rule):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        segments = lambda n: np.sort(rng.integers(0, 9, (n, 2)), 1).astype(float)
        boxes, truth, keys, truth_keys = segments(90), segments(30), rng.integers(-1, 3, 90), rng.integers(0, 3, 30)
        pairs = matching.candidates(keys, boxes, truth_keys, truth, .2)
        dense = np.array([[matching.overlap(a, b) for b in truth] for a in boxes]) * (keys[:, None] == truth_keys)
        for found, threshold in zip(matching.match(pairs, 30, TIOU, rule), TIOU):
            np.testing.assert_array_equal(found, matching.match_by_definition(dense, threshold, rule))


def test_of_equals_the_last_in_the_input_comes_first():
    truth = Table([0], [[0, 10]], [0])
    for last_is_right in (True, False):
        segments = [[20, 30]] * 40 + [[0, 10]]
        found = Table([0] * 41, segments if last_is_right else segments[::-1], [0] * 41, [.5] * 41)
        result = evaluate_temporal(truth, found, (.5,))
        assert result.mAP[0] == (1 if last_is_right else 1 / 41) and result.recall[0, 0] == last_is_right
    # of two instances with the same overlap the last is taken, so the second detection finds the first or nothing
    truth = Table([0, 0], [[0, 10], [10, 20]], [0, 0])
    for left, expected in ((True, 1), (False, .5)):
        found = Table([0, 0], [[5, 15], [0, 10] if left else [10, 20]], [0, 0], [.9, .8])
        assert evaluate_temporal(truth, found, (.3,)).mAP[0] == expected


def test_nothing_found_and_nothing_to_find():
    truth, found = random_tables(0)
    empty = evaluate_temporal(truth, found[:0], TIOU)
    assert empty.mAP.tolist() == [0, 0, 0] and empty.recall.sum() == 0 and average_recall(truth, found[:0]).auc == 0
    foreign = Table(found.video, found.segments, found.labels + 50, found.scores)
    assert evaluate_temporal(truth, foreign, TIOU).ignored == len(found)
    with pytest.raises(ValueError, match="no ground truth"):
        evaluate_temporal(truth[:0], found, TIOU)
    point = evaluate_temporal(truth, Table([0], [[5, 5]], [0], [1.]), TIOU)     # no length: a miss, not a crash
    assert point.average_mAP == 0


def test_excluded_videos_vanish_on_both_sides():
    truth, found = random_tables(1)
    found = found[found.video < 7]
    names = tuple("abcdefg")
    t, f = Table(truth.video, truth.segments, truth.labels, None, names), Table(found.video, found.segments, found.labels, found.scores, names)
    result = evaluate_temporal(t, f, TIOU, excluded=("c",), protocol="without c")
    same(result, evaluate_temporal(truth[truth.video != 2], found[found.video != 2], TIOU))
    assert (result.videos, result.excluded, result.protocol) == (6, ("c",), "without c")
    assert result.detections == (found.video != 2).sum() and "excluded: c" in result.table()


def test_clean_ground_truth():
    segments = [[1, 2], [1.0005, 1.9995], [1, 2.5], [1.5, 2], [1, 2.0008], [1, 2.0016], [5, 5.0009], [1, 2]]
    kept = clean_ground_truth(Table([0] * 7 + [1], segments, [0] * 8))
    assert kept.segments.tolist() == [segments[i] for i in (0, 2, 3, 5, 7)]     # the 6th is near the 5th, which was not kept


def test_thresholds_from_text():
    assert parse_tiou("0.3:0.1:0.7") == (.3, .4, .5, .6, .7) and parse_tiou("0.5") == (.5,) and parse_tiou("0.5, 0.75") == (.5, .75)
    assert parse_tiou("0.5:0.05:0.95") == (.5, .55, .6, .65, .7, .75, .8, .85, .9, .95)


def test_average_recall_by_hand():
    truth = Table([0, 1], [[0, 10], [0, 10]], [0, 1])
    found = Table([0, 1, 1, 1, 7], [[0, 10], [20, 30], [0, 9], [40, 50], [0, 10]], [4] * 5, [.9, .8, .7, .6, 1.])   # classes do not matter
    result = average_recall(truth, found, (.5, .95), up_to=3)
    # N = 1: int(1/2 * 1) = 0 and int(1/2 * 3) = 1 proposals; N = 2: all of them
    assert result.recall.tolist() == [[0, 1, 1], [0, .5, .5]] and result.auc == pytest.approx((.375 + .75) / 3)
    assert (result.videos, result.instances, result.proposals) == (2, 2, 4) and result.as_json()["AR"]["2"] == .75


# ---- bad input

def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


CLASSES = ("jump", "spin")


@pytest.mark.parametrize("row, says", [
    ({"segment": [4, 3]}, "reversed"), ({"segment": [4]}, "results['b'][1]"), ({"segment": None}, "results['b'][1]"),
    ({"segment": [0, float("nan")]}, "not finite"), ({"score": float("inf")}, "not finite"), ({"score": "x"}, "'x'"), ({"label": ["jump"]}, "results['b'][1]"),
])
def test_bad_prediction_rows(tmp_path, row, says):
    good = {"label": "jump", "score": .5, "segment": [3, 4]}
    path = put(tmp_path / "p.json", {"results": {"a": [good], "b": [good, good | row]}})
    with pytest.raises(ValueError) as error: read_predictions(path, CLASSES)
    assert says in str(error.value) and "p.json: results['b'][1]" in str(error.value) and "needed" in str(error.value)


@pytest.mark.parametrize("content, says", [
    ("", "empty"), ("hello", "not JSON"), ('{"results": {"a": [{"label": "ju', "cut off"), ('{"results": {"a": []', "cut off"), ("[1, 2]", "a list"),
    ('{"predictions": {}}', "predictions"), ('{"results": {"a": 3}}', "a list is needed"), ('{"results": {"a": [3]}}', "results['a'][0]"),
    ('{"results": {"a": [{"segment": [1, 2], "score": 1}]}}', "'label_id' is missing"),
    ('{"results": {"a": [{"label": "swim", "segment": [1, 2], "score": 1}]}}', "'swim' (1)"),
])
def test_bad_prediction_files(tmp_path, content, says):
    path = put(tmp_path / "p.json", content)
    with pytest.raises(ValueError) as error: read_predictions(path, CLASSES)
    assert says in str(error.value) and "p.json" in str(error.value)


def test_cut_compressed_file(tmp_path):
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(json.dumps({"results": {str(i): [] for i in range(99)}}).encode())[:-20])
    with pytest.raises(ValueError, match="p.json.gz.*cut off"): read_json(tmp_path / "p.json.gz")


def test_bad_ground_truth(tmp_path):
    def refused(annotations, says, subset="x"):
        path = put(tmp_path / "g.json", {"database": {"a": {"subset": "x", "annotations": annotations}, "b": {"subset": "y"}}})
        with pytest.raises(ValueError) as error: read_ground_truth(path, subset)
        assert says in str(error.value) and "g.json" in str(error.value), str(error.value)
    good = {"label": "jump", "segment": [0, 1]}
    refused([good], "'x' (1 recordings), 'y' (1 recordings)", "z")
    refused([good], "it has the subsets x, y", None)
    refused([good, good | {"segment": [2, 1]}], "a: segment 1 = (2, 1) is reversed")
    refused([good, {"label": "jump"}], 'a, annotation 1: {\'label\': \'jump\'} came; {"label": name, "segment"')
    refused([good, {"segment": [0, 1]}], "a, annotation 1: label None")
    refused([good, good | {"label_id": 1}], "every annotation or none")
    refused([good | {"label_id": 1}, good | {"label": "spin", "label_id": 1}], "'jump' and 'spin'")
    refused([3], "a, annotation 0: 3 came")


def test_unknown_classes_and_videos_are_named_but_not_fatal(tmp_path):
    row = {"label": "jump", "score": .5, "segment": [3, 4]}
    path = put(tmp_path / "p.json", {"results": {"a": [row, row | {"label": "swim"}], "z": [row | {"score": .4}]}})
    with pytest.warns(UserWarning, match=r"1 of 3 detections.*'swim' \(1\)"): found = read_predictions(path, CLASSES)
    truth = Table([0], [[3, 4]], [0], None, ("a",))
    with pytest.warns(UserWarning, match=r"1 of the 2 videos.*50%.*'z'"): result = evaluate_temporal(truth, found, (.5,), CLASSES)
    assert (result.ignored, result.outside, result.mAP[0]) == (1, 1, 1)
    with pytest.raises(ValueError, match="100%"):
        evaluate_temporal(Table([0], [[3, 4]], [0], None, ("q",)), found, (.5,))


@pytest.mark.parametrize("text", ["", "a", "0", "1.5", "0.3:0.1", "0.3:0:0.7", "0.7:0.1:0.3", "nan", "0.1:nan:0.5", "0.1:1e-9:1", "-0.5", "0.5,,0.7"])
def test_bad_tiou(text):
    with pytest.raises(ValueError, match="start:step:stop"): parse_tiou(text)


def test_tables_refuse():
    with pytest.raises(ValueError, match="one length"): Table([0], [[1, 2], [3, 4]], [0])
    with pytest.raises(ValueError, match="row 1 .*not finite"): Table([0, 0], [[1, 2], [3, 4]], [0, 0], [.5, float("nan")])
    with pytest.raises(ValueError, match="outside the 1 ids"): Table([1], [[1, 2]], [0], None, ("a",))
    with pytest.raises(ValueError, match="'a' came twice"): Table([1], [[1, 2]], [0], None, ("a", "a"))


def test_writing_refuses_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = put(tmp_path / "p.json", "old")
    for table, says in ((Table([0], [[1, 2]], [2], [.5], ("a",)), "labels 2..2"), (Table([0], [[1, 2]], [0], None, ("a",)), "scores and ids")):
        with pytest.raises(ValueError, match=says): write_predictions(path, table, CLASSES)
    with pytest.raises(ValueError, match="verb,noun"): write_predictions(path, Table([0], [[1, 2]], [0], [.5], ("a",)), CLASSES, "epic")
    with pytest.raises(ValueError, match="layout"): write_predictions(path, Table([0], [[1, 2]], [0], [.5], ("a",)), CLASSES, "coco")
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt): write_predictions(path, Table([0], [[1, 2]], [0], [.5], ("a",)), CLASSES)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old" and set(LAYOUTS) == {"activitynet", "epic", "ego4d"}


# ---- the door itself, and real files

def test_import_is_light():
    code = "import sys, actloc.evaluation.temporal; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs("anet13_groundtruth.json.gz")
@needs("anet_sample_detection_prediction.json.gz")
def test_activitynet_files():
    protocol = PROTOCOLS["activitynet"]
    truth, classes = read_ground_truth(SHARED / "anet13_groundtruth.json.gz", protocol.subset)
    assert (len(truth.ids), len(truth), len(classes)) == (4728, 7293, 200)
    found = read_predictions(SHARED / "anet_sample_detection_prediction.json.gz", classes)
    with pytest.warns(UserWarning, match="198 of the 4926 videos"):
        result = evaluate_temporal(truth, found, protocol.tiou, classes, protocol.recall_at, protocol.name)
    assert (result.videos, result.detections, result.ignored) == (4728, 7654, 0) and 0 < result.average_mAP < 1
    assert (np.diff(result.mAP) <= 1e-12).all() and "4728 videos" in result.table()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 0 < average_recall(truth, found).auc < 1


@needs("thumos14.json")
def test_thumos_protocols():
    truth, classes = read_ground_truth(SHARED / "thumos14.json", "test")
    assert (len(truth.ids), len(classes)) == (212, 20) and classes[2] == "Billiards"
    perfect = Table(truth.video, truth.segments, truth.labels, np.ones(len(truth)), truth.ids)
    for name, videos in (("thumos14", 212), ("thumos14_211", 211)):
        p = PROTOCOLS[name]
        result = evaluate_temporal(truth, perfect, p.tiou, classes, p.recall_at, p.name, p.excluded)
        assert (result.videos, result.protocol) == (videos, p.name) and result.average_mAP > .99   # short repetitions may remain misses
