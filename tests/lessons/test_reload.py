"""A worker that is restarted when its code changes."""

import os
from functools import partial
from pathlib import Path

from programs import PROJECT, python, start_python

from reliable.testing import until

WORK = '''from reliable import Celery

app = Celery("work", backend="rpc://")


@app.task(name="version")
def version() -> int:
    """Return which code this is."""
    return 1
'''


def answers(expected: str, **variables: str) -> bool:
    """Return whether a worker returns this version."""
    code = "import work; print(work.version.delay().get(timeout=10))"
    return python("-c", code, **variables).stdout == f"{expected}\n"


def test_a_worker_runs_the_code_that_was_saved_last(fresh: str, tmp_path: Path) -> None:
    # Given a worker under watchfiles, as in docs/operations.md
    (tmp_path / "work.py").write_text(WORK)
    variables = {"CELERY_BROKER_URL": fresh, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    command = "celery -A work worker --concurrency 1 --loglevel info"
    with start_python("-m", "watchfiles", "--filter", "python", command, str(tmp_path), **variables) as watch:
        try:
            until(partial(answers, "1", **variables), 60)
            # When the code changes, then the worker runs the new one
            (tmp_path / "work.py").write_text(WORK.replace("return 1", "return 2"))
            until(partial(answers, "2", **variables), 60)
        finally:
            watch.terminate()  # SIGINT may be ignored, under nohup
            watch.communicate(timeout=30)
