"""Secrets are kept whole, for their owner only, and never told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pierhead.daemon.secrets import Secrets
from pierhead.errors import NotFound, PierError, UsageError


@pytest.fixture
def kept(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path / "secrets", {"OPENAI_API_KEY": "sk-from-the-environment"})


def test_a_secret_is_found_again_and_its_file_is_its_owners_only(kept: Secrets) -> None:
    kept.set("openai", "sk-1")
    assert kept.read("openai") == "sk-1"
    assert (kept.folder / "openai").stat().st_mode & 0o777 == 0o600
    assert kept.folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_read_is_taken_back(kept: Secrets) -> None:
    kept.folder.mkdir(mode=0o755)
    kept.set("openai", "sk-1")
    assert kept.folder.stat().st_mode & 0o777 == 0o700


def test_setting_it_again_leaves_one_file(kept: Secrets) -> None:
    kept.set("openai", "sk-1")
    kept.set("openai", "sk-2")
    assert kept.read("openai") == "sk-2"
    assert [p.name for p in kept.folder.iterdir()] == ["openai"]


def test_the_list_has_names_and_no_text(kept: Secrets) -> None:
    kept.set("b", "sk-text-b")
    kept.set("a", "sk-text-a")
    assert [info.name for info in kept.list()] == ["a", "b"]
    assert "sk-text" not in repr(kept.list())


def test_a_removed_secret_is_gone(kept: Secrets) -> None:
    kept.set("openai", "sk-1")
    kept.remove("openai")
    with pytest.raises(NotFound, match="no secret 'openai'"):
        kept.read("openai")
    with pytest.raises(NotFound) as caught:
        kept.remove("openai")
    assert "pier secret list" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", "-x", ".hidden", "x" * 101, "a\n"])
def test_a_name_never_leaves_the_folder(kept: Secrets, name: str) -> None:
    with pytest.raises(UsageError):
        kept.set(name, "sk-1")


@pytest.mark.parametrize("text", ["", "two words", "a\nb", "a\r\nx-evil: 1", "schlüssel", "\x00", "x" * 16385])
def test_what_no_header_can_carry_is_refused_without_being_shown(kept: Secrets, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        kept.set("openai", text)
    assert not text or text not in str(caught.value)
    assert not kept.list()


def test_references_lead_to_the_environment_and_to_mounted_files(kept: Secrets, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.write_text("sk-mounted\n")
    assert kept.read("env:OPENAI_API_KEY") == "sk-from-the-environment"
    assert kept.read(f"file:{mounted}") == "sk-mounted"


@pytest.mark.parametrize("reference", ["nothing", "env:NOTHING", "file:/does/not/exist", "file:/dev/null", "file:/"])
def test_a_reference_to_nothing_says_what_is_missing(kept: Secrets, reference: str) -> None:
    with pytest.raises(PierError) as caught:
        kept.read(reference)
    assert reference.partition(":")[2] in str(caught.value)
