"""The numbers of the published release: every level, detection, target, loss and gradient of its golden cases."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from actloc.actionformer.model import ActionFormer
from actloc.actionformer.points import Points, assign
from actloc.actionformer.release import config_from_release, load_release, load_release_state, our_name, addresses
from actloc.core.records import Detections, pad
from actloc.core.segments import FeatureGrid
from actloc.ops.nms import nms

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CASES = ["local_window", "rel_pe", "global_abs_pe", "multi_feature", "long_mixed_windows"]
GRID = FeatureGrid(fps=25, stride=4, num_frames=16)


def golden(name: str) -> Path:
    """A golden file: from tests/golden where it is small, else from ../shared."""
    for folder in (Path(__file__).parent / "golden", GOLDEN):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} lies in ../shared/golden, which is not beside this checkout")


def load_case(case: str):
    settings = json.loads(golden(f"actionformer_{case}.json").read_text())
    data = np.load(golden(f"actionformer_{case}.npz"))
    state = {k.removeprefix("state/"): torch.from_numpy(data[k]) for k in data.files if k.startswith("state/")}
    model = load_release_state(ActionFormer(config_from_release(settings)), state).eval()
    return model, data, [torch.from_numpy(data[f"input/{i}/feats"]) for i in range(2)]


def check_outputs(out, levels, row, data, i, tolerance=1e-4):
    first = 0
    for l, (length, level) in enumerate(zip(out.lengths, levels)):
        points = slice(first, first + length)
        real = out.mask[row, points]
        n = int(real.sum())
        for name, ours in (("feature", level.x[row].T), ("logits", out.logits[row, points].T), ("offsets", out.offsets[row, points].T)):
            expected = data[f"eval/{i}/level{l}/{name}"][0]
            scale = max(1., np.abs(expected[:, :n]).max())
            assert np.abs(ours[:, :n].numpy() - expected[:, :n]).max() <= tolerance * scale, (i, l, name)
        first += length


def check_detections(found, data, i):
    expected = {k: data[f"eval/{i}/detections/{k}"] for k in ("segments", "scores", "labels")}
    found = found.numpy().in_seconds(GRID, float(data[f"input/{i}/duration"]), keep_empty=True)
    assert len(found) == len(expected["scores"])
    np.testing.assert_array_equal(found.labels, expected["labels"])
    np.testing.assert_allclose(found.scores, expected["scores"], atol=1e-5)
    np.testing.assert_allclose(found.segments, expected["segments"], atol=1e-3)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_video_alone(case):
    model, data, features = load_case(case)
    for i, x in enumerate(features):
        mask = torch.ones(1, x.shape[1], dtype=torch.bool)
        out = model(x[None], mask)
        check_outputs(out, model.levels(x[None], mask), 0, data, i)
        check_detections(model.predict(x[None], mask)[0], data, i)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_both_videos_as_one_batch_padded_anyhow(case):
    model, data, features = load_case(case)
    alone = [model(x[None], torch.ones(1, x.shape[1], dtype=torch.bool)) for x in features]
    for extra, order in ((0, (0, 1)), (0, (1, 0)), (57, (0, 1)), (300, (1, 0))):
        x, mask = pad([features[i] for i in order])
        x, mask = torch.nn.functional.pad(x, (0, extra), value=7.), torch.nn.functional.pad(mask, (0, extra))
        x = x * mask[:, None]
        out = model(x, mask)
        found = model.predict(x, mask)
        for row, i in enumerate(order):
            check_outputs(out, model.levels(x, mask), row, data, i)
            check_detections(found[row], data, i)
            ours, single = out.mask[row], alone[i].mask[0]
            assert (out.logits[row][ours] - alone[i].logits[0][single]).abs().max() <= 1e-5
            assert (out.offsets[row][ours] - alone[i].offsets[0][single]).abs().max() <= 1e-5 * max(1, alone[i].offsets.max())


@pytest.mark.parametrize("case", CASES)
def test_targets_losses_gradients(case):
    model, data, _ = load_case(case)
    for module in model.modules():
        if hasattr(module, "rate"):
            module.rate = 0.
    features, mask = torch.from_numpy(data["train/batched_inputs"]), torch.from_numpy(data["train/batched_masks"])[:, 0]
    segments = [torch.from_numpy(data[f"input/{i}/segments"]) for i in range(2)]
    labels = [torch.from_numpy(data[f"input/{i}/labels"]) for i in range(2)]
    model.train()
    out = model(features, mask)
    classes, offsets = assign(out.points, segments, labels, model.config.num_classes, model.config.center_radius)
    for i in range(2):
        expected_classes, expected_offsets = (data[f"train/{i}/{k}_targets"] for k in ("class", "offset"))
        lengths = [data[f"points/level{l}"].shape[0] for l in range(model.config.levels)]
        rows = common_points(out.lengths, lengths)
        np.testing.assert_array_equal(classes[i].numpy(), expected_classes[rows])
        assert expected_classes.sum() == classes[i].sum()
        positive = expected_classes[rows].any(1)
        np.testing.assert_allclose(offsets[i].numpy()[positive], expected_offsets[rows][positive], atol=1e-5)
    losses = model.loss(features, mask, segments, labels)
    for name, ours in (("cls_loss", losses.classification), ("reg_loss", losses.regression), ("final_loss", losses.total)):
        np.testing.assert_allclose(ours.item(), data[f"train/loss/{name}"], rtol=2e-5)
    np.testing.assert_allclose(model.loss_normaliser.item(), data["train/loss_normalizer_after"], rtol=1e-6)
    losses.total.backward()
    ours, checked = gradients(model), 0
    for name in data.files:
        if name.startswith("grad/"):
            expected, got = data[name], ours[our_name(name.removeprefix("grad/"))]
            assert np.abs(got.reshape(expected.shape) - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-9, name
            checked += 1
    assert checked > 10


def common_points(ours: list, theirs: list) -> np.ndarray:
    """Rows of the release's points (padded to its length) that are points of ours (padded to what is needed)."""
    starts = np.r_[0, np.cumsum(theirs)[:-1]]
    return np.concatenate([start + np.arange(n) for start, n in zip(starts, ours)])


def gradients(model) -> dict:
    scales = model.heads.scales.grad
    named = {k: p.grad.numpy() for k, p in model.named_parameters() if k != "heads.scales"}
    return named | {f"heads.scales.{i}": g.numpy() for i, g in enumerate(scales)}


def test_target_edges():
    data = np.load(golden("targets_edges.npz"))
    lengths, ranges = [48, 24, 12, 6], ((0, 4), (4, 8), (8, 16), (16, 10000))
    from actloc.actionformer.points import make_points
    points = make_points(lengths, ranges)
    kinds = sorted({name.split("/")[0] for name in data.files} - {"points"})
    assert kinds == ["none", "radius", "radius_wide"]
    for kind in kinds:
        radius = {"none": None, "radius": 1.5, "radius_wide": 3.}[kind]
        for i in sorted({name.split("/")[1] for name in data.files if name.startswith(kind + "/")}):
            key = f"{kind}/{i}/"
            classes, offsets = assign(points, [torch.from_numpy(data[key + "segments"]).reshape(-1, 2)], [torch.from_numpy(data[key + "labels"])], 5, radius)
            expected = data[key + "class_targets"]
            np.testing.assert_array_equal(classes[0].numpy(), expected)
            positive = expected.any(1)
            np.testing.assert_allclose(offsets[0].numpy()[positive], data[key + "offset_targets"][positive], atol=1e-5)


def test_checkpoint_file():
    settings = json.loads(golden("actionformer_checkpoint.json").read_text())
    model = load_release(golden("actionformer_checkpoint.pth.tar"), config_from_release(settings))
    data = np.load(golden("actionformer_checkpoint_expected.npz"))
    names = {name.split("/")[-1]: name for name in data.files}
    x = torch.from_numpy(data[names["feats"]])
    (found,) = model.predict(x[None], torch.ones(1, x.shape[1], dtype=torch.bool))
    duration = float(data[names["duration"]]) if "duration" in names else x.shape[1] * 4 / 25 + 1
    found = found.numpy().in_seconds(GRID, duration, keep_empty=True)
    np.testing.assert_array_equal(found.labels, data[names["labels"]])
    np.testing.assert_allclose(found.scores, data[names["scores"]], atol=1e-5)
    np.testing.assert_allclose(found.segments, data[names["segments"]], atol=1e-3)


@pytest.mark.parametrize("method", ["soft", "hard"])
@pytest.mark.parametrize("per_class", [True, False])
def test_nms(method, per_class):
    data = np.load(golden("nms_1d.npz"))
    crowds = sorted({name.split("/")[0] for name in data.files})
    batch = [Detections(*(data[f"{crowd}/{k}"] for k in ("segments", "labels", "scores"))) for crowd in crowds]
    found = nms(batch, method, per_class=per_class, threshold=.4, sigma=.5, min_score=.01, max_segments=100, voting_threshold=0. if per_class else .7)
    for crowd, d in zip(crowds, found):
        key = f"{crowd}/{method}_{'multiclass' if per_class else 'agnostic_voting'}/"
        np.testing.assert_array_equal(d.labels, data[key + "labels"])
        np.testing.assert_allclose(d.scores, data[key + "scores"], atol=1e-6)
        np.testing.assert_allclose(d.segments, data[key + "segments"], atol=1e-4)
