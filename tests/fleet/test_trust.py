"""A start asks whether the model is trusted; what is refused is neither pinned nor started."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pierhead.errors import Untrusted

if TYPE_CHECKING:
    from tests.fleet.conftest import Yard

    from pierhead.store.model import ModelRecord


async def test_a_model_that_the_policy_refuses_does_not_start(yard: Yard) -> None:
    asked: list[str] = []

    def trusted(record: ModelRecord) -> None:
        asked.append(record.name)
        raise Untrusted("the policy does not allow it", hint="pier sign")

    fleet = await yard.open(trusted=trusted)
    with pytest.raises(Untrusted):
        await fleet.ensure_ready("a")
    assert asked == ["a"]
    assert yard.process.starts == 0
    assert yard.store.pinned() == {}
