"""What the control API offers, by subject: every path with its handler, its shapes and its words; handles nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pierhead.daemon import wire
from pierhead.daemon.keys import KeyInfo, NewKey
from pierhead.daemon.openapi import Operation, Parameter
from pierhead.daemon.prices import PriceInfo
from pierhead.daemon.routefile import RouteTable
from pierhead.daemon.usage import UsageReport
from pierhead.events import AnyEvent
from pierhead.fleet.info import ReplicaInfo
from pierhead.gateway.grants import Wanted
from pierhead.store.model import ModelRecord, Removed

if TYPE_CHECKING:
    from pierhead.daemon.control import Control

_TAIL = Parameter("tail", "integer", "Only this many of the last lines.")
_FOLLOW = Parameter("follow", "boolean", "Go on with new lines until the engine ends.")
_INTERVAL = Parameter("interval", "number", "Seconds between readings (default 1).")
_ONCE = Parameter("once", "boolean", "One reading, then end.")
_TIMEOUT = Parameter("timeout", "number", "Seconds that running requests get to finish (default: the setting).")
_START = (
    "Answers NDJSON events; the last line is `ready` or `failed`. Starting what runs already answers at once; "
    "settings that differ restart it, another number of replicas adds or drains some. Leaving does not stop a "
    "start that others wait for."
)


def operations(c: Control) -> tuple[Operation, ...]:
    """Every operation; more specific paths come first."""
    return (*_host(c), *_models(c), *_replicas(c), *_keys(c), *_routes(c), *_usage(c))


def _host(c: Control) -> tuple[Operation, ...]:
    """The daemon itself."""
    return (
        Operation("GET", "/api/v1/version", c.version, "Who answers.", wire.VersionInfo),
        Operation("GET", "/api/v1/status", c.status, "The state of this host, with all settings.", wire.StatusInfo),
        Operation(
            "POST", "/api/v1/shutdown", c.shutdown, "End the daemon.", wire.Accepted, wire.ShutdownRequest, status=202
        ),
    )


def _models(c: Control) -> tuple[Operation, ...]:
    """What is in the store."""
    return (
        Operation("GET", "/api/v1/models", c.models, "The models in the store.", list[ModelRecord]),
        Operation(
            "POST",
            "/api/v1/models/pull",
            c.pull,
            "Fetch a model.",
            AnyEvent,
            wire.PullRequest,
            "Answers NDJSON events; the last line is `pull_done` or `failed`. Leaving ends the pull, which goes on "
            "where it stopped when it is asked for again.",
            stream=True,
        ),
        Operation(
            "POST", "/api/v1/models/copy", c.copy_model, "Give a model one more name.", ModelRecord, wire.CopyRequest
        ),
        Operation(
            "GET",
            "/api/v1/settings/{name:path}",
            c.settings,
            "The settings of a model, with where each comes from; `*`: those for all models.",
            wire.ModelSettings,
            query=(Parameter("all", "boolean", "Also what its engine does where nobody says anything."),),
        ),
        Operation(
            "PATCH",
            "/api/v1/settings/{name:path}",
            c.change_settings,
            "Change settings in models.toml, for the next start.",
            wire.ModelSettings,
            wire.SettingsChange,
        ),
        Operation("GET", "/api/v1/models/{name:path}", c.model, "One model by name or digest.", ModelRecord),
        Operation("DELETE", "/api/v1/models/{name:path}", c.remove_model, "Remove a model's name.", Removed),
    )


def _replicas(c: Control) -> tuple[Operation, ...]:
    """What runs."""
    return (
        Operation("GET", "/api/v1/replicas", c.replicas, "What runs, comes, or has failed.", list[ReplicaInfo]),
        Operation(
            "POST",
            "/api/v1/replicas",
            c.start,
            "Start a model.",
            AnyEvent,
            wire.StartRequest,
            _START,
            stream=True,
        ),
        Operation(
            "GET",
            "/api/v1/replicas/stats",
            c.stats,
            "Readings of memory and processor use.",
            wire.StatsLine,
            stream=True,
            query=(_INTERVAL, _ONCE),
        ),
        Operation(
            "GET",
            "/api/v1/replicas/{name:path}/logs",
            c.logs,
            "The engine's log, by replica id or model.",
            text=True,
            query=(_TAIL, _FOLLOW),
        ),
        Operation(
            "DELETE",
            "/api/v1/replicas/{name:path}",
            c.stop,
            "Drain and stop, by replica id or model.",
            wire.Stopped,
            description="One that is named by its id is not replaced: its model keeps one less.",
            query=(_TIMEOUT,),
        ),
    )


def _keys(c: Control) -> tuple[Operation, ...]:
    """Who may use the gateway."""
    return (
        Operation("GET", "/api/v1/keys", c.keys, "The keys that hold; never their text.", list[KeyInfo]),
        Operation(
            "POST",
            "/api/v1/keys",
            c.create_key,
            "Make a key; its text is in this answer only.",
            NewKey,
            wire.KeyRequest,
            status=201,
        ),
        Operation(
            "POST",
            "/api/v1/keys/{name:path}/rotate",
            c.rotate_key,
            "Give a key a new text, by id or name.",
            NewKey,
            wire.RotateRequest,
        ),
        Operation("GET", "/api/v1/keys/{name:path}", c.key, "One key, by id or name.", KeyInfo),
        Operation("PATCH", "/api/v1/keys/{name:path}", c.edit_key, "Change what a key may do.", KeyInfo, Wanted),
        Operation("DELETE", "/api/v1/keys/{name:path}", c.revoke_key, "End a key, by id or name.", KeyInfo),
    )


def _routes(c: Control) -> tuple[Operation, ...]:
    """Which names lead where."""
    return (
        Operation("GET", "/api/v1/routes", c.routes, "Every name that clients may send.", wire.RouteList),
        Operation(
            "POST",
            "/api/v1/routes/check",
            c.check_routes,
            "What a routes.toml with this text would offer.",
            wire.RouteList,
            wire.RouteText,
        ),
        Operation("GET", "/api/v1/routes/{name:path}", c.route, "One route by name.", wire.RouteInfo),
        Operation(
            "PUT",
            "/api/v1/routes/{name:path}",
            c.set_route,
            "Write a configured route into routes.toml.",
            wire.RouteInfo,
            RouteTable,
        ),
        Operation(
            "DELETE",
            "/api/v1/routes/{name:path}",
            c.remove_route,
            "Take a configured route out of routes.toml.",
            wire.RouteList,
        ),
    )


def _usage(c: Control) -> tuple[Operation, ...]:
    """Who used how much, and what it costs."""
    return (
        Operation(
            "GET",
            "/api/v1/usage",
            c.usage,
            "Who used how much.",
            UsageReport,
            description="Sums of requests, tokens, cost and time; what has just been answered is in them.",
            query=(
                Parameter(
                    "by", "string", "Any of day, key, model, revision, operation, with commas (default key,model)."
                ),
                Parameter("since", "string", "The first day: 2026-11-01, or 7d for the last seven days."),
                Parameter("key", "string", "Of this key only, by id or name."),
                Parameter("model", "string", "Of this model only."),
            ),
        ),
        Operation(
            "GET",
            "/api/v1/prices",
            c.prices,
            "What models cost; the user's file is read again.",
            list[PriceInfo],
        ),
    )
