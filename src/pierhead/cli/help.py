"""How help pages are laid out: options in named sections, examples at the end, no noise about ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Option(click.Option):
    """An option that belongs to a section of the help page."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The range of a number is said when it is broken, not on the page."""
        record = super().get_help_record(ctx)
        limits = isinstance(self.type, (click.IntRange, click.FloatRange))
        if record is None or not limits:
            return record
        default = f"  [default: {self.default}]" if self.show_default else ""
        return record[0].replace(" RANGE", ""), (self.help or "") + default


class Verb(click.Command):
    """A command with sections of options and, at the end, examples: ``examples`` are (line, what it does)."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One list for each section, in the order in which sections first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        if "Options" in sections:
            sections["Options"] = sections.pop("Options")
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        write_examples(formatter, self.examples)


class Verbs(click.Group):
    """A group of such verbs."""

    command_class = Verb

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each verb with its whole first sentence, however narrow the terminal is."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, verb.get_short_help_str(1000)) for name, verb in found if verb and not verb.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        write_examples(formatter, self.examples)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """Each line to type, with what it does below it."""
    if not examples:
        return
    with formatter.section("Examples"):
        for line, meaning in examples:
            formatter.write(f"{' ' * formatter.current_indent}{line}\n")
            if meaning:
                formatter.write(f"{' ' * (formatter.current_indent + 4)}{meaning}\n")


def option(*names: str, section: str = "Options", **kwargs: Any) -> Callable[[F], F]:
    """``click.option`` in a section of the help page."""
    return click.option(*names, cls=Option, section=section, **kwargs)


json_option = option("--json", "as_json", is_flag=True, help="Print data for programs, as JSON.")
