"""Only a task that kills is punished, not the tasks around it, however often workers and connections end."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from programs import PATHS, start_python

from reliable.rabbitmq_node import Node, clean_environment
from reliable.testing import Worker, depth, take, until

TASKS = 1000
ROUNDS = 5
pytestmark = pytest.mark.timeout(400)  # Seconds


def start_worker(url: str, folder: Path, prefetch: str) -> Worker:
    """Start a worker of four processes that knows the tasks of apps/ledger.py."""
    options = ("-c4", "--include", "apps.ledger", "--prefetch-multiplier", prefetch)
    return Worker("tasks", url, folder, *options, **ledger(folder)).start()


@contextmanager
def workers(number: int, *arguments: Any) -> Iterator[list[Worker]]:
    """Run workers, and kill those that the test leaves in the list."""
    running = [start_worker(*arguments) for _ in range(number)]
    try:
        yield running
    finally:
        for worker in running:
            worker.kill()


def ledger(folder: Path) -> dict[str, str]:
    """Return the variables with which tasks write their numbers to a ledger."""
    return {**PATHS, "LEDGER": str(folder / "ledger")}


def lines(folder: Path) -> list[str]:
    """Return what is in the ledger."""
    path = folder / "ledger"
    return path.read_text().splitlines() if path.exists() else []


def has_lines(folder: Path, number: int) -> bool:
    """Return whether the ledger has so many lines."""
    return len(lines(folder)) >= number


def restart(sign: signal.Signals, running: list[Worker], _node: Node, *arguments: Any) -> None:
    """Replace all workers, one after another."""
    for worker in running.copy():
        assert worker.process
        if sign == signal.SIGKILL:
            worker.kill()  # With all its processes, as a machine that loses its power
        else:
            worker.process.send_signal(sign)
            worker.process.wait(timeout=60)
        running.remove(worker)
        running.append(start_worker(*arguments))


def close_connections(_running: list[Worker], node: Node, url: str, *_: Any) -> None:
    """Close every connection of the virtual host."""
    node.control("close_all_connections", "-p", url.rpartition("/")[2], "a test")


@pytest.mark.parametrize(
    ("disturb", "prefetch"),
    [
        (partial(restart, signal.SIGTERM), "1"),
        (partial(restart, signal.SIGTERM), "32"),
        (partial(restart, signal.SIGKILL), "1"),
        (partial(restart, signal.SIGKILL), "32"),
        (close_connections, "32"),
    ],
    ids=["stopped", "stopped, prefetch 32", "killed", "killed, prefetch 32", "connections closed"],
)
def test_no_task_is_punished_for_what_happens_around_it(
    session_node: Node, fresh: str, tmp_path: Path, disturb: Callable[..., None], prefetch: str
) -> None:
    # Given two workers, and a caller that waits for the results of a thousand tasks
    with (
        workers(2, fresh, tmp_path, prefetch) as running,
        start_python(
            "-m", "apps.ledger", str(TASKS), "0", "0.2", CELERY_BROKER_URL=fresh, **ledger(tmp_path)
        ) as caller,
    ):
        # When they are disturbed again and again
        for round_ in range(ROUNDS):
            until(partial(has_lines, tmp_path, TASKS * round_ // ROUNDS), 120)
            disturb(running, session_node, fresh, tmp_path, prefetch)
        # Then each result comes, and no task is a dead letter
        printed, _ = caller.communicate(timeout=240)
    outcome = json.loads(printed.splitlines()[-1])
    assert (outcome["refused"], outcome["wrong"]) == ([], [])
    assert len(outcome["accepted"]) == TASKS
    assert depth(fresh, "dead-letters") == 0
    print(f"{TASKS} tasks, {len(lines(tmp_path)) - TASKS} ran again")


def test_long_tasks_are_not_punished_when_connections_are_closed(
    session_node: Node, fresh: str, tmp_path: Path
) -> None:
    # Given a worker whose four processes are busy
    code = (
        "from apps.ledger import note_later\n"
        "results = [note_later.delay(number) for number in range(4)]\n"
        "print([result.get(timeout=100) for result in results])"
    )
    with (
        workers(1, fresh, tmp_path, "1") as (worker,),
        start_python("-c", code, CELERY_BROKER_URL=fresh, **ledger(tmp_path)) as caller,
    ):
        # When all connections are closed, each time after the tasks have started again
        for round_ in range(1, ROUNDS + 1):
            until(lambda: worker.log.read_text().count("received") >= 4 * round_)  # noqa: B023
            close_connections([worker], session_node, fresh)
        (tmp_path / "go").touch()
        # Then each result comes, and no task is a dead letter
        assert caller.communicate(timeout=100) == ("[0, 1, 2, 3]\n", "")
    assert depth(fresh, "dead-letters") == 0


@pytest.mark.parametrize(
    ("queue", "prefetch"),
    [("default", "1"), ("default", "32"), ("priority", "1")],
    ids=["quorum", "quorum, prefetch 32", "classic"],
)
def test_a_poison_among_innocents_is_the_only_dead_letter(
    fresh: str, tmp_path: Path, queue: str, prefetch: str
) -> None:
    # Given a worker of four processes
    code = (
        "import tasks\nfrom apps import ledger\n"
        "results = [ledger.note.delay(number, 0.05) for number in range(100)]\n"
        f"poison = tasks.print_label.apply_async((99,), queue={queue!r})\n"
        "results += [ledger.note.delay(number, 0.05) for number in range(100, 200)]\n"
        "print([result.get(timeout=60) for result in results] == list(range(200)))\n"
        "print(type(poison.get(timeout=60, propagate=False)).__name__)"
    )
    with (
        workers(1, fresh, tmp_path, prefetch) as (worker,),
        start_python("-c", code, CELERY_BROKER_URL=fresh, **ledger(tmp_path)) as caller,
    ):
        # When one of 201 tasks kills each process that runs it
        printed, _ = caller.communicate(timeout=200)
        # Then the others succeed, and it is the only dead letter
        assert printed.splitlines() == ["True", "WorkerLostError"]
        (letter,) = take(fresh, "dead-letters")
        assert letter.headers["task"] == "tasks.print_label"
        assert depth(fresh, "dead-letters") == 0
        # And the log names it, each time
        assert worker.log.read_text().count(f"{letter.headers['id']}] lost its process") == 4


def test_a_task_that_kills_its_whole_worker_ends_and_its_caller_is_told(fresh: str, tmp_path: Path) -> None:
    # Given a queue with a delivery limit of 2, and a task that kills the worker with all its processes
    command = [sys.executable, "-m", "celery", "-A", "apps.deadly", "worker", "-c1", "-lwarning"]
    variables = {"CELERY_BROKER_URL": fresh, **PATHS}
    code = (
        "from apps.deadly import kill_the_worker\n"
        "print(type(kill_the_worker.delay().get(timeout=100, propagate=False)).__name__)"
    )
    with start_python("-c", code, **variables) as caller:
        # When a supervisor starts the worker again each time
        starts = 0
        while caller.poll() is None:
            with subprocess.Popen(command, env=clean_environment(**variables)) as worker:
                starts += 1
                until(lambda: worker.poll() is not None or caller.poll() is not None, 60)
                worker.terminate()
        # Then it was run twice, is a dead letter, and the caller knows
        assert caller.communicate()[0] == "WorkerLostError\n"
    assert starts == 3
    (letter,) = take(fresh, "dead-letters")
    assert letter.headers["x-death"][0]["reason"] == "rejected"
