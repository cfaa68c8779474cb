"""Keys, signed models and what an attacker makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pierhead.store.index import Descriptor
from pierhead.store.media import MANIFEST
from pierhead.trust.keys import PrivateKey, generate


@pytest.fixture(scope="session")
def key() -> PrivateKey:
    return generate()


@pytest.fixture(scope="session")
def other_key() -> PrivateKey:
    return generate()


@pytest.fixture
def subject() -> Descriptor:
    """A model's manifest."""
    return Descriptor(MANIFEST, "sha256:" + "5" * 64, 500)


@pytest.fixture
def folder(tmp_path: Path, key: PrivateKey, other_key: PrivateKey) -> Path:
    """A configuration folder with the public keys."""
    made = tmp_path / "config"
    made.mkdir()
    (made / "team.pub").write_text(key.public.pem)
    (made / "other.pub").write_text(other_key.public.pem)
    return made
