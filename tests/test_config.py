"""Settings: layers, provenance and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pierhead.config import Settings, load
from pierhead.errors import ConfigError


def test_without_file_or_environment_the_defaults_hold(tmp_path: Path) -> None:
    loaded = load(tmp_path / "config.toml", env={})
    assert loaded.settings == Settings()
    assert not loaded.origins


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:1, [::1]:2", ("127.0.0.1:1", "[::1]:2")),
        ('["127.0.0.1:1", "[::1]:2"]', ("127.0.0.1:1", "[::1]:2")),
        ("[::1]:2", ("[::1]:2",)),
        ("[]", ()),
    ],
)
def test_a_list_in_the_environment_is_written_with_commas_or_as_json(
    tmp_path: Path, text: str, wanted: tuple[str, ...]
) -> None:
    loaded = load(tmp_path / "none.toml", env={"PIERHEAD_GATEWAY__LISTEN": text})
    assert loaded.settings.gateway.listen == wanted


def test_an_unknown_section_is_refused_even_when_it_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[gatway]\n")
    with pytest.raises(ConfigError, match="unknown section 'gatway'") as caught:
        load(file, env={})
    assert caught.value.hint == "Did you mean 'gateway'?"


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[fleet]\nkeep_alive = 1.0\nmax_restarts = 1\ndrain_timeout = 1.0\n[engine]\noptions = {a = 1}\n")
    env = {"PIERHEAD_FLEET__KEEP_ALIVE": "2", "PIERHEAD_FLEET__MAX_RESTARTS": "2", "UNRELATED__X": "y"}
    loaded = load(file, env=env, flags={"fleet.keep_alive": 3.0})
    assert (loaded.settings.fleet.keep_alive, loaded.settings.fleet.max_restarts) == (3.0, 2)
    assert loaded.settings.fleet.drain_timeout == 1.0
    assert loaded.settings.engine.options == {"a": 1}
    assert loaded.origins["fleet.keep_alive"] == "flag"
    assert loaded.origins["fleet.max_restarts"] == "environment PIERHEAD_FLEET__MAX_RESTARTS"
    assert loaded.origins["fleet.drain_timeout"] == str(file)


@pytest.mark.parametrize(
    ("name", "text", "section", "key", "value"),
    [
        ("PIERHEAD_GATEWAY__LISTEN", "127.0.0.1:1, [::1]:2", "gateway", "listen", ("127.0.0.1:1", "[::1]:2")),
        ("PIERHEAD_GATEWAY__REQUIRE_KEY", "true", "gateway", "require_key", True),
        ("PIERHEAD_GATEWAY__MAX_BODY", "1024", "gateway", "max_body", 1024),
        ("PIERHEAD_RUNTIME__MIRRORS", '{"docker.io": ["m:5000"]}', "runtime", "mirrors", {"docker.io": ("m:5000",)}),
        ("PIERHEAD_RUNTIME__DEFAULT", "docker", "runtime", "default", "docker"),
    ],
)
def test_a_variable_takes_the_type_of_its_setting(
    tmp_path: Path, name: str, text: str, section: str, key: str, value: object
) -> None:
    loaded = load(tmp_path / "none.toml", env={name: text})
    assert getattr(getattr(loaded.settings, section), key) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gatway]\nx = 1\n", ["unknown section 'gatway'", "gateway"]),
        ("[fleet]\nkeepalive = 1\n", ["unknown key in [fleet] 'keepalive'", "keep_alive"]),
        ('[fleet]\nkeep_alive = "soon"\n', ["bad value 'soon' for 'fleet.keep_alive'", "It must be a number."]),
        ('[fleet]\nshrink = "sometimes"\n', ["bad value 'sometimes'", "must be never, unasked or always."]),
        ("[gateway]\nlisten = 3\n", ["It must be a list."]),
        ('[gateway]\nrequire_key = "maybe"\n', ["It must be true or false."]),
        ("[fleet]\nmemory_budget = true\n", ["or as 3GiB."]),
        ("[fleet]\nreplicas = 65\n", ["a whole number from 1 to 64"]),
        ("[gateway]\ntraffic = { a = { polcy = 1 } }\n", ["polcy", "It must be a table."]),
        ("fleet = 3\n", ["'fleet' must be a table", "[fleet]"]),
        ("[fleet\n", ["cannot read the settings file"]),
    ],
)
def test_a_wrong_file_is_one_message_with_a_way_out(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    said = f"{caught.value.message} {caught.value.hint}"
    assert all(word in said for word in words)
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load(file, env={})
