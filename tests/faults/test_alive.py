"""The file that a worker touches while it consumes, as a health check looks at it."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from programs import PATHS, celery, python

from reliable.rabbitmq_node import Node
from reliable.testing import Worker, until

#: The file is touched every 5 seconds. It is fresh if it is younger than this, in seconds.
FRESH = 10
pytestmark = pytest.mark.timeout(300)  # seconds


def is_fresh(file: Path) -> bool:
    """Return whether a health check would pass."""
    return file.exists() and time.time() - file.stat().st_mtime < FRESH


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """Suspend a process and its children."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def start_worker(url: str, folder: Path, *arguments: str) -> Worker:
    """Prepare a worker that notices in four seconds that RabbitMQ does not answer."""
    options = ("-c2", "broker_heartbeat=2")
    return Worker("tasks", url, folder, *options, *arguments, **PATHS)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_the_file_is_fresh_while_the_worker_consumes(node: Node, tmp_path: Path, pool: str) -> None:
    with start_worker(node.url, tmp_path, "-P", pool) as worker:
        file = worker.alive
        until(lambda: is_fresh(file))
        first = file.stat().st_mtime
        until(lambda: file.stat().st_mtime > first)  # It is touched again and again

        node.kill(sig=signal.SIGKILL)
        until(lambda: not is_fresh(file))
        node.start()
        until(lambda: is_fresh(file), 60)
        assert worker.running()


def test_the_file_grows_old_while_rabbitmq_is_frozen(node: Node, tmp_path: Path) -> None:
    with start_worker(node.url, tmp_path) as worker:
        file = worker.alive
        until(lambda: is_fresh(file))
        with suspended(node.process.pid):
            until(lambda: not is_fresh(file), 60)
        until(lambda: is_fresh(file), 60)


def test_the_file_grows_old_while_the_main_process_hangs(fresh: str, tmp_path: Path) -> None:
    with start_worker(fresh, tmp_path) as worker:
        file = worker.alive
        until(lambda: is_fresh(file))
        with suspended(worker.process.pid):
            until(lambda: not is_fresh(file))
        until(lambda: is_fresh(file))


def test_the_file_grows_old_while_there_is_no_queue_to_consume_from(fresh: str, tmp_path: Path) -> None:
    with start_worker(fresh, tmp_path, "-Q", "default") as worker:
        file = worker.alive
        until(lambda: is_fresh(file))
        assert celery(fresh, "control", "cancel_consumer", "default").returncode == 0
        until(lambda: not is_fresh(file))
        assert celery(fresh, "control", "add_consumer", "default").returncode == 0
        until(lambda: is_fresh(file))


class Unseen(Worker):
    """A worker that cannot touch its file."""

    def after_start_check(self) -> bool:
        """Return whether the log says so."""
        return "cannot touch its alive file" in self.log.read_text()


def test_a_file_that_cannot_be_touched_is_an_error_in_the_log(fresh: str, tmp_path: Path) -> None:
    with Unseen(
        "tasks", fresh, tmp_path, "-c1", "--alive-file", f"{tmp_path}/missing/alive", **PATHS
    ) as worker:
        # And it works on
        code = "from tasks import add; print(add.delay(2, 2).get(timeout=20))"
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout == "4\n"
        assert "Connection to broker lost" not in worker.log.read_text()
