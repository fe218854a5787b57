"""`python -m audit.cli` and the console script: the command, with Ctrl-C quiet from the first moment on."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from audit.base.garbage import look_seldom


def main() -> None:
    """Run the be-audit command and exit with its code."""
    look_seldom()
    _open_standard_streams()
    try:
        from audit.cli.commands import cli
    except MemoryError:  # the interpreter has none to end in order, either
        os.write(2, b"Error: be-audit cannot start: MemoryError: be-audit needs about 4 GB of address space\n")
        os._exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ImportError, OSError, SystemError) as error:
        _cannot_start(error)
    try:
        cli()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ImportError, MemoryError, OSError, SystemError) as error:  # no memory for a library, or a broken install
        _cannot_start(error)


def _cannot_start(error: BaseException) -> NoReturn:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    sys.stderr.write(f"Error: be-audit cannot start: {first}: be-audit needs about 4 GB of address space\n")
    sys.exit(2)


def _open_standard_streams() -> None:
    """Give a closed stdin, stdout or stderr a null device, or the next file opened would get their lines."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115


if __name__ == "__main__":
    main()
