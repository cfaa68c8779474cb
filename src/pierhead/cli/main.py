"""The `pier` command: finds the verb, imports only its module, and turns every failure into one message."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from pierhead import __version__
from pierhead.cli.help import write_examples
from pierhead.errors import AccessDenied, OutOfSpace, PierError, UsageError

# Section → verb → (where it is, what it does). Help needs no import of any verb.
VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "Run": {
        "run": ("pierhead.cli.run:run", "Ask a model once, or chat with it."),
        "dev": ("pierhead.cli.dev:dev", "Serve a model from its folder, anew at each save."),
        "ps": ("pierhead.cli.operate:ps", "Show what runs."),
        "logs": ("pierhead.cli.operate:logs", "Print the log of an engine, the gateway or the daemon."),
        "stats": ("pierhead.cli.operate:stats", "Watch memory, CPU and processes of what runs."),
        "stop": ("pierhead.cli.operate:stop", "Stop models, gracefully."),
        "settings": (
            "pierhead.cli.settings:settings",
            "Show and change a model's settings, and where each comes from.",
        ),
        "lora": ("pierhead.cli.lora:lora", "Give a model LoRA adapters that requests choose by name."),
        "bench": ("pierhead.cli.bench:bench", "Measure how fast a model answers under load."),
    },
    "Models": {
        "pull": ("pierhead.cli.models:pull", "Fetch a model into the store."),
        "adopt": ("pierhead.cli.adopt:adopt", "Take over models of Ollama or Docker Model Runner."),
        "package": ("pierhead.cli.package:package", "Make a model out of files, a folder or another model."),
        "quantize": ("pierhead.cli.convert:quantize", "Make a smaller model out of a GGUF model."),
        "convert": ("pierhead.cli.convert:convert", "Make GGUF or ONNX out of safetensors."),
        "list": ("pierhead.cli.listing:list_models", "List the models in the store."),
        "push": ("pierhead.cli.registry:push", "Send a model to a registry."),
        "login": ("pierhead.cli.registry:login", "Keep a login for a registry."),
        "logout": ("pierhead.cli.registry:logout", "Forget the login for a registry."),
        "inspect": ("pierhead.cli.inspect:inspect", "Show what a model is and what memory it needs."),
        "tag": ("pierhead.cli.versions:tag", "Give a model a name, or move one."),
        "diff": ("pierhead.cli.diff:diff", "Show what differs between two models."),
        "history": ("pierhead.cli.versions:history", "Show where a name pointed, and when."),
        "export": ("pierhead.cli.archive:export", "Write models into one archive."),
        "import": ("pierhead.cli.archive:import_", "Bring the models of an archive into the store."),
        "rm": ("pierhead.cli.models:rm", "Remove models from the store."),
        "df": ("pierhead.cli.space:df", "Show where the disk space goes."),
        "fsck": ("pierhead.cli.space:fsck", "Check that all models in the store are whole."),
        "prune": ("pierhead.cli.space:prune", "Remove what no name needs."),
    },
    "Trust": {
        "sign": ("pierhead.cli.signing:sign", "Sign a model, or make a key to sign with."),
        "verify": ("pierhead.cli.signing:verify", "Check that a model is signed by who you say."),
        "attest": ("pierhead.cli.attest:attest", "Attach what a model is made of and where it came from."),
        "referrers": (
            "pierhead.cli.signing:referrers",
            "List what is attached to a model: signatures, SBOMs.",
        ),
        "scan": ("pierhead.cli.scan:scan", "Say whether a model's files would run code."),
    },
    "Operate": {
        "serve": ("pierhead.cli.serve:serve", "Run the daemon and its gateway in the foreground."),
        "status": ("pierhead.cli.operate:status", "Show the state of daemon, gateway and settings."),
        "key": ("pierhead.cli.key:key", "Create, list, limit, rotate and revoke API keys."),
        "route": ("pierhead.cli.route:route", "Split names among models, with fallbacks and mirrors."),
        "secret": ("pierhead.cli.secret:secret", "Keep providers' keys for the gateway."),
        "requests": ("pierhead.cli.requests:requests", "Look at recorded requests."),
        "replay": ("pierhead.cli.replay:replay", "Send recorded requests to another model and compare."),
        "usage": ("pierhead.cli.usage:usage", "Show who used how much."),
        "prices": ("pierhead.cli.prices:prices", "Show what models cost."),
        "service": ("pierhead.cli.service:service", "Start Pierhead with the machine (systemd)."),
    },
    "Setup": {
        "engine": ("pierhead.cli.engine:engine", "Show engines, install their packages, check templates."),
        "doctor": ("pierhead.cli.doctor:doctor", "Say what this machine can do, and what to install for more."),
        "completion": ("pierhead.cli.completion:completion", "Print the completion script of a shell."),
        "version": ("pierhead.cli.operate:version", "Print the versions of command and daemon."),
    },
}
_FLAT = {name: found for section in VERBS.values() for name, found in section.items()}
_EXAMPLES = (
    ('pier run smollm2 "Say hello."', "Pull it if need be, start it, answer."),
    ("pier run smollm2", "Open a chat."),
    ("pier inspect hf:Qwen/Qwen3-0.6B-GGUF:Q8_0", "Look at a model before pulling it."),
    ("pier serve", "Serve every pulled model, OpenAI-compatible, at http://127.0.0.1:12434/v1."),
)
_HIDDEN = {"ls": "list", "images": "list", "remove": "rm", "cp": "tag", "show": "inspect"}
_MEANT = {  # words of other tools, and what they are here
    **dict.fromkeys(("create", "build"), "`pier package` makes a model."),
    **dict.fromkeys(
        ("load", "start", "chat"), "`pier run MODEL` loads a model and talks to it; `pier serve` serves all."
    ),
    **dict.fromkeys(("unload", "kill"), "`pier stop MODEL` unloads a model."),
    "search": "Look at https://huggingface.co/models?library=gguf, then `pier pull hf:ORG/REPO`.",
}


class Root(click.Group):
    """A group whose verbs are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_FLAT)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = _FLAT.get(_HIDDEN.get(cmd_name, cmd_name))
        if found is None:
            return None
        module, _, name = found[0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in _FLAT and args[0] not in _HIDDEN:
            import difflib

            close = difflib.get_close_matches(args[0], _FLAT, 1, 0.7)
            hint = f"Did you mean `pier {close[0]}`?" if close else "`pier --help` lists what there is."
            hint = _MEANT.get(args[0], hint)
            raise UsageError(f"there is no command '{args[0][:60]}'", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, verbs in VERBS.items():
            with formatter.section(section):
                formatter.write_dl([(name, text) for name, (_, text) in verbs.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, _EXAMPLES)
        formatter.write_paragraph()
        formatter.write_text("`pier VERB --help` explains each verb. --json prints data for programs.")


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="pier")
def cli() -> None:
    """Run, serve and manage generative models, in a sandbox or a container."""


def fail(error: PierError, as_json: bool) -> int:
    """Print one error, for a person on stderr or for a program on stdout; its exit status."""
    from pierhead.cli.output import print_error

    print_error(error, as_json)
    return error.exit_code


def entry(argv: list[str] | None = None) -> None:
    """What the ``pier`` script calls; exits with the verb's status."""
    args = sys.argv[1:] if argv is None else argv
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    as_json = "--json" in args
    try:
        code: Any = cli.main(args, prog_name="pier", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=False)
        code = 0 if not args else 2
    except click.ClickException as exc:
        code = fail(UsageError(exc.format_message(), hint=_usage_hint(exc)), as_json)
    except click.exceptions.Exit as exc:
        code = exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(_stopped(args), err=True)
        code = 130
    except PierError as exc:
        code = fail(exc, as_json)
    except BrokenPipeError:
        code = _quiet()
    except OSError as exc:
        code = fail(_from_system(exc), as_json)
    sys.exit(_flushed(code if isinstance(code, int) else 0))


def _stopped(args: list[str]) -> str:
    """After Ctrl-C: whether the work was in vain."""
    going_on = args[:1] in (["pull"], ["push"])
    return "\nStopped. The same command goes on where this one was." if going_on else ""


def _quiet() -> int:
    """The reader left: say no more, and let the interpreter's last flush find somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + 13


def _flushed(code: int) -> int:
    """What is still buffered goes out while its failure can be told."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _quiet()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return fail(_from_system(exc), False)
    return code


def _from_system(exc: OSError) -> PierError:
    """A failure of the system that no room had a better word for."""
    what = f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror or exc)
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(f"cannot write: {what}", hint="`pier prune --all` frees what nothing needs.")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"no permission: {what}", hint="`pier doctor` shows the folders that pier uses.")
    return PierError(f"the system refused: {what}", hint="`pier doctor` looks at this machine.")


def _usage_hint(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    path = context.command_path if isinstance(context, click.Context) else "pier"
    return f"`{path} --help` shows how."


if __name__ == "__main__":
    entry()
