"""The libraries of the extra ``sign``, imported where they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from pierhead.errors import UsageError


@contextlib.contextmanager
def extra() -> Generator[None]:
    """Around imports of the extra's libraries: a missing one says how to install it."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"signatures need the library '{exc.name}', which is not installed",
            hint="pip install 'pierhead[sign]'",
        ) from exc
