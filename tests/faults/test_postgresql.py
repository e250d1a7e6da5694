"""Results in a real PostgreSQL: any process reads them, and none is lost when the database dies."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from programs import PATHS, python, start_python

from reliable.rabbitmq_node import Node, Program, free_port
from reliable.testing import Worker, until

TASKS = 300


class PostgreSQL(Program):
    """A PostgreSQL server on a free port, with its data in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
        if not programs:
            if os.environ.get("CI") == "true":
                pytest.fail("PostgreSQL is not installed, and CI must not skip its tests")
            pytest.skip("PostgreSQL is not installed: tests/run does it")
        user: list[str] = []
        if os.geteuid() == 0:  # It refuses to run as root
            user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(folder, "postgres", "postgres")
        initialise = [*user, str(programs / "initdb"), "-D", str(folder), "-U", "shop", "--auth=trust"]
        subprocess.run(initialise, check=True, capture_output=True)
        listen = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories="
        super().__init__(
            [*user, str(programs / "postgres"), "-D", str(folder), *listen.split()],
            folder / "output.log",
            timeout=60,  # Seconds
        )

    @property
    def url(self) -> str:
        """Return the URL for CELERY_RESULT_BACKEND."""
        return f"db+postgresql+psycopg://shop@127.0.0.1:{self.port}/postgres"

    def after_start_check(self) -> bool:
        """Return whether it is ready."""
        try:
            psycopg.connect(f"host=127.0.0.1 port={self.port} user=shop dbname=postgres").close()
        except psycopg.OperationalError:
            return False
        return True


@pytest.fixture
def postgresql() -> Iterator[PostgreSQL]:
    """Run a PostgreSQL server that the test may break."""
    # Its user may not enter the folders of pytest
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, PostgreSQL(Path(folder)) as server:
        yield server


def test_a_result_waits_for_its_database(postgresql: PostgreSQL, node: Node, tmp_path: Path) -> None:
    # Given a worker under load that stores its results in PostgreSQL
    ledger = tmp_path / "ledger"
    results = {"CELERY_RESULT_BACKEND": postgresql.url, "LEDGER": str(ledger), **PATHS}

    def done() -> int:
        return len(ledger.read_text().splitlines()) if ledger.exists() else 0

    with (
        Worker("tasks", node.url, tmp_path, "-c4", "--include", "apps.ledger", **results),
        start_python("-m", "apps.ledger", str(TASKS), "0", CELERY_BROKER_URL=node.url, **results) as caller,
    ):
        until(lambda: done() > TASKS / 3)
        # When PostgreSQL is killed
        postgresql.kill()
        # Then each process waits with its task, which is not acknowledged
        until(lambda: node.queues("messages_unacknowledged")["default"] == 4)
        before = done()
        until(lambda: node.queues("messages_unacknowledged")["default"] == 4)
        assert done() - before <= 4
        # When it is back, then each result is there, also for another process
        postgresql.start()
        printed = caller.communicate(timeout=100)[0]
        assert '"wrong": []' in printed
        for code in (
            "import tasks; tasks.add.apply_async((2, 2), task_id='four')",
            "import tasks; print(tasks.app.AsyncResult('four').get(timeout=20))",
        ):
            finished = python("-c", code, CELERY_BROKER_URL=node.url, **results)
        assert finished.stdout == "4\n"
