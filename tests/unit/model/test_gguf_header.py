import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from services.core.errors import ModelFileError
from services.model.gguf_header import read_header


def test_metadata_and_tensors_are_those_that_gguf_reader_finds(default_model):
    reference = gguf.GGUFReader(default_model)
    header = read_header(default_model)
    expected = {
        key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")
    }
    assert dict(header.metadata) == expected
    assert {name: (t.shape, t.type, t.offset, t.size) for name, t in header.tensors.items()} == {
        t.name: (tuple(t.shape), t.tensor_type, t.data_offset, t.n_bytes) for t in reference.tensors
    }


def test_every_kind_of_value_survives(write_gguf):
    values = {"x.text": "héllo ☃", "x.flag": True, "x.list": ["a", ""], "x.numbers": [1, -2], "x.real": 0.5}
    metadata = read_header(write_gguf(values)).metadata
    assert {key: metadata[key] for key in values} == values


def test_a_tensor_is_found_where_its_bytes_lie(write_gguf):
    written = np.arange(8, dtype=np.float32)
    path = write_gguf({"general.alignment": 64}, {"output_norm.weight": written})
    tensor = read_header(path).tensors["output_norm.weight"]
    assert tensor.offset % 64 == 0
    assert path.read_bytes()[tensor.offset : tensor.offset + tensor.size] == written.tobytes()


def test_a_file_cut_anywhere_is_refused_with_its_name_and_the_remedy(write_gguf, tmp_path):
    whole = write_gguf().read_bytes()
    cut = tmp_path / "cut.gguf"
    last_tensor_end = max(t.offset + t.size for t in read_header(tmp_path / "tiny.gguf").tensors.values())
    for size in range(0, last_tensor_end, 7):
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileError) as caught:
            read_header(cut)
        assert str(cut) in caught.value.message
        assert size < 4 or "diptych model pull" in caught.value.message


def test_a_length_that_lies_never_raises_anything_but_a_model_file_error(write_gguf, tmp_path):
    whole = write_gguf().read_bytes()
    for offset in range(8, 120):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(whole[:offset] + struct.pack("<Q", 2**63 + 5) + whole[offset + 8 :])
        with contextlib.suppress(
            ModelFileError
        ):  # in a value that nobody checks the number is as good as another
            read_header(broken)


def test_another_version_and_another_format_are_named(write_gguf, tmp_path):
    old = tmp_path / "old.gguf"
    old.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelFileError, match=r"old\.gguf has GGUF version 1"):
        read_header(old)
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ModelFileError, match=r"model\.bin is not a GGUF file"):
        read_header(other)
    with pytest.raises(ModelFileError, match=r"absent\.gguf cannot be read"):
        read_header(Path("absent.gguf"))
