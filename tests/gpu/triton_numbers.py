"""Numbers of the Triton kernels: on a GPU, or through the interpreter (TRITON_INTERPRET=1). tests/test_triton.py runs them, in a process of their own."""
import os

import numpy as np
import pytest
import torch

from actloc.kernels.nms import nms_groups
from actloc.kernels.triton_attention import dropout_keep, triton_band
from actloc.kernels.triton_nms import CHUNK, SMALL, triton_nms_groups
from actloc.ops.local_attention import local_attention_definition

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
gpu_only = pytest.mark.skipif(INTERPRETED, reason="on a GPU only: too long for the interpreter, or a type it has not")
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


def mask_with_holes(B, T):
    """The last recording is wholly masked; the first one has a masked beginning and a hole wider than most windows."""
    mask = torch.ones(B, T, dtype=torch.bool)
    if T > 10: mask[0, : T // 5] = mask[0, T // 2: T // 2 + T // 4] = False
    mask[-1] = B == 1
    return mask.to(DEVICE)


def outcome(way, dtype, bias_dtype, tensors, bias, weight):
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors] + ([] if bias is None else [bias.detach().to(bias_dtype).requires_grad_()])
    out = way(*inputs, *([None] if bias is None else []))
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(dtype))]


def judge(B, H, T, D, window, dtype, biased=False, dropout=0., arrange=lambda x: x.transpose(1, 2)):
    """Errors against float64 of at most 2x (gradients 3x) those of the definition in the kernel's own type."""
    generator = torch.Generator().manual_seed(T * 1000 + D)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    reach = window // 2
    tensors = [draw(B, T, H, D).to(dtype) for _ in range(3)]
    mask, weight, bias = mask_with_holes(B, T), draw(B, H, T, D).to(dtype), draw(H, 2 * reach + 1).to(dtype) if biased else None
    seed = torch.tensor([T + D], device=DEVICE)
    keep = dropout_keep(seed, B, T, H, reach, dropout) if dropout else None
    definition = lambda q, k, v, bias: local_attention_definition(q, k, v, 2 * reach + 1, mask, bias, None if keep is None else keep.to(q.dtype))
    kernel = lambda q, k, v, bias: triton_band(q, k, v, mask, bias, reach, dropout, seed)
    views = [arrange(x) for x in tensors]
    found = outcome(kernel, dtype, f32, views, bias, weight)
    exact = outcome(definition, torch.float64, torch.float64, views, bias, weight)
    own = outcome(definition, dtype, dtype, views, bias, weight)
    # A query that sees one key has no slope: the definition finds exactly 0, the kernels what the rounding of `out` leaves in a sum of D products.
    floor = 1e-6 if dtype == f32 else torch.finfo(dtype).eps * (D ** .5 if T == 1 or reach == 0 else 1)
    for name, x, e, o, times in zip(("out", "dq", "dk", "dv", "d_bias"), found, exact, own, (2, 3, 3, 3, 3)):
        error, allowed = (x - e).abs().max().item(), times * (o - e).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.1e}, {allowed:.1e} allowed"          # NaN fails too
    hidden = ~mask[:, None, :, None].expand_as(found[0])
    assert not any(x[hidden].any() for x in found[:4]), "masked steps must give zeros and zero gradients"


@pytest.mark.parametrize("dtype", [f32, f16, pytest.param(bf16, marks=gpu_only)], ids=str)
@pytest.mark.parametrize("T, window, D, biased, dropout", [
    (1, 1, 8, False, 0.), (1, 19, 24, True, .2), (1, 4, 64, False, 0.),
    (63, 1, 24, False, 0.), (63, 4, 8, False, .2), (63, 19, 64, True, 0.), (63, 127, 64, True, .2),
    (500, 19, 8, True, .2), pytest.param(500, 4, 128, False, 0., marks=gpu_only), pytest.param(2304, 19, 96, True, .2, marks=gpu_only),
    pytest.param(500, 1001, 64, True, .2, marks=gpu_only)])
def test_attention_is_the_definition(T, window, D, biased, dropout, dtype):
    B, H = (1, 1) if INTERPRETED and (T == 500 or window > 100) else (2, 2)
    judge(B, H, T, D, window, dtype, biased, dropout)


@pytest.mark.parametrize("D", [8, pytest.param(64, marks=gpu_only)])
def test_attention_longer_than_the_recording(D):
    judge(1, 1, 500, D, 999, f16, biased=True)


@pytest.mark.parametrize("dtype", [f32, f16], ids=str)
def test_attention_reads_any_strides(dtype):
    fused = lambda x: torch.stack([x, x, x], 2)[:, :, 1].transpose(1, 2)                   # a slice of a fused projection
    for arrange in (lambda x: x.transpose(1, 2).contiguous(), fused, lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(2, 3)):
        judge(1, 2, 20, 16, 5, dtype, arrange=arrange)


@pytest.mark.parametrize("dtype", [f32, f16], ids=str)
def test_attention_repeats_itself(dtype):
    q = torch.randn(1, 2, 70, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    bias, mask = torch.randn(2, 7, device=DEVICE, requires_grad=True), mask_with_holes(1, 70)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        out = triton_band(q, q, q, mask, bias, 3, .3)
        runs.append([out, *torch.autograd.grad(out, (q, bias), torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2])) and not torch.equal(runs[0][0], runs[2][0])
    assert runs[0][1].shape == q.shape and runs[0][0].transpose(1, 2).is_contiguous()


def test_dropout_is_fair():
    keep = dropout_keep(torch.tensor([11], device=DEVICE), 4, 600, 4, 8, .25).cpu()
    assert sorted(keep.unique().tolist()) == [0, pytest.approx(1 / .75)]
    kept = (keep > 0).double()                                                             # [B, T, H, W]: 163,200 decisions
    assert abs(kept.mean() - .75) < 5 * (.75 * .25 / kept.numel()) ** .5
    for dims in ((0, 1, 2), (1, 2, 3), (0, 1, 3)):                                         # every slot, recording and head
        share = kept.mean(dims)
        assert ((share - .75).abs() < 5 * (.75 * .25 * len(share) / kept.numel()) ** .5).all()
    centred = kept - .75
    for a, b in ((centred[..., 1:], centred[..., :-1]), (centred[:, 1:], centred[:, :-1]), (centred[:, :, 1:], centred[:, :, :-1]),
                 (centred[1:], centred[:-1]), (centred[:, 1:, :, :-1], centred[:, :-1, :, 1:])):                        # neighbours know nothing of each other
        assert abs((a * b).mean() / (.75 * .25)) < 5 / a.numel() ** .5


@gpu_only
def test_attention_of_100000_steps():
    from actloc.ops.local_attention import local_attention_blocks

    q, k, v = torch.randn(3, 1, 4, 100_000, 64, device=DEVICE)
    mask = mask_with_holes(1, 100_000)
    assert (triton_band(q, k, v, mask, None, 9) - local_attention_blocks(q, k, v, 19, mask)).abs().max() < 1e-4
    half = [x.to(bf16) for x in (q, k, v)]
    assert (triton_band(*half, mask, None, 9) - local_attention_blocks(q, k, v, 19, mask)).abs().max() < .05


# ---- NMS ------------------------------------------------------------------------------------------------------------------------------------

def through_triton(segments, scores, offsets, *settings):
    tensors = [torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE) for x in (segments, scores, offsets)]
    return tuple(x.cpu().numpy() for x in triton_nms_groups(*tensors, settings[0], *(float(s) for s in settings[1:4]), settings[4], float(settings[5])))


@pytest.mark.parametrize("method", ["soft", "hard"])
@pytest.mark.parametrize("per_class", [True, False])
def test_nms_golden(method, per_class, monkeypatch):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import test_golden_actionformer

    monkeypatch.setattr("actloc.kernels.nms.nms_groups", through_triton)
    test_golden_actionformer.test_nms(method, per_class)


def groups(rng, counts, coarse):
    offsets = np.r_[0, np.cumsum(counts)].astype(np.int64)
    start, length, scores = rng.uniform(0, 60, offsets[-1]), rng.uniform(0, 20, offsets[-1]), rng.random(offsets[-1])
    if coarse: start, length, scores = start.round(), length.round(), scores.round(1)      # ties, empty segments, equal segments
    return np.stack([start, start + length], 1).astype(np.float32), scores.astype(np.float32), offsets


def same(found, expected, exact_scores):
    picks, scores, segments, count = found
    np.testing.assert_array_equal(count, expected[3])
    rows = np.flatnonzero(picks >= 0)
    assert len(rows) == count.sum()
    np.testing.assert_array_equal(picks[rows], expected[0][rows])
    np.testing.assert_allclose(scores[rows], expected[1][rows], rtol=0 if exact_scores else 1e-5)
    np.testing.assert_allclose(segments[rows], expected[2][rows], rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("method", [0, 1, 2])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("voting", [0., .7])
def test_nms_is_the_cpu_kernel(method, coarse, voting):
    rng = np.random.default_rng(method)
    small, large = [0, 1, 2, 0, 0, 130, 63, 1, 0], [SMALL, SMALL + 1, 3, 2 * CHUNK, 3 * CHUNK + 17]
    for counts, most, threshold, sigma, min_score in ((small, 200, .4, .5, .05), (small, 30, 0., .1, .3), (small, 15, 1., 2., 0.), (large, 5, .4, .5, .05), ([40], 1, .4, .5, .05)):
        settings = method, np.float32(threshold), np.float32(sigma), np.float32(min_score), most, np.float32(voting)
        arrays = groups(rng, counts, coarse)
        same(through_triton(*arrays, *settings), nms_groups(*arrays, *settings), exact_scores=method != 1)


@pytest.mark.parametrize("method", [0, 1, 2])
def test_nms_of_equals_and_of_the_hopeless(method):
    """Of equal scores the first row wins, across the pieces of a large group too; soft picks its best even when that is below min_score."""
    segments, scores, offsets = groups(np.random.default_rng(3), [90, 2 * CHUNK + 50], False)
    for some_scores in (np.full_like(scores, .5), scores * .01):
        settings = method, np.float32(1), np.float32(.5), np.float32(.05), 4, np.float32(0)
        same(through_triton(segments, some_scores, offsets, *settings), nms_groups(segments, some_scores, offsets, *settings), exact_scores=method != 1)


def test_nms_of_100000():
    arrays = groups(np.random.default_rng(7), [5, 100_000, 0], False)
    settings = 1, np.float32(.1), np.float32(.5), np.float32(.001), 3 if INTERPRETED else 200, np.float32(0)
    same(through_triton(*arrays, *settings), nms_groups(*arrays, *settings), exact_scores=False)


def test_nms_of_nothing():
    for counts in ([], [0], [0, 0]):
        picks, scores, segments, count = through_triton(*groups(np.random.default_rng(0), counts, False), 1, .1, .5, .001, 10, .5)
        assert picks.shape == scores.shape == (0,) and segments.shape == (0, 2) and count.tolist() == [0] * len(counts)


def test_nms_changes_no_argument():
    segments, scores, offsets = (torch.from_numpy(x).to(DEVICE) for x in groups(np.random.default_rng(0), [50, CHUNK + 5], False))
    before = [x.clone() for x in (segments, scores, offsets)]
    triton_nms_groups(segments, scores, offsets, 1, .1, .5, .001, 5, .5)
    assert all(torch.equal(a, b) for a, b in zip(before, (segments, scores, offsets)))


# ---- the doors ------------------------------------------------------------------------------------------------------------------------------

def videos(seed, coarse):
    """Candidates of several videos, one of them without any; coarse scores tie."""
    from actloc.core.records import Detections
    rng, found = np.random.default_rng(seed), []
    for n in (60, 0, 1, 33):
        start, scores = rng.uniform(0, 40, n), rng.random(n)
        found.append(Detections(*(torch.from_numpy(x) for x in (np.stack([start, start + rng.uniform(0, 9, n)], 1).astype(np.float32), rng.integers(0, 4, n),
                                                               (scores.round(1) if coarse else scores).astype(np.float32)))))
    return found


@pytest.mark.parametrize("options", [{}, dict(per_class=False, voting_threshold=.7), dict(method="hard", threshold=.4, max_segments=7), dict(num_classes=9)])
@pytest.mark.parametrize("coarse", [False, True])
def test_the_nms_door_gives_what_the_cpu_gives(options, coarse, monkeypatch):
    from actloc.core.records import Detections
    from actloc.ops import nms as door
    found = videos(3, coarse)
    expected = door.nms(found, **options)
    monkeypatch.setattr(door, "on_gpu", lambda detections: True)
    here = door.nms([Detections(*(x.to(DEVICE) for x in (d.segments, d.labels, d.scores))) for d in found], **options)
    assert [len(d) for d in here] == [len(d) for d in expected]
    for a, b in zip(here, expected):
        torch.testing.assert_close(a.scores.cpu(), b.scores, rtol=1e-5, atol=0)
        assert torch.equal(a.labels.cpu(), b.labels)
        torch.testing.assert_close(a.segments.cpu(), b.segments, rtol=2e-5, atol=1e-4)


def test_the_nms_door_refuses_nan_after_the_launch(monkeypatch):
    from actloc.ops import nms as door
    found = videos(0, False)
    found[3].scores[4] = float("nan")
    monkeypatch.setattr(door, "on_gpu", lambda detections: True)
    with pytest.raises(ValueError, match="in video 3"):
        door.nms([type(d)(*(x.to(DEVICE) for x in (d.segments, d.labels, d.scores))) for d in found])


@pytest.mark.parametrize("window", [1, 4, 200])
def test_the_attention_door_takes_the_kernel(window):
    from actloc.ops.local_attention import band_on_gpu, local_attention
    q, k, v = (torch.randn(2, 2, 37, 8, device=DEVICE) for _ in range(3))
    mask = mask_with_holes(2, 37)
    way = local_attention if DEVICE == "cuda" else lambda q, k, v, window, mask: band_on_gpu(q, k, v, window, mask, None, 0.)
    torch.testing.assert_close(way(q, k, v, window, mask), local_attention_definition(q, k, v, window, mask), rtol=1e-4, atol=1e-5)
