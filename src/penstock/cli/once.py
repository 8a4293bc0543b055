"""Commands whose options cannot be given twice by mistake."""

from __future__ import annotations

from collections import Counter

import click


class OnceCommand(click.Command):
    """A command that refuses a second value for an option that takes one; click would silently use the last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line. Raise click.UsageError for an option that is given twice."""
        if not ctx.resilient_parsing:
            self._check_repetition(ctx, args)
        return super().parse_args(ctx, args)

    def _check_repetition(self, ctx: click.Context, args: list[str]) -> None:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        given = Counter(option for option in order if isinstance(option, click.Option))
        for option, count in given.items():
            if count > 1 and not option.multiple and not option.count and not option.is_flag:
                name = max(option.opts, key=len)
                raise click.UsageError(f"{name} is given {count} times; it takes one value", ctx)


class OnceGroup(click.Group):
    """A group of such commands."""

    command_class = OnceCommand
