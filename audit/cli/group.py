"""The click group: what a command raises becomes one line and an exit code."""

from __future__ import annotations

from typing import Any

import click
import pyarrow as pa

from audit.base.errors import AuditError, Broken, Damaged, Drained


class Commands(click.Group):
    """A click group whose commands turn our exceptions into exit codes: 2, 3, 75 and 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AuditError as error:
            self._end(ctx, str(error), 3 if isinstance(error, Damaged) else 2)
        except Broken as error:
            self._end(ctx, str(error), 3)
        except Drained:
            click.echo("Stopped: the shards in hand were dropped; the same command goes on from here.", err=True)
            ctx.exit(75)
        except BrokenPipeError:
            raise  # `| head` has seen enough: click ends quietly
        except (pa.ArrowException, EOFError, MemoryError, RecursionError) as error:  # a file or machine in no state
            self._end(ctx, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 2)
        except OSError as error:  # a full disk or a closed terminal while printing; files have their own lines
            self._end(ctx, str(error), 2)
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            self._end(ctx, f"{error}: too little memory, or too many processes", 2)
        except (KeyboardInterrupt, click.Abort):
            click.echo("Interrupted.", err=True)
            ctx.exit(130)

    @staticmethod
    def _end(ctx: click.Context, text: str, code: int) -> None:
        """Say an error, whatever is quoted in it cut to what a terminal shows, and exit."""
        lines = [line if len(line) <= 600 else f"{line[:400]} ... {line[-150:]}" for line in text.splitlines()]
        click.echo("Error: " + "\n".join(lines), err=True)
        ctx.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the work, not of the alphabet
