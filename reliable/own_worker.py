"""A `celery worker` that ends with the program that started it, however that ends."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import celery

from reliable.errors import exit_now

#: How long a worker may take to start, and to finish the tasks that it has begun, in seconds.
TIMEOUT = 30


@contextlib.contextmanager
def own_worker(app: celery.Celery) -> Iterator[dict[str, Any]]:
    """Run `celery worker` beside this program, and give its statistics by the name of its node.

    At the end the worker finishes the tasks that it has begun. If this program fails or is killed, the worker
    is killed, and RabbitMQ delivers its tasks again. The program exits if the worker does not start.
    """
    name = f"own{secrets.token_hex(2)}@localhost"
    options = ["-c8", "-lwarning", "-n", name]
    command = [sys.executable, "-m", "reliable.own_worker", "-A", app.main, "worker", *options]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        deadline = time.monotonic() + TIMEOUT
        while not (statistics := app.control.inspect([name], timeout=0.5, limit=1).stats()):
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace"))
                exit_now("The worker does not start", "read its log above")
        yield statistics
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TIMEOUT)


def end_with_parent() -> None:
    """Wait until the program at the other end of our standard input ends, and kill our processes."""
    os.read(0, 1)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from celery.bin.celery import main

    threading.Thread(target=end_with_parent, daemon=True).start()
    main()
