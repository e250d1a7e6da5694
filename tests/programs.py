"""Programs that tests run: Python, the `celery` command, and the driver."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from reliable.rabbitmq_node import clean_environment

PROJECT = Path(__file__).parent.parent
#: Where Python finds the shop and `apps`, the task modules of the tests.
PATHS = {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}


def python(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end in the project's folder, with these variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env=clean_environment(**PATHS | variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )


def start_python(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """Start Python in the project's folder, for a test that interferes with it."""
    return subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=PROJECT,
        env=clean_environment(**PATHS | variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def celery(url: str, *arguments: str, app: str = "tasks") -> "subprocess.CompletedProcess[str]":
    """Run the `celery` command to its end."""
    return python("-m", "celery", "-A", app, *arguments, CELERY_BROKER_URL=url)


def drive(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the driver to its end, as a user does."""
    return python("run_tasks.py", *arguments, **variables)


def outcomes(finished: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    """Return what `run_tasks.py --json` printed, by lesson."""
    lessons = [json.loads(line) for line in finished.stdout.splitlines()]
    return {lesson["lesson"]: lesson for lesson in lessons}


def what_is_wrong(finished: "subprocess.CompletedProcess[str]") -> str:
    """Check that a program ended with status 2 and two lines, what is wrong and a fix; return the first."""
    assert finished.returncode == 2, finished.stdout + finished.stderr
    what, fix = finished.stderr.splitlines()[-2:]
    assert fix.startswith("Fix: ")
    assert "secret" not in finished.stderr
    return what
