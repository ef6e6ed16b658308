"""What a worker takes of sampling parameters, its sampler can follow: a token of the vocabulary comes out."""

import os
from random import Random

import pytest
import torch

from services.core.errors import BadRequest
from services.engine.device.sampler import sample_tokens
from services.engine.runner import Sample
from services.engine.submission import SequenceBounds
from services.wire.generated import worker_pb2
from tests.fuzz.messages import random_message
from tests.fuzz.test_worker import known

VOCAB = 50
BOUNDS = SequenceBounds(VOCAB, context_tokens_max=400)
EXAMPLES = 20 * int(os.environ.get("FUZZ_EXAMPLES") or 40)


def test_every_sampling_that_is_taken_gives_a_token() -> None:
    taken = 0
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 10
    for seed in range(EXAMPLES):
        random = Random(seed)
        values = known("127.0.0.1:1") | {
            "choice_ids": list(range(1000)),
            "allowed_token_ids": list(range(40)),
        }
        wire = random_message(worker_pb2.Sequence, random, values)
        try:
            submit = BOUNDS.submission(wire, "local")
        except BadRequest:
            continue
        taken += 1
        sample = Sample(submit.sampling, submit.prompt_ids, submit.output_ids, submit.choices[0])
        try:
            (token,) = sample_tokens(logits, [sample])
        except Exception:
            pytest.fail(f"seed {seed}: {submit.sampling}")
        assert 0 <= token < VOCAB, submit.sampling
    assert taken > EXAMPLES / 5, "hardly anything got through"
