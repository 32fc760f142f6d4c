"""What guards the synthetic default but does not teach: determinism, ranges, odd sizes."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from actloc.core.segments import tiou
from actloc.data.synthetic import CLOCK, motions, perform, plan, scene, scripts, synthetic, synthetic_classes


def fingerprint(recordings):
    parts = (x.tobytes() for r in recordings for x in (r.features, r.segments_s, r.labels))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_another_process_makes_the_same_bits():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(synthetic(6, seed=3))


def test_the_global_random_state_is_neither_read_nor_changed():
    np.random.seed(1)
    before = fingerprint(synthetic(3))
    drawn = np.random.rand()
    np.random.seed(2)
    assert fingerprint(synthetic(3)) == before
    np.random.seed(1)
    assert np.random.rand() == drawn


def test_a_recording_does_not_depend_on_how_many_there_are():
    few, many = synthetic(5), synthetic(9)
    assert fingerprint(few) == fingerprint(many[:5])
    assert [r.subset for r in few] == [r.subset for r in many[:5]]
    assert fingerprint([scene(3)]) == fingerprint(few[3:4])


def test_seeds_give_other_recordings_of_the_same_world():
    ids = [r.id for seed in (0, 1, 2) for r in synthetic(20, seed=seed)]
    assert len(set(ids)) == 60
    assert fingerprint(synthetic(2, seed=1)) != fingerprint(synthetic(2, seed=2))


@pytest.mark.parametrize("num_classes", [1, 2, 18])
@pytest.mark.parametrize("channels", [8, 50])
def test_sizes(num_classes, channels):
    recordings = synthetic(12, num_classes=num_classes, channels=channels)
    assert len(synthetic_classes(num_classes)) == num_classes == len(scripts(num_classes))
    for r in recordings:
        assert r.features.dtype == np.float32 and r.features.shape[0] == channels and 150 <= r.features.shape[1] <= 500
        assert np.isfinite(r.features).all()
        assert r.labels.size == 0 or (r.labels.min() >= 0 and r.labels.max() < num_classes)
        assert (r.segments_s > 0).all() and (r.segments_s < r.duration_s).all()


def test_one_recording_and_every_share():
    assert len(synthetic(1)) == 1
    assert {r.subset for r in synthetic(10, validation_share=0)} == {"training"}
    assert {r.subset for r in synthetic(10, validation_share=1)} == {"validation"}
    for share in (.1, .25, 1 / 3, .5):
        count = sum(r.subset == "validation" for r in synthetic(30, validation_share=share))
        assert abs(count - 30 * share) <= 1


def test_the_default_holds_what_a_localizer_has_to_master():
    recordings = synthetic()
    lengths = np.concatenate([np.diff(r.segments_grid)[:, 0] for r in recordings])
    overlapping = sum((np.triu(tiou(r.segments_s, r.segments_s), 1) > 0).sum() for r in recordings)
    assert lengths.min() < 3.5 and lengths.max() > 70                # every scale
    assert overlapping > 30                                          # overlaps
    assert sum(len(r.labels) == 0 for r in recordings) >= 10         # recordings without any action
    assert len({r.features.shape[1] for r in recordings}) > 100      # of different length
    counts = np.bincount(np.concatenate([r.labels for r in recordings]), minlength=6)
    assert counts.min() > .7 * counts.mean()
    halves = sum(not a.labelled for i in range(50) for a in plan(np.random.default_rng(i), 400, 6, 1.))
    assert halves > 50


def test_difficulty_adds_disturbance_and_nothing_at_zero():
    clean, noisy = (scene(3, difficulty=d) for d in (0., 2.))
    explained = np.linalg.lstsq(motions(32).T, clean.features, rcond=None)[0]
    assert np.abs(motions(32).T @ explained - clean.features).max() < 1e-2      # only motions, up to rounding
    assert noisy.features.std() > 2 * clean.features.std()
    still = scene(4, difficulty=0.)
    assert not still.features.any() and len(still.labels) == 0


def test_a_half_action_stays_in_its_phases():
    whole, first, rest = (perform(60, 10, 50, shown) for shown in ((0., 1.), (0., .4), (.4000001, 1.)))
    assert np.allclose(first + rest, whole, atol=1e-6)
    assert not first[30:].any() and not rest[:22].any()


def test_truth_lies_where_the_signal_is():
    """Without disturbance the energy outside all segments (two steps of blur aside) belongs to nobody."""
    for i in (0, 1, 2, 3):
        r = scene(i, difficulty=0.)
        steps = np.arange(r.features.shape[1])
        inside = np.zeros(len(steps), bool)
        for start, end in r.segments_grid:
            inside |= (steps > start - 2) & (steps < end + 2)
        assert not r.features[:, ~inside].any() and r.features[:, inside].any()
    assert CLOCK.to_seconds(0) == pytest.approx(8 / 25)


if __name__ == "__main__":                                           # the other process
    print(fingerprint(synthetic(6, seed=3)))
