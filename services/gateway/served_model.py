"""The one model of a gateway, as far as a gateway needs it: no weights."""

from dataclasses import dataclass

from services.gateway.text.detokenizer import TokenBytes
from services.model.files import ModelFiles
from services.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str  # what clients call it
    context_tokens_max: int  # that it was trained for
    tokenizer: Tokenizer
    token_bytes: TokenBytes

    @classmethod
    def of(cls, files: ModelFiles, served_name: str = "") -> "ServedModel":
        """Raises ModelFileError for a tokenizer that cannot be streamed."""
        tokenizer = files.tokenizer()
        return cls(
            served_name or files.name,
            files.config.context_tokens_max,
            tokenizer,
            TokenBytes(tokenizer.backend),
        )
