"""The examples for clients in the documentation run as they stand, but for the port."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "how-to" / "clients.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # examples leave it to the end of the program
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_prints_an_answer(
    process_home: Installation, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(EXAMPLES[number].replace("127.0.0.1:12434", process_home.address), {})
    assert capsys.readouterr().out.strip()
