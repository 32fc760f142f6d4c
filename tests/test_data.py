"""Datasets: the real annotation files load whole, and every wrong input is named."""
import json
import shutil

import numpy as np
import pytest

from actloc.core.annotations import read_annotations
from actloc.data.loading import CropConfig, TrainingBatches, draw_window
from actloc.data.recordings import read_dataset


def test_thumos(shared):
    known = read_annotations(shared / "data/thumos14.json", bad_segments="repair")
    assert len(known) == 412 and len(known.classes) == 20
    assert sum(len(r.labels) for r in read_annotations(shared / "data/thumos14.json", bad_segments="keep").recordings) == 6365
    assert len(known.subset("validation")) + len(known.subset("TEST")) == 412


def test_activitynet(shared):
    known = read_annotations(shared / "data/anet13_groundtruth.json.gz", bad_segments="repair")
    assert len(known) == 19228 and len(known.classes) == 200
    with pytest.raises(ValueError, match="'training'"): known.subset("train")


@pytest.fixture
def tiny(tmp_path):
    """A dataset of three recordings, its JSON content and a function that writes it."""
    content = {"classes": ["wave", "jump"], "features": {"folder": "features", "fps": 10, "stride": 5, "num_frames": 10, "channels": 4},
               "database": {id: {"subset": "train" if id != "c" else "test", "duration": 20., "annotations": [{"label": "wave", "segment": [2, 6]}]} for id in "abc"}}
    (tmp_path / "features").mkdir()
    for i, id in enumerate("abc"): np.save(tmp_path / f"features/{id}.npy", np.random.default_rng(i).normal(size=(38, 4)).astype(np.float32))

    def write(change=lambda c: None):
        copy = json.loads(json.dumps(content))
        change(copy)
        (tmp_path / "annotations.json").write_text(json.dumps(copy))
        return tmp_path
    return write


def first(content): return content["database"]["a"]


@pytest.mark.parametrize("change, says", [
    (lambda c: first(c)["annotations"].append({"label": "wave", "segment": [6, 2]}), "a: segment 1 = (6, 2) is reversed"),
    (lambda c: first(c)["annotations"].append({"label": "wave", "segment": [6, 6]}), "has no length"),
    (lambda c: first(c)["annotations"].append({"label": "wave", "segment": [30, 40]}), "lies outside the recording, which lasts 20 s"),
    (lambda c: first(c)["annotations"].append({"label": "wav", "segment": [3, 4]}), "did you mean 'wave'"),
    (lambda c: first(c).update(duration="long"), "duration is 'long'"),
    (lambda c: first(c).update(duration=-3), "positive"),
    (lambda c: first(c).pop("duration"), "does not say the duration"),
    (lambda c: c["features"].pop("stride"), "stride missing"),
    (lambda c: c["features"].pop("fps"), "frames per second"),
    (lambda c: c["features"].update(stride=0), "stride is 0"),
    (lambda c: c["database"].update(d=c["database"]["a"]), "1 of 4 recordings have no features: d"),
    (lambda c: c["features"].update(resize=16, layout="T"), "TC (time x channels) or CT"),
    (lambda c: c["features"].update(suffix=".mat"), "one of .npy, .npz, .pt, .h5, .hdf5 is needed"),
    (lambda c: first(c).update(duration=90.), "38 steps came, but 90 s"),
    (lambda c: [v.update(duration=90.) for v in c["database"].values()], "3 of 3 recordings do not fit their feature files: a, b, c"),
    (lambda c: c.pop("features"), "does not say where its features are"),
])
def test_wrong_annotations(tiny, change, says):
    with pytest.raises(ValueError) as error: read_dataset(tiny(change))
    assert says in str(error.value), str(error.value)


def test_numbers_written_as_text(tiny):
    data = read_dataset(tiny(lambda c: first(c).update(duration="20.0", annotations=[{"label": "jump", "segment": ["1.5", "4"]}])))
    assert data[0].segments_s.tolist() == [[1.5, 4.]] and data[0].duration_s == 20


@pytest.mark.parametrize("spoil, says", [
    (lambda p: p.write_bytes(b""), "is empty"), (lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read"),
    (lambda p: np.save(p, np.ones((0, 4), np.float32)), "T >= 1"), (lambda p: np.save(p, np.ones((60, 4), np.float32)), "60 steps came, but 20 s at 10 frames per second"), (lambda p: np.save(p, np.ones((38, 5), np.float32)), "4 channels are needed, 5 came"),
    (lambda p: np.save(p, np.full((38, 4), np.nan, np.float32)), "NaN or infinite"), (lambda p: np.save(p, np.full((38, 4), np.inf, np.float32)), "NaN or infinite")])
def test_wrong_features_name_the_file(tiny, spoil, says):
    folder = tiny()
    spoil(folder / "features/b.npy")
    with pytest.raises(ValueError) as error: [r.features for r in read_dataset(folder)]
    assert says in str(error.value) and "b.npy" in str(error.value)


def test_streams_that_disagree(tiny):
    folder = tiny(lambda c: c["features"].update(folder=["features", "second"], channels=8))
    shutil.copytree(folder / "features", folder / "second")
    np.save(folder / "second/b.npy", np.ones((37, 4), np.float32))
    with pytest.raises(ValueError, match="b: the streams disagree about the length: .*second/b.npy has 37 steps"): read_dataset(folder)
    cut = read_dataset(tiny(lambda c: c["features"].update(folder=["features", "second"], channels=[4, 4], stream_slack=1)))
    assert cut[0].features.shape == (8, 38) and cut[1].features.shape == (8, 37)


def test_wrong_subset_lists_those_that_exist(tiny):
    with pytest.raises(ValueError, match="'test' .1 recordings., 'train' .2 recordings."): read_dataset(tiny(), subset="validation")


def test_every_window_obeys_the_rules():
    from actloc.data.synthetic import synthetic
    recordings, config = synthetic(num_recordings=8, num_classes=3, channels=8), CropConfig(max_seq_len=100)
    for i, recording in enumerate(recordings):
        for draw in range(20):
            window = draw_window(recording, config, np.random.default_rng([i, draw]))
            margin = recording.grid.num_frames / 2 / recording.grid.stride
            assert window.features.shape[1] <= 100 and len(window.labels) == len(window.segments)
            assert len(window.labels) > 0 or len(recording.labels) == 0
            if len(window.segments):
                assert window.segments.min() >= -margin and window.segments.max() <= window.features.shape[1] + margin
            start = next(s for s in range(recording.features.shape[1]) if np.array_equal(recording.features[:, s: s + window.features.shape[1]], window.features))
            lengths = {(round(float(s), 3), round(float(e), 3)) for s, e in recording.segments_grid}
            for s, e in window.segments + start:
                assert any((e - s) >= .5 * (b - a) - 1e-6 and a - 1e-3 <= s and e <= b + 1e-3 for a, b in lengths)


def test_an_epoch_visits_every_recording_once():
    from actloc.data.synthetic import synthetic
    recordings = synthetic(num_recordings=7, num_classes=3, channels=8, validation_share=0.)
    batches = TrainingBatches(recordings, CropConfig(crop_ratio=None), batch_size=2, seed=1)
    lengths = sorted(int(n) for b in batches.epoch(0) for n in b.mask.sum(1))
    assert len(lengths) == 6 and len(batches) == 3
    assert all(n in [r.features.shape[1] for r in recordings] for n in lengths)
