"""Folders of an installation."""

from __future__ import annotations

import os
from pathlib import Path

from pierhead.paths import resolve


def test_one_variable_moves_everything_below_one_folder(tmp_path: Path) -> None:
    paths = resolve({"PIERHEAD_HOME": str(tmp_path)})
    assert all(p.is_relative_to(tmp_path) for p in (paths.config, paths.state, paths.cache))


def test_the_xdg_folders_hold_without_it() -> None:
    paths = resolve({"HOME": "/h", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r", "XDG_CACHE_HOME": "/c"})
    assert (paths.config, paths.state) == (Path("/h/.config/pierhead"), Path("/s/pierhead"))
    assert (paths.cache, paths.runtime) == (Path("/c/pierhead"), Path("/r/pierhead"))


def test_every_socket_path_fits_a_unix_address_however_deep_the_home_is(tmp_path: Path) -> None:
    paths = resolve({"PIERHEAD_HOME": str(tmp_path / ("d" * 90))})
    longest = paths.replicas / ("x" * 20) / "s" / "engine.sock"
    assert len(os.fsencode(longest)) < 100


def test_two_deep_homes_do_not_share_a_runtime_folder(tmp_path: Path) -> None:
    one, two = (resolve({"PIERHEAD_HOME": str(tmp_path / (c * 90))}) for c in "ab")
    assert one.runtime != two.runtime
