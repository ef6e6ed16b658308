"""What a gateway knows of its model's special tokens."""


def test_markers_are_special_tokens_or_text(served_model) -> None:
    special = served_model.tokenizer.backend.token_to_id("<filename>")
    assert served_model.special_ids(["<filename>", "<tool_call>"]) == {special}
    assert served_model.written("<filename>") == f"<[{special}]>"
    assert served_model.written("<tool_call>") == '"<tool_call>"'
