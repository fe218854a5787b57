"""The Python API: jobs by the commands' names, and an import that loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import audit


def test_jobs_are_functions_whatever_was_imported_before() -> None:
    from audit.scores.scan import ScanConfig
    from audit.verdicts.confirm import ConfirmConfig

    assert callable(audit.scan) and audit.scan.__name__ == "scan"
    assert callable(audit.confirm) and audit.ConfirmConfig is ConfirmConfig
    assert audit.ScanConfig is ScanConfig
    for name in audit.__all__:
        assert getattr(audit, name) is not None


@pytest.mark.processes
def test_commands_that_read_load_no_torch() -> None:
    code = "import sys, audit.cli.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
