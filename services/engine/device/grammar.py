"""Answers that follow a grammar: which tokens may come next, and when nothing more may.

    SamplingParams.grammar ── compiled once ──► matcher at its beginning ── copied for each Sample ──► Guide

A Guide is where one choice's answer stands in its grammar. It reads `output_ids` and nothing else, so it is
the same on P and on D, after a resume, a preemption and a fork: what it has not read yet it catches up with.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from kernels import ops
from services.core.sampling import SamplingParams
from services.engine.runner import Sample
from services.model.grammar import STACK_BYTES, compile_grammar, reason

Words = NDArray[np.int32]  # [.., ceil(vocab / 32)]: bit t % 32 of word t // 32 is set if token t may come

_COMPILED_MAX = 32  # grammars that are kept: usually of less than 1 MB, never of more than about 100 MB


# Of one step, for grammars that are compiled anew in it. What would take longer fails instead: everybody's
# answers wait for a step.
RENEWALS_S_MAX = 0.05


class Compiled(NamedTuple):
    beginning: LLMatcher
    seconds: float


class Guide:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.read = 0  # tokens of the answer
        self.words: Words | None = None  # what may come next, once it was asked for

    def catch_up(self, output_ids: Sequence[int]) -> None:
        if self.read < len(output_ids):
            self.matcher.consume_tokens(list(output_ids[self.read :]))
            self.read, self.words = len(output_ids), None


class Grammars:
    """The grammars of one process."""

    def __init__(self, load_tokenizer: Callable[[], LLTokenizer], threads: int) -> None:
        """`load_tokenizer` is called in a thread when the first grammar comes."""
        self._load_tokenizer = load_tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._compiling: OrderedDict[str, Future[Compiled]] = OrderedDict()
        self._executor = LLExecutor(threads) if threads > 1 else None
        self._guides: WeakKeyDictionary[Sample, Guide] = WeakKeyDictionary()

    def prepare(self, grammar: str) -> bool:
        """Whether the grammar is compiled; if not, that has begun. Raises what the compilation raised."""
        compiling = self._compilation(grammar)
        if not compiling.done():
            return False
        compiling.result()
        return True

    def end_ids(self) -> list[int]:
        """The model's own ends, as far as grammars know them."""
        assert self._tokenizer is not None, "no grammar was compiled"
        return list(self._tokenizer.eos_tokens)

    def guides(self, samples: Sequence[Sample]) -> list[Guide]:
        """Where each answer stands, with what may come next. A matcher that cannot go on says why."""
        guides = [self._guide(sample) for sample in samples]
        self._compute_words(guides)
        spent_s, renewed = 0.0, set[str]()
        for place, sample in enumerate(samples):
            grammar = sample.params.grammar
            if not guides[place].matcher.is_error():
                continue
            if grammar not in renewed:
                spent_s += self._compilation(grammar).result().seconds
                if spent_s > RENEWALS_S_MAX:
                    break
                renewed.add(grammar)
                del self._compiling[grammar]
            guides[place] = self._renewed(sample)
        return guides

    def read(self, guide: Guide, token: int) -> bool:
        """Let `guide` read the token that was just sampled; whether only an end could follow it."""
        guide.matcher.consume_token(token)
        guide.read, guide.words = guide.read + 1, None
        if guide.matcher.is_error():
            return False  # the next step renews it, or says why not
        if guide.matcher.is_stopped() or not guide.matcher.is_accepting():
            return guide.matcher.is_stopped()
        self._compute_words([guide])
        assert guide.words is not None
        return not without(guide.words, self.end_ids()).any()

    def _guide(self, sample: Sample) -> Guide:
        guide = self._guides.get(sample)
        if guide is None:
            compiled = self._compilation(sample.params.grammar).result()
            guide = self._guides[sample] = Guide(compiled.beginning.deep_copy())
        guide.catch_up(sample.output_ids)
        return guide

    def _renewed(self, sample: Sample) -> Guide:
        """With a copy of the grammar as it is compiled now.

        Copies of a matcher share what they have explored of the grammar, and its limit: what one cannot do
        because of those before it, one of a grammar compiled anew still may."""
        del self._guides[sample]
        guide = self._guide(sample)
        self._compute_words([guide])
        return guide

    def _compute_words(self, guides: Sequence[Guide]) -> None:
        unknown = [guide for guide in guides if guide.words is None]
        if not unknown:
            return
        assert self._tokenizer is not None
        words = allocate_token_bitmask(len(unknown), self._tokenizer.vocab_size)
        if self._executor is not None and len(unknown) > 1:
            pairs = [(guide.matcher, row) for row, guide in enumerate(unknown)]
            fill_next_token_bitmask_par(self._executor, pairs, words)
        else:
            for row, guide in enumerate(unknown):
                fill_next_token_bitmask(guide.matcher, words, row)
        for guide, row_words in zip(unknown, words, strict=True):
            guide.words = row_words

    def _compilation(self, grammar: str) -> "Future[Compiled]":
        compiling = self._compiling.get(grammar)
        if compiling is None:
            compiling = self._compiling[grammar] = self._begin(grammar)
            for old in [text for text, other in self._compiling.items() if other.done()][:-_COMPILED_MAX]:
                del self._compiling[old]
        self._compiling.move_to_end(grammar)
        return compiling

    def _begin(self, grammar: str) -> "Future[Compiled]":
        usual = threading.stack_size(STACK_BYTES)  # of the thread that this may start
        try:
            return self._compiler.submit(self._compile, grammar)
        finally:
            threading.stack_size(usual)

    def _compile(self, grammar: str) -> Compiled:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        began_s = time.perf_counter()
        return Compiled(compile_grammar(self._tokenizer, grammar), time.perf_counter() - began_s)


class Guidance:
    """What grammars, and everything else that forbids tokens, do to the samples of one step:

    restrict(logits) -> a token for each -> follow(tokens)
    """

    def __init__(self, grammars: Grammars, samples: Sequence[Sample]) -> None:
        self._grammars, self._samples = grammars, samples
        self._rows = [row for row, sample in enumerate(samples) if sample.params.grammar]
        self._guides = grammars.guides([samples[row] for row in self._rows])
        self.failures: dict[
            int, str
        ] = {}  # rows that no token may follow, and why; their tokens mean nothing
        self.complete: set[int] = set()  # rows whose answer no token may follow

    def restrict(self, logits: Tensor) -> Tensor:
        """logits: float32 [rows, vocab] after all other changes, left as they are."""
        if self._rows:
            logits = self._follow_grammars(logits)
        limited = [row for row, sample in enumerate(self._samples) if _is_limited(sample.params)]
        if not limited:
            return logits
        best = logits[limited].amax(dim=-1).tolist()
        if barred := [row for row, top in zip(limited, best, strict=True) if top == -torch.inf]:
            for row in barred:
                self.failures.setdefault(row, "the request's parameters together forbid every token")
            logits = _zeroed(logits, barred)  # the kernels want something to choose
        return logits

    def _follow_grammars(self, logits: Tensor) -> Tensor:
        pairs = list(zip(self._rows, self._guides, strict=True))
        words = torch.from_numpy(np.stack([self._allowed(row, guide) for row, guide in pairs]))
        if self.complete:
            logits = _zeroed(logits, list(self.complete))
        if len(self._rows) == len(logits):
            return ops.allow(logits, words.to(logits.device))
        rows = torch.tensor(self._rows, device=logits.device)
        return logits.index_copy(0, rows, ops.allow(logits[rows], words.to(logits.device)))

    def _allowed(self, row: int, guide: Guide) -> Words:
        """The model's ends may come where the grammar is complete, unless they do not end this answer. Where
        nothing else may come they do, whatever forbade them."""
        assert guide.words is not None
        if guide.matcher.is_error():
            self.failures[row] = f"the answer cannot follow its grammar: {reason(guide.matcher)}"
            return np.full_like(guide.words, -1)
        ends = self._grammars.end_ids()
        if not without(guide.words, ends).any():
            self.complete.add(row)
            return guide.words
        no_ends = [end for end in ends if end not in self._samples[row].params.end_token_ids]
        return without(guide.words, no_ends) if no_ends else guide.words

    def follow(self, tokens: Sequence[int]) -> None:
        for row, guide in zip(self._rows, self._guides, strict=True):
            if row in self.failures:
                continue
            if self._grammars.read(guide, tokens[row]):
                self.complete.add(row)


def without(words: Words, tokens: Sequence[int]) -> Words:
    """A copy in which none of `tokens` may come."""
    words = words.copy()
    for token in tokens:
        words.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
    return words


def _zeroed(logits: Tensor, rows: list[int]) -> Tensor:
    return logits.index_fill(0, torch.tensor(rows, device=logits.device), 0.0)


def _is_limited(params: SamplingParams) -> bool:
    """Whether more than the grammar, which leaves something, may forbid tokens."""
    return bool(params.allowed_token_ids or params.bad_words or params.min_tokens)
