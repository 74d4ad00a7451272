"""The scripts of examples/existing_projects: the loss rises on what is forgotten, by more than on the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples/existing_projects").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_forgets(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # a thread of a progress bar
    lines = re.findall(r"^(?:before|after): loss on the \w+ to forget (\S+), on the others (\S+)", done.stdout, re.M)
    (forget, retain), (forget_after, retain_after) = (map(float, line) for line in lines)
    rise, harm = forget_after / forget - 1, retain_after / retain - 1
    # Fine-tuning on the other series alone raises the loss on the first script's by 5.5 %.
    assert rise > 0.07 and harm < 0.3 * rise
