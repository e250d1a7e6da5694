"""Programs that tests run: Python, the `celery` command, and the driver."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from reliable.rabbitmq_node import Program, clean_environment, free_port

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


def declare_queues(url: str) -> None:
    """Declare the queues of the shop, as the first worker does."""
    python("-c", "import tasks; tasks.app.declare_topology_once()", CELERY_BROKER_URL=url).check_returncode()


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


class WebServer(Program):
    """A web server on a free port, with its log in a file.

    Args:
        folder: where the log goes, and where Python looks for modules first.
        arguments: of Python, in which `PORT` stands for the port.
        first_page: what answers once the server is ready.
        variables: for its environment.
    """

    def __init__(self, folder: Path, arguments: str, first_page: str = "", **variables: str) -> None:
        self.port, self.first_page = free_port(), first_page
        paths = os.pathsep.join([str(folder), PATHS["PYTHONPATH"]])
        environment = clean_environment(PYTHONPATH=paths, **variables)
        command = [sys.executable, *arguments.replace("PORT", str(self.port)).split()]
        super().__init__(command, folder / "server.log", envvars=environment, timeout=60)  # Seconds

    def get(self, path: object, data: bytes | None = None) -> str:
        """Return what a page answers, to a POST if there is data."""
        with urlopen(f"http://127.0.0.1:{self.port}/{path}", data, timeout=60) as answer:
            return str(answer.read().decode())

    def after_start_check(self) -> bool:
        """Return whether it answers."""
        try:
            return bool(self.get(self.first_page))
        except OSError:
            return False
