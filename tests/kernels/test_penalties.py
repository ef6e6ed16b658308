import torch
from transformers import RepetitionPenaltyLogitsProcessor

from kernels.reference.penalties import forbid, penalize_output, penalize_repetition


def test_repetition_penalty_equals_that_of_transformers() -> None:
    logits, seen = torch.randn(50), torch.tensor([3, 3, 49, 0, 17])
    for penalty in (0.8, 1.0, 1.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())[0]
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_output_penalties_follow_the_counts() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, -4.0])
    penalized = penalize_output(logits, torch.tensor([3, 1, 3, 3]), frequency=0.25, presence=0.5)
    assert torch.allclose(penalized, torch.tensor([1.0, 2.0 - 0.75, 3.0, -4.0 - 1.25]))
    raised = penalize_output(logits, torch.tensor([0]), frequency=0.0, presence=-2.0)
    assert torch.allclose(raised, torch.tensor([3.0, 2.0, 3.0, -4.0]))


def test_forbidden_tokens_cannot_be_chosen_and_no_op_changes_its_input() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert forbid(logits, torch.tensor([2, 0])).tolist() == [-torch.inf, 2.0, -torch.inf]
    penalize_repetition(logits, torch.tensor([1]), 2.0)
    penalize_output(logits, torch.tensor([1]), 1.0, 1.0)
    assert logits.tolist() == [1.0, 2.0, 3.0]
