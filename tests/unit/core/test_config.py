"""Configuration: the order of its sources, and errors that name the key, the source and the remedy."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from services.core.config import add_flags, given_flags, load_config
from services.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port, 100% yours"})
    ratio: float = field(default=0.5, metadata={"help": "a share"})
    quiet: bool = field(default=False, metadata={"help": "say less"})
    split: Literal["auto", "always"] = field(default="auto", metadata={"help": "when to split"})
    folder: Path | None = field(default=None, metadata={"help": "where to write"})
    limit: int | None = field(default=None, metadata={"help": "at most", "range": (0, 9)})


@dataclass(frozen=True, slots=True)
class NeedsName:
    name: str = field(metadata={"help": "who"})


def load(*arguments: str, file: Path | None = None, environ: dict[str, str] | None = None) -> ServiceConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser, ServiceConfig)
    flags = given_flags(ServiceConfig, parser.parse_args(arguments))
    return load_config(ServiceConfig, "service", file=file, environ=environ or {}, flags=flags)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_without_sources_the_defaults_hold() -> None:
    assert load() == ServiceConfig()


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", '[service]\nhost = "file"\nport = 1\nratio = 1\n')
    environ = {"DIPTYCH_SERVICE__PORT": "2", "DIPTYCH_SERVICE__RATIO": "2.5"}
    assert load("--ratio", "3.5", file=file, environ=environ) == ServiceConfig(host="file", port=2, ratio=3.5)


def test_every_type_is_read_from_text() -> None:
    config = load(
        "--port", "1", "--ratio", "2", "--quiet", "--split", "always", "--folder", "/x", "--limit", "3"
    )
    assert config == ServiceConfig("127.0.0.1", 1, 2.0, True, "always", Path("/x"), 3)


def test_every_type_is_read_from_toml(tmp_path: Path) -> None:
    text = '[service]\nport = 1\nratio = 2.0\nquiet = true\nsplit = "always"\nfolder = "/x"\nlimit = 3\n'
    config = load(file=write(tmp_path / "c.toml", text))
    assert config == ServiceConfig("127.0.0.1", 1, 2.0, True, "always", Path("/x"), 3)


def test_a_boolean_flag_can_switch_off_what_the_environment_switched_on() -> None:
    assert load(environ={"DIPTYCH_SERVICE__QUIET": "true"}).quiet
    assert not load("--no-quiet", environ={"DIPTYCH_SERVICE__QUIET": "1"}).quiet


def test_variables_that_kubernetes_makes_for_services_are_not_ours() -> None:
    environ = {"DIPTYCH_SERVICE_PORT": "tcp://10.0.0.1:80", "DIPTYCH_SERVICE_SERVICE_HOST": "10.0.0.1"}
    assert load(environ=environ) == ServiceConfig()


def test_a_file_may_hold_sections_of_other_services(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "[service]\nport = 1\n[other]\nanything = 2\n")
    assert load(file=file).port == 1


WRONG_FILES = {
    "unknown key": ("[service]\nprot = 1\n", ["'prot'", "[service]", "did you mean port"]),
    "text for an int": ('[service]\nport = "80"\n', ["port must be int", "'80'", "c.toml"]),
    "bool for an int": ("[service]\nport = true\n", ["port must be int", "True"]),
    "fraction for an int": ("[service]\nport = 1.5\n", ["port must be int", "1.5"]),
    "out of range": ("[service]\nlimit = 10\n", ["c.toml", "limit must be from 0 to 9, not 10"]),
    "unknown choice": ('[service]\nsplit = "never"\n', ["split must be auto or always", "'never'"]),
    "number for a path": ("[service]\nfolder = 1\n", ["folder must be path or null"]),
    "misspelt section": ("[servce]\nport = 1\n", ["[servce]", "did you mean [service]"]),
    "key outside a section": ("port = 1\n", ["'port'", "[service]"]),
    "not TOML": ("[service\n", ["not valid TOML", "c.toml"]),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_and_its_error_names_key_and_source(case: str, tmp_path: Path) -> None:
    text, parts = WRONG_FILES[case]
    with pytest.raises(ConfigError) as caught:
        load(file=write(tmp_path / "c.toml", text))
    assert [part for part in parts if part not in caught.value.message] == []


WRONG_ENVIRONMENTS = {
    "unknown key": ("DIPTYCH_SERVICE__PROT", "1", ["environment", "did you mean DIPTYCH_SERVICE__PORT"]),
    "nothing near": ("DIPTYCH_SERVICE__ZZZ", "1", ["DIPTYCH_SERVICE__ZZZ", "known: host, port"]),
    "wrong type": ("DIPTYCH_SERVICE__PORT", "tcp", ["DIPTYCH_SERVICE__PORT must be int, not 'tcp'"]),
    "wrong boolean": ("DIPTYCH_SERVICE__QUIET", "maybe", ["must be true or false, not 'maybe'"]),
    "empty number": ("DIPTYCH_SERVICE__PORT", "", ["must be int, not ''"]),
    "no number": ("DIPTYCH_SERVICE__RATIO", "nan", ["DIPTYCH_SERVICE__RATIO must be number, not 'nan'"]),
}


@pytest.mark.parametrize("case", WRONG_ENVIRONMENTS)
def test_a_wrong_variable_is_refused_and_named(case: str) -> None:
    variable, value, parts = WRONG_ENVIRONMENTS[case]
    with pytest.raises(ConfigError) as caught:
        load(environ={variable: value})
    assert [part for part in parts if part not in caught.value.message] == []


def test_a_wrong_flag_is_refused_and_named() -> None:
    with pytest.raises(ConfigError, match="command line: --port must be int, not 'x'"):
        load("--port", "x")
    with pytest.raises(ConfigError, match="command line: --split must be auto or always, not 'no'"):
        load("--split", "no")


def test_a_number_out_of_its_range_is_refused_and_its_limits_are_not() -> None:
    with pytest.raises(ConfigError, match="command line: --limit must be from 0 to 9, not -1"):
        load("--limit", "-1")
    assert [load("--limit", limit).limit for limit in ("0", "9")] == [0, 9]


def test_a_wrong_value_is_refused_even_when_a_stronger_source_overrides_it() -> None:
    with pytest.raises(ConfigError, match="DIPTYCH_SERVICE__PORT"):
        load("--port", "1", environ={"DIPTYCH_SERVICE__PORT": "x"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(file=tmp_path / "none.toml")


def test_a_required_field_that_nobody_gives_tells_the_ways_to_give_it() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(NeedsName, "service", environ={}, flags={})
    for way in ("--name", "DIPTYCH_SERVICE__NAME", "[service]"):
        assert way in caught.value.message


def test_help_shows_each_field_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ServiceConfig)
    text = " ".join(parser.format_help().split())
    assert "--port INT port, 100% yours (default: 8000)" in text
    assert "--split auto|always" in text
    assert "--quiet, --no-quiet say less" in text
    assert "--limit INT at most" in text


@dataclass(frozen=True, slots=True)
class Shared:
    ca: Path | None = field(default=None, metadata={"help": "a file"})
    token: str = field(default="", metadata={"help": "a secret", "secret": True})


def load_shared(*arguments: str, file: Path | None = None, **environ: str) -> Shared:
    parser = argparse.ArgumentParser()
    add_flags(parser, Shared, "cluster_")
    flags = given_flags(Shared, parser.parse_args(arguments), "cluster_")
    return load_config(Shared, "cluster", file=file, environ=environ, flags=flags, prefix="cluster_")


def test_a_shared_section_has_flags_of_its_own_name() -> None:
    assert load_shared("--cluster-ca", "/x") == Shared(ca=Path("/x"))


def test_a_secret_comes_from_environment_or_file_but_has_no_flag(tmp_path: Path) -> None:
    assert load_shared(DIPTYCH_CLUSTER__TOKEN="abc") == Shared(token="abc")
    file = write(tmp_path / "c.toml", '[cluster]\ntoken = "def"\n')
    assert load_shared(file=file) == Shared(token="def")
    with pytest.raises(SystemExit):
        load_shared("--cluster-token", "abc")


def test_a_secret_is_not_shown_in_errors(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "[cluster]\ntoken = 123456\n")
    with pytest.raises(ConfigError, match="token must be text") as raised:
        load_shared(file=file)
    assert "123456" not in str(raised.value)
