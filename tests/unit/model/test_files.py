import pytest

from services.core.errors import ModelFileError
from services.model.files import open_model


def test_a_path_that_does_not_exist_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent\.gguf does not exist.*diptych model pull"):
        open_model(tmp_path / "absent.gguf")


def test_an_empty_folder_and_an_empty_file_are_not_models(tmp_path):
    with pytest.raises(ModelFileError, match=r"config\.json is missing"):
        open_model(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFileError, match=r"empty\.gguf is not a GGUF file"):
        open_model(tmp_path / "empty.gguf")


def test_a_gguf_file_is_known_by_its_content_not_its_suffix(write_gguf):
    opened = open_model(write_gguf(name="weights.bin"))
    assert (opened.kind, opened.name, opened.weight_files) == ("gguf", "weights", [opened.path])
