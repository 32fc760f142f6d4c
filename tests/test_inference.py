"""What is kept between calls was made with or without inference mode, and serves both."""
import torch

from actloc.acar.heads import RelationHead


def test_training_after_inference_mode_in_the_same_thread():
    torch.manual_seed(0)
    head = RelationHead(40, 7, reduced=48, hidden=80, relation_dropout=0.)
    features, boxes, clip = torch.randn(1, 40, 23, 31), torch.tensor([[.1, .1, .5, .9], [.4, .2, .9, .8]]), torch.tensor([0, 0])
    with torch.inference_mode(): before = head(features, None, boxes, clip)
    after = head(features, None, boxes, clip)
    after.square().sum().backward()
    assert (before - after).abs().max() < 1e-5 and all(p.grad is not None for p in head.parameters())
    with torch.inference_mode(): again = head(features, None, boxes, clip)
    assert torch.equal(before, again)
