"""``python -m pierhead.gateway --admin SOCK``: the gateway's process; its configuration comes as JSON on stdin."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
import uvloop

from pierhead.errors import ConfigError, PierError
from pierhead.gateway.server import Gateway, GatewayConfig

_MAX_CONFIG = 32 << 20


def _read_config(text: str | None) -> GatewayConfig:
    raw = sys.stdin.buffer.read(_MAX_CONFIG) if text is None else text.encode()
    try:
        return msgspec.json.decode(raw or b"{}", type=GatewayConfig)
    except msgspec.MsgspecError as exc:
        raise ConfigError(f"the gateway's configuration is not usable: {exc}") from exc


async def _serve(config: GatewayConfig, admin: Path) -> None:
    gateway = Gateway(config, admin)
    gateway.open()
    print(msgspec.json.encode({"listening": gateway.addresses}).decode(), flush=True)  # noqa: T201
    await gateway.run()


def main() -> int:
    """Run until drained; a PierError becomes one JSON line on stderr and its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pierhead.gateway")
    parser.add_argument("--admin", required=True, type=Path, help="path of the admin socket (the link to the daemon)")
    parser.add_argument("--config", help="the configuration as JSON, instead of on stdin")
    args = parser.parse_args()
    try:
        uvloop.run(_serve(_read_config(args.config), args.admin))
    except PierError as exc:
        print(msgspec.json.encode({"error": exc.to_dict()}).decode(), file=sys.stderr)  # noqa: T201
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
