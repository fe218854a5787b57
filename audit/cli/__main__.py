"""`python -m audit.cli` and the console script: the command, with Ctrl-C quiet from the first moment on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the be-audit command and exit with its code."""
    try:
        from audit.cli.commands import cli

        cli()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
