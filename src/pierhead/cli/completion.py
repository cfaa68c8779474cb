"""Shell completion: the script of each shell, and the names of models to complete with."""

from __future__ import annotations

import click

from pierhead.errors import PierError, UsageError


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names in the store that start so."""
    from pierhead.cli.output import here
    from pierhead.store.layout import Store

    paths = here()
    if not (paths.store / "index.json").exists():
        return []
    try:
        return [n for r in Store(paths.store).models() for n in r.names if n.startswith(incomplete)]
    except PierError:
        return []


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: pier completion bash > ~/.local/share/bash-completion/completions/pier
    zsh:  pier completion zsh > "${fpath[1]}/_pier"
    fish: pier completion fish > ~/.config/fish/completions/pier.fish
    """
    from click.shell_completion import get_completion_class

    from pierhead.cli.main import cli

    found = get_completion_class(shell)
    if found is None:
        raise UsageError(f"no completion for {shell}")
    click.echo(found(cli, {}, "pier", "_PIER_COMPLETE").source())
