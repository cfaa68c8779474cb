"""``python -m pierhead.daemon``: the control plane's process; ``pier serve`` is the same."""

from __future__ import annotations

import sys

from pierhead.daemon.main import main

if __name__ == "__main__":
    sys.exit(main())
