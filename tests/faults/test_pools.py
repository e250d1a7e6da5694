"""Worker pools that people use: a worker of each kind is killed, and loses no task and no result."""

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import PATHS, python, start_python

from reliable.rabbitmq_node import Node
from reliable.testing import Worker, take, until

#: Short tasks, one that is retried, and one that is due later.
CALLS = """
import tasks
results = [tasks.send_email.delay(str(number), 0.2) for number in range(30)]
results += [tasks.charge_card.delay("order", busy=1), tasks.remind.apply_async(("Ada",), countdown=2)]
print(len([result.get(timeout=60) for result in results]))
"""


class Multi(Worker):
    """Two worker nodes, which `celery multi` starts in the background."""

    def __init__(self, app: str, url: str, folder: Path, *arguments: str, **variables: str) -> None:
        super().__init__(app, url, folder, *arguments, **variables)
        self.name = "test1@localhost,test2@localhost"
        self.nodes = [*self.name.split(","), f"--pidfile={folder}/%n.pid", f"--logfile={folder}/%n.log"]
        celery = [sys.executable, "-m", "celery", "-A", app]
        # Celery does not quote the path of Python, which may have a space
        python = f"--executable={shlex.quote(sys.executable)}"
        options = [python, "-linfo", f"--alive-file={self.alive}", *arguments]
        self.command_parts = [*celery, "multi", "start", *self.nodes, *options]

    def kill(self, *_: Any, **__: Any) -> "Multi":
        """Kill the nodes, and wait until they are gone: a node does not start while another has its file."""
        processes = [int(file.read_text()) for file in self.log.parent.glob("*.pid")]
        super().kill()
        until(lambda: not any(psutil.pid_exists(process) for process in processes))
        return self

    def stop(self, *_: Any, **__: Any) -> "Multi":
        """Wait until the nodes have finished their tasks."""
        command = [sys.executable, "-m", "celery", "multi", "stopwait", *self.nodes]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
        return self


def replaced(worker: psutil.Process, before: list[psutil.Process]) -> bool:
    """Return whether a worker has one new process."""
    return len({*worker.children()} - {*before}) == 1


def test_a_killed_process_is_replaced_before_celery_looks_again(fresh: str, tmp_path: Path) -> None:
    with Worker("tasks", fresh, tmp_path, "-c2", **PATHS) as worker:
        assert worker.process
        main = psutil.Process(worker.process.pid)
        for _ in range(40):
            before = main.children()
            before[0].kill()
            until(partial(replaced, main, before), 3)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Worker, "--autoscale=4,1"),
        (Worker, "--pool=gevent -c4"),
        (Worker, "--pool=eventlet -c4"),
        (Multi, "-c2"),
    ],
    ids=["autoscale", "gevent", "eventlet", "multi"],
)
def test_a_killed_worker_loses_nothing(
    kind: type[Worker], arguments: str, session_node: Node, fresh: str, tmp_path: Path
) -> None:
    def finished() -> int:
        return sum(log.read_text().count(" succeeded in ") for log in tmp_path.glob("*.log"))

    # Given a caller that waits for results
    with (
        kind("tasks", fresh, tmp_path, *arguments.split(), **PATHS) as worker,
        start_python("-c", CALLS, CELERY_BROKER_URL=fresh) as caller,
    ):
        # When the worker is killed while it runs tasks, and started again
        until(lambda: finished() >= 5)
        worker.kill()
        assert finished() < 30
        worker.start()
        # Then all results arrive
        assert caller.communicate(timeout=60) == ("32\n", "")
        # And no queue holds a message, also none that is not acknowledged
        until(lambda: not any(session_node.queues("messages", tmp_path.name).values()))


def test_autoscale_grows_after_a_lost_connection(session_node: Node, fresh: str, tmp_path: Path) -> None:
    # Given a worker that has reconnected while it had one process
    with Worker("tasks", fresh, tmp_path, "--autoscale=4,1", **PATHS) as worker:
        session_node.control("close_all_connections", "-p", tmp_path.name, "a test")
        # When several tasks wait, then it starts more processes
        code = "import tasks\nfor _ in range(8): tasks.send_email.delay('Ada', 0.5)"
        python("-c", code, CELERY_BROKER_URL=fresh)
        until(lambda: "Scaling up" in worker.log.read_text())


def test_a_task_that_ends_its_program_in_a_thread_is_an_error_and_a_dead_letter(
    fresh: str, tmp_path: Path
) -> None:
    with Worker("tasks", fresh, tmp_path, "--pool=threads", "-c1", "--include", "apps.odd", **PATHS):
        code = (
            "from apps.odd import leave, size\n"
            "print(repr(leave.delay().get(timeout=20, propagate=False)))\n"
            "print(size.delay('x').get(timeout=20))"
        )
        lost, after = python("-c", code, CELERY_BROKER_URL=fresh).stdout.splitlines()
        assert lost.startswith("WorkerLostError")
        assert after == "1"
        take(fresh, "dead-letters")


def test_a_solo_worker_runs_a_task_longer_than_the_heartbeat_once(fresh: str, tmp_path: Path) -> None:
    # Given a worker that cannot send a heartbeat while a task runs
    options = ("--pool=solo", "broker_heartbeat=2")
    with Worker("tasks", fresh, tmp_path, *options, **PATHS) as worker:
        # When a task takes longer than RabbitMQ waits for one, then the worker does not lose its connection
        python(
            "-c", "import tasks; tasks.send_email.delay('Ada', 9).get(timeout=60)", CELERY_BROKER_URL=fresh
        )
        python("-c", "import tasks; tasks.add.delay(2, 2).get(timeout=60)", CELERY_BROKER_URL=fresh)
        log = worker.log.read_text()
        assert log.count("received") == 2
        assert "The solo pool has no time limits" in log


def test_a_greenlet_over_its_hard_time_limit_is_a_dead_letter(fresh: str, tmp_path: Path) -> None:
    # Given a worker with greenlets
    with Worker("tasks", fresh, tmp_path, "--pool=gevent", "-c2", **PATHS) as worker:
        # When a task takes too long
        code = "import tasks\ntasks.draw_stubborn_label.delay(30).get(timeout=20)"
        failed = python("-c", code, CELERY_BROKER_URL=fresh)
        # Then its caller gets an error, it is a dead letter, and it ran once
        assert "TimeLimitExceeded" in failed.stderr.splitlines()[-1]
        (letter,) = take(fresh, "dead-letters")
        assert letter.headers["task"] == "tasks.draw_stubborn_label"
        assert worker.log.read_text().count("received") == 1
