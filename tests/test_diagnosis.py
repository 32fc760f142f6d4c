"""Diagnosis: it agrees with the evaluations to the last digit, repairs never hurt, everything is counted once."""
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actloc.core.ava import BoxTable, KeyFrames, LabelMap
from actloc.evaluation.diagnosis import KINDS, Quantity, diagnose, diagnose_frame, diagnose_temporal, groups_of, operating_point
from actloc.evaluation.frame import evaluate_frame
from actloc.evaluation.matching import Instances
from actloc.evaluation.temporal import Table, aligned_segments, evaluate_temporal

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAMES = tuple(f"class {k}" for k in range(6))


def tables(seed, ties):
    "Ground truth of 4 classes and detections of 6, near and far, with or without equal scores."
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 100, 60)
    truth = Table(rng.integers(0, 5, 60), np.stack([start, start + rng.uniform(1, 20, 60)], 1), rng.integers(0, 4, 60))
    near = rng.integers(0, 60, 300)
    labels = np.where(rng.random(300) < .6, truth.labels[near], rng.integers(0, 6, 300))
    scores = rng.integers(1, 9, 300) / 9 if ties else rng.permutation(300) / 300
    return truth, Table(truth.video[near], np.sort(truth.segments[near] + rng.normal(0, 3, (300, 2)), 1), labels, scores)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ties", [False, True])
def test_segments_agree_with_the_evaluation(seed, ties):
    truth, found = tables(seed, ties)
    d, result = diagnose_temporal(truth, found, NAMES, .4), evaluate_temporal(truth, found, (.4,), NAMES)
    np.testing.assert_array_equal(d.ap, result.ap[0])
    assert d.counts.sum() == result.detections - result.ignored
    assert d.missed.sum() == d.instances.sum() - d.counts[0]
    assert (np.array(list(d.gains.values())) >= -1e-12).all()
    assert d.profile.sum() <= d.counts.sum() and (d.profile.sum(0) <= d.counts).all()
    json.dumps(d.as_json(), allow_nan=False)
    for s in d.sensitivities: assert s.instances.sum() == d.instances.sum()


def boxes(seed, ties):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, .6, (80, 2))
    truth = np.concatenate([low, low + rng.uniform(.1, .4, (80, 2))], 1)
    frames = KeyFrames(("film",), np.zeros(20, int), np.arange(902, 922))
    where, labels, near = rng.integers(0, 20, 80), rng.integers(1, 5, 80), rng.integers(0, 80, 400)
    moved = truth[near] + rng.normal(0, .03, (400, 4))
    scores = rng.integers(1, 9, 400) / 9 if ties else rng.permutation(400) / 400
    guess = np.where(rng.random(400) < .6, labels[near], rng.integers(1, 9, 400))
    return BoxTable(where, truth, labels, None, frames), BoxTable(where[near], moved, guess, scores, frames), LabelMap((1, 2, 3, 4, 5), NAMES[:5])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.filterwarnings("ignore:.*label map does not have")
def test_boxes_agree_with_the_evaluation(seed, ties):
    truth, found, label_map = boxes(seed, ties)
    d, result = diagnose_frame(truth, found, label_map, cap=15), evaluate_frame(truth, found, label_map, cap=15)
    np.testing.assert_array_equal(d.ap, result.ap[0])
    assert (np.array(list(d.gains.values())) >= -1e-12).all()
    json.dumps(d.as_json(), allow_nan=False)


def test_kinds_by_definition():
    "One detection after the other, with all overlaps in a table."
    from actloc.evaluation.matching import match_by_definition, overlap
    truth, found = tables(3, False)
    t, f = aligned_segments(truth, found)
    f = f[f.labels < 4]
    f = f[np.argsort(-f.scores, kind="stable")]
    over = np.array([[overlap(a, b) * (v == w) for b, w in zip(t.boxes, t.where)] for a, v in zip(f.boxes, f.where)])
    counts = np.zeros(6, int)
    hits = np.zeros(len(f), bool)
    for k in range(4):
        rows, columns = np.flatnonzero(f.labels == k), np.flatnonzero(t.labels == k)
        hits[rows] = match_by_definition(over[np.ix_(rows, columns)], .5) >= 0
    for i in range(len(f)):
        own, other = over[i, t.labels == f.labels[i]].max(initial=0), over[i, t.labels != f.labels[i]].max(initial=0)
        if hits[i]: kind = "hit"
        elif own >= .5: kind = "double detection"
        elif other >= .5 and other > own: kind = "wrong label"
        elif own >= .1: kind = "location"
        elif other >= .1: kind = "both"
        else: kind = "background"
        counts[KINDS.index(kind)] += 1
    np.testing.assert_array_equal(diagnose_temporal(truth, found, NAMES).counts, counts)


def test_an_all_perfect_result_has_nothing_to_gain():
    truth, _ = tables(0, False)
    d = diagnose_temporal(truth, Table(truth.video, truth.segments, truth.labels, np.ones(len(truth))), NAMES)
    assert d.mAP == 1 and set(d.gains.values()) == {0.} and d.missed.sum() == 0 and d.points[0].precision == 1
    assert all(np.allclose(s.ap, 1) and np.allclose(s.recall, 1) for s in d.sensitivities)


def test_operating_points_by_definition():
    rng = np.random.default_rng(0)
    scores, hits = rng.integers(0, 20, 200) / 20, rng.random(200) < .5
    for wanted in (.3, .5, .55, .6, .9):
        cuts = [(hits[scores >= s].sum(), s) for s in np.unique(scores) if hits[scores >= s].mean() >= wanted]
        p = operating_point(scores, hits, 150, wanted)
        assert (p.score is None) == (not cuts)
        if cuts: assert hits[scores >= p.score].sum() == max(cuts)[0] and p.recall == max(cuts)[0] / 150


@pytest.mark.parametrize("values", [[1.], [2., 2.], [1., 2.], [1., 1., 5.], np.arange(7.), np.r_[np.zeros(50), 1.]])
def test_groups_hold_every_value_once(values):
    values = np.asarray(values)
    edges = groups_of(values)
    assert len(edges) >= 2 and (np.diff(edges) >= 0).all() and edges[0] <= values.min() and edges[-1] >= values.max()
    t = Instances(np.zeros(len(values), int), np.tile([0., 1.], (len(values), 1)), np.zeros(len(values), int))
    d = diagnose(t, Instances(t.where, t.boxes, t.labels, np.ones(len(t))), ("one",), quantities=[Quantity("q", "", values)])
    assert d.sensitivities[0].instances.sum() == len(values)


@pytest.mark.skipif(not (SHARED / "ava").exists(), reason="the shared AVA files are not here")
def test_ava_from_the_command_line(tmp_path):
    rows = gzip.open(SHARED / "ava/ava_val_v2.1.csv.gz", "rt").read().splitlines()[:3000]
    (tmp_path / "gt.csv").write_text("\n".join(rows))
    rng = np.random.default_rng(0)
    (tmp_path / "pred.csv.gz").write_bytes(gzip.compress("\n".join(f"{r},{rng.random():.4f}" for r in rows).encode()))
    label_map = next((SHARED / "ava").glob("*.pbtxt"))
    files = ["--ground-truth", tmp_path / "gt.csv", "--predictions", tmp_path / "pred.csv.gz", "--label-map", label_map]
    for command, out in (("evaluate", ["--json", tmp_path / "r.json"]), ("diagnose", ["--json", tmp_path / "d.json", "--html", tmp_path / "d.html"])):
        done = subprocess.run([Path(sys.executable).with_name("actloc"), command, "frame", *files, *out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    result, diagnosis = (json.loads((tmp_path / name).read_text()) for name in ("r.json", "d.json"))
    assert result["mAP"] > .99 and diagnosis["mAP"] == pytest.approx(result["mAP"], abs=1e-12)
    assert "Where to cut" in (tmp_path / "d.html").read_text()
