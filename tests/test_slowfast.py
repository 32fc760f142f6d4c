"""SlowFast and its checkpoints: golden numbers of the release, torch's own layers as the judge, padding that never leaks, bad input."""
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actloc.acar import release, slowfast
from actloc.acar.slowfast import SlowFast, SlowFastConfig, receptive_field, slow_positions, slowfast_r50, slowfast_small
from golden_weights import weight

SHARED = Path(__file__).parents[2] / "shared" / "golden"
needs = lambda name: pytest.mark.skipif(not (SHARED / name).exists(), reason=f"{SHARED / name} is not here (shared files are optional)")


def restless(net, seed=0):
    "Weights and statistics as after training: no norm is the identity."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if name.endswith("running_var") or name.endswith("norm.weight"): t.copy_(torch.rand(t.shape, generator=generator) + .5)
            elif ".norm." in name and t.is_floating_point(): t.copy_(torch.randn(t.shape, generator=generator) * .3)
    return net


def close(a, b, eps):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= eps * max(b.abs().max().item(), 1e-6), f"{(a - b).abs().max()} beside {b.abs().max()}"


# ---- golden numbers

def by_rule(shapes):
    "Their weights."
    return {name: torch.zeros(shape, dtype=torch.int64) if name.endswith("num_batches_tracked") else torch.tensor(np.asarray(weight(name, shape))) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", ["small", "plain_fuse"])
@needs("slowfast_small.json")
def test_golden(case):
    about, values = json.loads((SHARED / f"slowfast_{case}.json").read_text()), np.load(SHARED / f"slowfast_{case}.npz", allow_pickle=False)
    net = SlowFast(dataclasses.replace(release.slowfast_from_release("slowfast50", about["kwargs"]), depths=about["layers"]))
    assert not release.load_backbone(net, by_rule(about["state_shapes"])).unused
    with torch.no_grad(): slow, fast, sizes = net.train()(torch.tensor(values["clip"]))         # frozen: training mode changes nothing
    assert list(slow.shape) == about["slow_shape"] and list(fast.shape) == about["fast_shape"]
    for name, ours, step in (("slow", slow, about["channel_step"]), ("fast", fast, about["fast_channel_step"])):
        assert np.abs(ours[:, ::step].numpy() - values[name]).max() <= 1e-4
        close(ours[:, ::step], torch.tensor(values[name]), 2e-6)
        assert abs(ours.mean().item() - float(values[f"{name}_mean"])) < 1e-5 and abs(ours.std().item() - float(values[f"{name}_std"])) < 1e-5
    assert sizes.tolist() == [list(slow.shape[3:])]


# ---- torch's own layers are the judge

def judged(net, frames):
    "The same network said with torch's 3-D layers, one after the other."
    c = net.config
    norm = lambda y, n: F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, net.training and c.norm == "batch", n.momentum, n.eps)

    def conv(module, x):
        k, d = module.weight.shape[2:], module.dilation
        y = F.conv3d(x, module.weight, None, (module.stride[0], module.stride[1], module.stride[1]), (k[0] // 2, d * (k[1] // 2), d * (k[2] // 2)), (1, d, d))
        y = y if module.norm is None else norm(y, module.norm)
        return F.relu(y) if module.relu else y

    def block(module, x):
        return F.relu(conv(module.widen, conv(module.spatial, conv(module.reduce, x))) + (x if module.shortcut is None else conv(module.shortcut, x)))

    def begin(pathway, x):
        x = F.relu(conv(pathway.stem, x))
        return F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)) if c.stem_pool else x

    fast, slow = begin(net.fast, frames), begin(net.slow, frames[:, :, slow_positions(frames.shape[2], c.alpha, c.slow_full_span)])
    for i, lateral in enumerate(net.laterals):
        slow = torch.cat([slow, conv(lateral, fast)], 1)
        for b in net.slow.stages[i]: slow = block(b, slow)
        for b in net.fast.stages[i]: fast = block(b, fast)
    return slow, fast


TINY = dict(width=8, fast_share=1 / 4, depths=(2, 1), strides=(1, 2), dilations=(1, 1), slow_frames=(1, 3))
CONFIGS = {
    "r50": slowfast_r50(width=16, depths=(1, 2, 1, 1)), "small": slowfast_small(), "conv only": SlowFastConfig(**TINY), "alpha 1": SlowFastConfig(**TINY | dict(alpha=1)),
    "dilated": SlowFastConfig(**TINY | dict(strides=(2, 2), dilations=(2, 3))), "stride in the stem": slowfast_small(stem_pool=False, strides=(2, 2)),
    "long kernels": slowfast_r50(**TINY | dict(slow_frames=(5, 7), fuse_kernel_size=9, stem_frames=7, alpha=2)), "stem of one frame": slowfast_small(stem_frames=1, stem_kernel=5),
    "lateral of one frame": slowfast_small(fuse_kernel_size=1), "one pixel": slowfast_small(stem_kernel=1, stem_stride=1, stem_pool=False, strides=(1, 1), expansion=1),
}


def gradients(net, outs, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.autograd.grad(sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outs), list(net.parameters()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_torch_layers(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)                                    # torch chooses other convolutions then
    try:
        torch.manual_seed(len(name))
        net = restless(SlowFast(CONFIGS[name])).train()
        learns = net.config.norm == "batch"                           # statistics of a handful of numbers: less exact
        for shape in ((2, 3, 8, 37, 51), (1, 3, net.config.alpha, 32, 33), (1, 3, 2 * net.config.alpha, 18, 17)):
            frames = torch.randn(shape)
            kept, twin = frames.clone(), copy.deepcopy(net)
            outs = net(frames)[:2], judged(twin, frames)
            assert torch.equal(frames, kept), "frames were changed"
            for a, b in zip(*outs): close(a, b, 1e-3 if learns else 1e-5)
            for a, b in zip(gradients(net, outs[0]), gradients(twin, outs[1])):       # rounding moves a kink now and then: the norm tells
                assert learns or (a - b).norm() <= .02 * b.norm()
            exact, judge = copy.deepcopy(net).double(), copy.deepcopy(net).double()
            outs = exact(frames.double())[:2], judged(judge, frames.double())
            for a, b in zip(*outs): close(a, b, 1e-9)
            for a, b in zip(gradients(exact, outs[0]), gradients(judge, outs[1])): close(a, b, 1e-7)
    finally: torch.set_num_threads(before)


def test_running_statistics_are_those_of_torch():
    net = SlowFast(slowfast_small())
    twin, frames = copy.deepcopy(net), torch.randn(2, 3, 8, 48, 64)
    net(frames), judged(twin, frames)
    for (name, a), b in zip(net.named_buffers(), twin.buffers()):
        if "running" in name: close(a, b, 1e-4)
    assert not torch.equal(net.slow.stem.norm.running_mean, SlowFast(slowfast_small()).slow.stem.norm.running_mean)


# ---- padding

@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "one pixel"])
def test_a_clip_does_not_see_its_batch_mates(name):
    net = restless(SlowFast(CONFIGS[name])).eval()
    stride, rng = net.config.stride, np.random.default_rng(len(name))
    for trial in range(3):
        sizes = rng.integers(stride, 4 * stride, (3, 2)); sizes[rng.integers(3)] = sizes.max(0)       # one clip fills the frames, or none needs to
        if trial == 2: sizes = sizes // 2 + stride // 2 + 1                                            # nobody fills them: padded further
        H, W = sizes.max(0) + (5 if trial == 2 else 0)
        T = 2 * net.config.alpha
        clips = [torch.randn(3, T, h, w) for h, w in sizes.tolist()]
        batch = torch.stack([F.pad(c, (0, int(W) - c.shape[3], 0, int(H) - c.shape[2]), value=float(rng.integers(-3, 3))) for c in clips])   # whatever the padding holds
        frames, given = batch.clone(), torch.tensor(sizes)
        with torch.no_grad(): out = net(frames, given)
        assert torch.equal(given, torch.tensor(sizes)) and torch.equal(frames, batch)
        exact = copy.deepcopy(net).double()                           # gradients jump at kinks, and single precision rounds across them
        twice = batch.double().requires_grad_()
        seen = exact(twice, given)
        for i, clip in enumerate(clips):
            with torch.no_grad(): alone = net(clip[None])
            h, w = out.sizes[i].tolist()
            assert [h, w] == [-(-n // stride) for n in sizes[i].tolist()] == list(alone.slow.shape[3:])
            for a, b in zip(out[:2], alone[:2]): close(a[i, ..., :h, :w], b[0], 1e-5)
            for x in out[:2]: assert not x[i, ..., h:, :].any() and not x[i, ..., w:].any()
            single = clip[None].double().requires_grad_()
            weights = [torch.randn(x.shape, dtype=torch.double) for x in alone[:2]]
            a, b = (torch.autograd.grad(sum((x * g).sum() for x, g in zip(outs, weights)), [f, *exact.parameters()], retain_graph=True)
                    for outs, f in (([x[i: i + 1, ..., :h, :w] for x in seen[:2]], twice), (exact(single)[:2], single)))
            close(a[0][i, ..., : clip.shape[2], : clip.shape[3]], b[0][0], 1e-8)
            a[0][i, ..., : clip.shape[2], : clip.shape[3]] = 0
            assert not a[0].any(), "a gradient reached the padding or a batch mate"
            for x, y in zip(a[1:], b[1:]): close(x, y, 1e-8)


def test_not_even_infinities_leak():
    net, sizes = restless(SlowFast(slowfast_small())).eval(), torch.tensor([[24, 40], [48, 56]])
    frames = torch.randn(2, 3, 8, 48, 56)
    frames[0, ..., 24:, :] = float("nan"); frames[0, ..., 40:] = float("inf")
    out = net(frames, sizes)
    assert all(x.isfinite().all() for x in out[:2])
    close(out.slow[0, ..., :3, :5], net(frames[:1, ..., :24, :40]).slow[0], 1e-5)


def test_learnt_statistics_know_no_padding():
    "Training with padding: whatever the padding holds and however wide it is, outputs, gradients and statistics stay."
    sizes, clips, results = torch.tensor([[24, 40], [48, 33]]), torch.randn(2, 3, 8, 48, 40), []
    for extra, value in ((0, 0.), (0, 9.), (16, -9.)):
        torch.manual_seed(0)
        net = restless(SlowFast(slowfast_small())).train()
        frames = F.pad(clips, (0, extra, 0, extra), value=value)
        frames[0, ..., 24:, :] = value; frames[1, ..., 33:] = value
        out = net(frames, sizes)
        h, w = out.sizes.amax(0).tolist()
        parts = [x[..., :h, :w] for x in out[:2]]
        grads = torch.autograd.grad(sum(x.square().sum() for x in parts), list(net.parameters()))
        results.append([*parts, *(b.clone() for n, b in net.named_buffers() if "running" in n), *grads])
    for other in results[1:]:
        for a, b in zip(other, results[0]): close(a, b, 1e-4)


def test_full_sizes_cost_nothing_and_change_nothing():
    net, frames = restless(SlowFast(slowfast_small())).eval(), torch.randn(2, 3, 8, 40, 48)
    given = net(frames, torch.tensor([[40, 48]] * 2))
    assert all(torch.equal(a, b) for a, b in zip(given, net(frames)))
    assert slowfast.grid_of(torch.tensor([[40, 48]] * 2), 2, 40, 48).inside is None


# ---- modes

def test_frozen_statistics_stay():
    net = restless(SlowFast(slowfast_small(norm="frozen"))).train()
    before, frames = copy.deepcopy(net.state_dict()), torch.randn(2, 3, 8, 32, 32)
    training = net(frames)
    sum(x.square().mean() for x in training[:2]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())        # scale and shift learn
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(training, net.eval()(frames)))


def test_train_affine_is_an_option():
    net = SlowFast(slowfast_small(norm="frozen", train_affine=False))
    sum(x.square().mean() for x in net(torch.randn(1, 3, 8, 32, 32))[:2]).backward()
    assert {n for n, p in net.named_parameters() if p.grad is None} == {n for n, _ in net.named_parameters() if ".norm." in n}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_bfloat16(norm, padded):
    net, frames = restless(SlowFast(slowfast_small(norm=norm))).train(), torch.randn(2, 3, 8, 48, 64)
    sizes = torch.tensor([[48, 50], [40, 64]]) if padded else None
    exact = net(frames, sizes)
    with torch.autocast("cpu", torch.bfloat16): rough = net(frames, sizes)
    for a, b in zip(exact[:2], rough[:2]):
        assert (a - b.float()).norm() < .05 * a.norm()
    sum(x.float().square().mean() for x in rough[:2]).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_float64_and_no_grad():
    net, frames = restless(SlowFast(slowfast_small())).eval(), torch.randn(1, 3, 8, 32, 40)
    with torch.no_grad(): single = net(frames)
    for a, b in zip(net.double()(frames.double())[:2], single[:2]): close(b, a.float(), 1e-5)


def test_narrow_strided_shortcuts_do_not_kill_the_process():
    "oneDNN's strided 1 x 1 convolution writes beyond its workspace for fewer than 16 channels (oneDNN #6035)."
    program = ("import torch; torch.set_num_threads(1); from actloc.acar.slowfast import *\n"
               "for config in (slowfast_small(stem_pool=False, strides=(2, 2)), slowfast_small(fuse_kernel_size=1, width=8)):\n"
               "    net = SlowFast(config)\n"
               "    for _ in range(4): sum(x.sum() for x in net(torch.randn(1, 3, 8, 120, 160))[:2]).backward()\n"
               "print('alive')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)   # a broken one may hang
    assert done.stdout.strip() == "alive", done.stderr[-300:]


# ---- arithmetic

def test_positions_are_those_of_linspace():
    for alpha in (1, 2, 4, 8):
        for frames in range(alpha, 257, alpha):
            n = frames // alpha
            floats = np.linspace(0, frames - 1, n)
            exact = [int(np.floor(x + 1e-9)) for x in floats]
            assert slow_positions(frames, alpha, True) == exact
            assert slow_positions(frames, alpha, False) == list(range(0, frames, alpha))


@pytest.mark.parametrize("config", [slowfast_small(), slowfast_small(depths=(2, 1, 1), strides=(2, 1, 2), dilations=(1, 2, 1), slow_frames=(1, 1, 1)),
                                    slowfast_small(stem_kernel=7, stem_pool=False), slowfast_small(depths=(1,), strides=(1,), dilations=(3,), slow_frames=(1,))])
def test_receptive_field_is_what_reaches_a_position(config):
    net = SlowFast(dataclasses.replace(config, norm="frozen"))
    with torch.no_grad():
        for p in net.parameters(): p.abs_()                          # nothing cancels, nothing dies
    side, stride = receptive_field(config), config.stride
    size = (side // stride + 2) * stride
    frames, middle = torch.rand(1, 3, config.alpha, size, size, requires_grad=True), size // stride // 2
    out = net(frames)
    for x in out[:2]:
        grad, = torch.autograd.grad(x[..., middle, middle].sum(), frames, retain_graph=True)
        seen = grad.sum((0, 1, 2)).any(0).nonzero().flatten()
        assert seen[-1] - seen[0] + 1 <= side
        # the pool passes on one winner per window, so its border may lose a pixel or two
        assert seen[-1] - seen[0] + 1 >= side - (4 * config.stem_stride if config.stem_pool else 0)


# ---- bad input

@pytest.mark.parametrize("wrong, says", [
    (dict(depths=(1, 2, 3)), "one per stage"), (dict(strides=(1,)), "one per stage"), (dict(width=6), "whole number"), (dict(fast_share=.01), "whole number"),
    (dict(fuse_kernel_size=4), "odd"), (dict(slow_frames=(1, 2)), "odd"), (dict(norm="sync"), "frozen or batch"), (dict(alpha=0), "alpha"), (dict(strides=(1, 0)), "strides")])
def test_settings_that_make_no_network(wrong, says):
    with pytest.raises(ValueError, match=says): slowfast_small(**wrong)


def test_settings_from_files():
    settings = json.loads(json.dumps(vars(slowfast_r50())))
    assert SlowFastConfig.from_dict(settings) == slowfast_r50()
    with pytest.raises(ValueError, match="did you mean 'fuse_ratio'"): SlowFastConfig.from_dict({"fuse_raito": 2})


@pytest.mark.parametrize("shape, sizes, says", [
    ((1, 3, 7, 32, 32), None, "4 or 8 frames"), ((1, 3, 3, 32, 32), None, "clips of 4 frames"), ((1, 3, 0, 32, 32), None, "clips of 4 frames"),
    ((1, 1, 8, 32, 32), None, "3 channels"), ((3, 8, 32, 32), None, "3 channels"), ((1, 3, 8, 7, 32), None, "7 x 32"),
    ((2, 3, 8, 32, 32), [[32, 32]], "one \\(height, width\\) each"), ((1, 3, 8, 32, 32), [[33, 32]], "none larger"), ((1, 3, 8, 32, 32), [[32, 7]], "32 x 7"),
    ((1, 3, 8, 32, 32), [[32., 30.]], "whole pixels")])
def test_frames_that_do_not_fit(shape, sizes, says):
    with pytest.raises(ValueError, match=says): SlowFast(slowfast_small())(torch.zeros(shape), None if sizes is None else torch.tensor(sizes))


# ---- checkpoints

def on_paper(config):
    "A network without numbers."
    with torch.device("meta"): return SlowFast(config)


@pytest.mark.parametrize("house", list(release.HOUSES))
@pytest.mark.parametrize("make", [slowfast.slowfast_r50, slowfast.slowfast_r101, slowfast.slowfast_r152, slowfast.slowfast_r200, slowfast_small])
def test_every_weight_has_one_name_everywhere(make, house):
    ours = list(on_paper(make()).state_dict())
    names = release.backbone_names(ours, house)
    assert list(names) == ours and len(set(names.values())) == len(ours)


def test_golden_names_are_the_release_names():
    for case in ("small", "plain_fuse"):
        file = SHARED / f"slowfast_{case}.json"
        if not file.exists(): pytest.skip(f"{file} is not here (shared files are optional)")
        about = json.loads(file.read_text())
        net = on_paper(dataclasses.replace(release.slowfast_from_release("slowfast50", about["kwargs"]), depths=about["layers"]))
        state = release.release_state(net, parallel=False)
        assert {n: list(t.shape) for n, t in state.items()} == about["state_shapes"]


def test_names_and_shapes_of_pyslowfast():
    "As its documentation and logs print them for SLOWFAST_8x8_R50."
    net = on_paper(slowfast_r50())
    names = release.backbone_names(net.state_dict(), "PySlowFast")
    shapes = {theirs: list(net.state_dict()[n].shape) for n, theirs in names.items()}
    expected = {"s1.pathway0_stem.conv.weight": [64, 3, 1, 7, 7], "s1.pathway1_stem.conv.weight": [8, 3, 5, 7, 7], "s1.pathway1_stem.bn.running_mean": [8],
                "s1_fuse.conv_f2s.weight": [16, 8, 7, 1, 1], "s1_fuse.bn.weight": [16], "s4_fuse.bn.running_var": [256],
                "s2.pathway0_res0.branch1.weight": [256, 80, 1, 1, 1], "s2.pathway0_res0.branch1_bn.weight": [256], "s2.pathway0_res2.branch2.a.weight": [64, 256, 1, 1, 1],
                "s2.pathway0_res0.branch2.b.weight": [64, 64, 1, 3, 3], "s4.pathway0_res5.branch2.a.weight": [256, 1024, 3, 1, 1],
                "s5.pathway0_res0.branch2.c.weight": [2048, 512, 1, 1, 1], "s5.pathway0_res0.branch2.a_bn.running_var": [512], "s5.pathway1_res2.branch2.b.weight": [64, 64, 1, 3, 3]}
    assert {n: shapes.get(n) for n in expected} == expected
    assert sum(torch.Size(s).numel() for n, s in shapes.items() if not n.endswith(("mean", "var", "tracked"))) == 33_644_488      # its 34.57 M without the classifier's 2,304 x 400 + 400


def test_a_whole_model_goes_there_and_back():
    from actloc.acar.model import ACAR, ACARConfig
    for head, memory in (("relations", True), ("relations", False), ("linear", False)):
        config = ACARConfig(slowfast_small(norm="frozen"), num_classes=7, poses=3, head=head, reduced=16, hidden=8, depth=2, memory=memory)
        model, twin = ACAR(config), ACAR(config)
        state = release.release_state(model)
        assert all(n.startswith(("module.backbone.module.", "module.head.module.")) for n in state)
        loaded = release.load_release(twin, state)
        assert all(n.startswith("head.memory.") for n in loaded.kept) and bool(loaded.kept) == memory and not loaded.unused
        for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values()):
            if name not in loaded.kept: assert torch.equal(a, b), name


@pytest.mark.parametrize("case", ["hr2o_depth2", "hr2o_mlp_empty_clip", "linear"])
@needs("acar_linear.json")
def test_golden_head_names(case):
    theirs = json.loads((SHARED / f"acar_{case}.json").read_text())["state_shapes"]
    linear = case == "linear"
    inverse = {"conv_reduce": "context", "conv1": "pair", "conv2": "widen", "fc1": "actor", "fc2": "classifier", "fc": "classifier",
               "conv_q": "query", "conv_k": "key", "conv_v": "value", "conv": "output", "norm": "norm"}
    def back(name):
        *path, layer, what = name.split(".")
        return ".".join([p.replace("hr2o", "relations") for p in path] + [inverse[layer], what])
    assert [release.head_name(back(n), linear) for n in theirs] == list(theirs)


def test_fills_are_all_or_nothing_and_say_everything():
    net = SlowFast(slowfast_small())
    state = release.release_state(net, parallel=False)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    for t in state.values():
        if t.is_floating_point(): t.add_(1)
    wrong = dict(state, strange=torch.zeros(3))
    del wrong["fast_res1.0.conv2.weight"]
    wrong["slow_bn1.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error: release.load_backbone(net, wrong)
    text = str(error.value)
    assert "1 shape, 1 missing, 1 unexpected" in text and "unexpected: strange [3]" in text
    assert "missing: fast_res1.0.conv2.weight (here fast.stages.0.0.spatial.weight)" in text
    assert "shape: slow_bn1.bias [5] came, [16] is needed (here slow.stem.norm.bias)" in text
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    with pytest.raises(ValueError, match="and 6 more|and [0-9]+ more"): release.load_backbone(net, {})
    assert release.load_backbone(net, state).filled == len(before)
    assert all(torch.equal(t, before[n] + t.is_floating_point()) for n, t in net.state_dict().items())


def test_counters_may_be_absent_and_words_of_parallel_training_mean_nothing():
    net = SlowFast(slowfast_small())
    state = {n: t for n, t in release.release_state(net, parallel=False).items() if not n.endswith("num_batches_tracked")}
    for wrap in ("module.{}", "module.backbone.module.{}", "backbone.{}"):
        other = SlowFast(slowfast_small())
        assert release.load_backbone(other, {wrap.format(n): t for n, t in state.items()}).filled == len(state)
        assert torch.equal(other.fast.stem.weight, net.fast.stem.weight)
    with pytest.raises(ValueError, match="come twice"): release.load_backbone(net, state | {f"module.{n}": t for n, t in state.items()})
    with pytest.raises(ValueError, match="holds a dict"): release.load_backbone(net, state | {"optimizer": {}})


def test_half_precision_and_other_memory_formats_come_in():
    net, other = restless(SlowFast(slowfast_small())), SlowFast(slowfast_small())
    state = {n: t.half() if t.is_floating_point() else t for n, t in release.release_state(net).items()}
    release.load_backbone(other, state)
    assert other.slow.stem.weight.dtype == torch.float32
    close(other.slow.stem.weight, net.slow.stem.weight, 1e-3)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "a.pyth").write_bytes(b"\x80\x02}q\x01(U\x05blobsq\x02}")             # a Caffe2 pickle by another name
    (tmp_path / "b.pkl").write_bytes(b"(dp0\n")
    (tmp_path / "c.pth").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "d.pth")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "e.pth")
    for name, says in (("a.pyth", "Caffe2"), ("b.pkl", "Caffe2"), ("c.pth", "c.pth"), ("d.pth", "a list"), ("e.pth", "state_dict"), ("no.pth", "no such file")):
        with pytest.raises(ValueError, match=says): release.read_weights(tmp_path / name)
    torch.save({"slow_conv1.weight": torch.zeros(2)}, tmp_path / "bare.pkl")               # a torch file, whatever its name
    assert list(release.read_weights(tmp_path / "bare.pkl")) == ["slow_conv1.weight"]
