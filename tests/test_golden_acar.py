"""The heads against numbers that the published release computed (../shared/golden, acar_*)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from actloc.acar.actors import mean_over_time
from actloc.acar.heads import LinearHead, RelationHead
from actloc.acar.losses import action_loss, action_scores
from golden_weights import weight

GOLDEN = Path(__file__).parents[2] / "shared/golden"
CASES = ["acar_hr2o_depth2", "acar_hr2o_mlp_empty_clip", "acar_linear"]
OURS = {"conv_reduce": "context", "conv1": "pair", "conv2": "widen", "fc1": "actor", "fc2": "classifier", "fc": "classifier",
        "conv_q": "query", "conv_k": "key", "conv_v": "value", "conv": "output", "hr2o": "relations"}
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden values lie in ../shared, which is not beside this checkout")


def ours(name): return ".".join(OURS.get(part, part) for part in name.split("."))


def load(case):
    about, values = json.loads((GOLDEN / f"{case}.json").read_text()), np.load(GOLDEN / f"{case}.npz")
    names = {"width": "channels", "reduce_dim": "reduced", "hidden_dim": "hidden"}
    kwargs = {names.get(k, k): v for k, v in about["kwargs"].items()}
    head = RelationHead(**kwargs, relation_dropout=0.) if about["kind"] == "ACARHead" else LinearHead(**kwargs)
    head.load_state_dict({ours(name): torch.from_numpy(weight(name, shape)) for name, shape in about["state_shapes"].items()})
    features = mean_over_time(*(torch.from_numpy(values[f"features/{p}"]) for p in ("slow", "fast")))
    grid, shares = np.array(features.shape[2:]), np.array(about["sizes_before_padding"])
    sizes = torch.tensor(np.ceil(shares[:, ::-1] * grid - 1e-6).astype(int))
    rois = torch.from_numpy(values["rois"])
    clip = rois[:, 0].long()
    scale = torch.tensor(grid[::-1].copy()) / sizes[clip].flip(1)           # the published boxes are shares of the padded grid
    return head.eval(), features, sizes, (rois[:, 1:] * scale.repeat(1, 2)).float(), clip, values


@pytest.mark.parametrize("case", CASES)
def test_outputs(case):
    head, features, sizes, boxes, clip, values = load(case)
    with torch.no_grad(): logits = head(features, sizes, boxes, clip)
    np.testing.assert_allclose(logits, values["outputs"], atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["bce", "pose_softmax"])
def test_losses_and_gradients(case, kind):
    head, features, sizes, boxes, clip, values = load(case)
    poses = 13 if kind == "pose_softmax" else 0
    logits = head.train()(features, sizes, boxes, clip)
    loss = action_loss(logits, torch.from_numpy(values["targets"]), poses).total
    np.testing.assert_allclose(loss.item(), values[f"{kind}/loss"], rtol=1e-5)
    np.testing.assert_allclose(action_scores(logits, poses).detach(), values[f"{kind}/scores"], atol=2e-5)
    loss.backward()
    gradients = {ours(k.removeprefix(f"{kind}/grad/")): values[k] for k in values if k.startswith(f"{kind}/grad/")}
    assert set(gradients) == {name for name, _ in head.named_parameters()}
    for name, parameter in head.named_parameters():
        np.testing.assert_allclose(parameter.grad, gradients[name], atol=1e-4 * np.abs(gradients[name]).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES[:2])
def test_a_clip_alone(case):
    """Each clip without its neighbours gives what it gives among them."""
    head, features, sizes, boxes, clip, _ = load(case)
    with torch.no_grad():
        together = head(features, sizes, boxes, clip)
        for c, (h, w) in enumerate(sizes.tolist()):
            mine = clip == c
            alone = head(features[c:c + 1, :, :h, :w], None, boxes[mine], clip[mine] * 0)
            np.testing.assert_allclose(together[mine], alone, atol=1e-5)


def test_the_path_with_fewer_products_gives_the_same():
    """64 channels take Winograd's path; the definition is the same head in double precision, which takes torch's."""
    torch.manual_seed(0)
    head = RelationHead(40, 7, reduced=48, hidden=64, relation_dropout=0.)
    features, sizes = torch.randn(2, 40, 11, 14), torch.tensor([[11, 9], [10, 14]])
    boxes, clip = torch.rand(5, 4).sort(1).values[:, [0, 1, 2, 3]], torch.tensor([1, 0, 0, 1, 1])
    results = []
    for dtype in (torch.float32, torch.float64):
        model, x = head.to(dtype), features.to(dtype).requires_grad_()
        logits = model(x, sizes, boxes.to(dtype), clip)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), [x, *model.parameters()])))
    for one, two in zip(*results): assert (one - two).abs().max() < 2e-5 * two.abs().max() + 1e-7
