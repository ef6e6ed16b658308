"""The one model of a gateway, as far as a gateway needs it: no weights."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.gateway.text.chat import ChatReader
from services.gateway.text.detokenizer import TokenBytes
from services.gateway.text.tokenizing import Tokenizing
from services.model.chat_template import ChatTemplate
from services.model.files import ModelFiles
from services.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str  # what clients call it
    context_tokens_max: int  # that it was trained for
    tokenizer: Tokenizer
    token_bytes: TokenBytes
    tokenizing: Tokenizing
    chats: ChatReader

    @classmethod
    def of(
        cls,
        files: ModelFiles,
        served_name: str = "",
        chats: Callable[[ChatTemplate], ChatReader] = ChatReader.local,
    ) -> "ServedModel":
        """Raises ModelFileError for a tokenizer that cannot be streamed."""
        tokenizer = files.tokenizer()
        return cls(
            served_name or files.name,
            files.config.context_tokens_max,
            tokenizer,
            TokenBytes(tokenizer.backend),
            Tokenizing(tokenizer),
            chats(tokenizer.chat_template),
        )

    def special_ids(self, markers: Iterable[str]) -> frozenset[int]:
        """Those of `markers` that are special tokens, which are no text by themselves."""
        ids = map(self.tokenizer.backend.token_to_id, markers)
        return frozenset(token_id for token_id in ids if token_id in self.token_bytes.special_ids)

    def written(self, marker: str) -> str:
        """A marker as a term of a grammar (llguidance's Lark)."""
        special = self.special_ids([marker])
        return f"<[{min(special)}]>" if special else json.dumps(marker)
