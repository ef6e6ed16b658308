"""Text as every part of a request takes it."""

from typing import Annotated

from pydantic import AfterValidator


def _unicode(text: str) -> str:
    """JSON can hold half of a surrogate pair, which no tokenizer, hash or wire can."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair; send valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
