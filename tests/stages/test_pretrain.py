import torch
import torch.nn.functional as F

from minimind.stages.pretrain import next_token_loss


def test_the_shift_is_inside():
    logits, labels = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    by_hand = [-logits[b, t].log_softmax(-1)[labels[b, t + 1]] for b in range(3) for t in range(6)]
    torch.testing.assert_close(next_token_loss(logits, labels), torch.stack(by_hand).mean())
    unshifted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert abs(next_token_loss(logits, labels) - unshifted) > 1e-3


def test_ignored_labels_do_not_count():
    logits, labels = torch.randn(2, 9, 5), torch.randint(5, (2, 9))
    labels[0, :6] = labels[1, 3:] = -100
    kept = [
        -logits[b, t - 1].log_softmax(-1)[labels[b, t]]
        for b, t in [(0, 6), (0, 7), (0, 8), (1, 1), (1, 2)]
    ]
    torch.testing.assert_close(next_token_loss(logits, labels), torch.stack(kept).mean())


def test_nothing_to_learn_is_zero_with_a_gradient():
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss = next_token_loss(logits, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(2, 50, 100).to(torch.bfloat16)
    labels = torch.randint(100, (2, 50))
    torch.testing.assert_close(
        next_token_loss(logits, labels), next_token_loss(logits.float(), labels)
    )
