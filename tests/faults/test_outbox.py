"""The recipe of docs/outbox.md, with its program killed at the two moments that matter."""

import re
import sqlite3
import uuid
from pathlib import Path

import pytest
from programs import PATHS, PROJECT, python

from reliable.testing import Worker, until


@pytest.mark.parametrize(
    ("kill", "published"),
    [
        ("outbox.publish_outbox = die", 1),
        ("send = outbox.app.send_task; outbox.app.send_task = lambda *a, **k: (send(*a, **k), die())", 2),
    ],
    ids=["before it publishes", "after it has published"],
)
def test_an_order_is_paid_once_though_the_program_dies(
    fresh: str, tmp_path: Path, kill: str, published: int
) -> None:
    # Given the code of the page, and a program that is killed between commit and publish, or after it
    (code,) = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "outbox.md").read_text(), re.DOTALL)
    (tmp_path / "outbox.py").write_text(code)
    variables = {"CELERY_BROKER_URL": fresh, "PYTHONPATH": f"{tmp_path}:{PATHS['PYTHONPATH']}"}
    open_shop = f"import os, outbox; db = outbox.open_shop('{tmp_path}/shop')"
    number = str(uuid.uuid4())
    die = "die = lambda *_: os.kill(os.getpid(), 9)"
    died = python("-c", f"{open_shop}\n{die}\n{kill}\noutbox.take_order(db, '{number}')", **variables)
    assert died.returncode == -9, died.stderr
    # When the next one publishes what is in the outbox
    python("-c", f"{open_shop}; outbox.publish_outbox(db)", **variables).check_returncode()
    # Then the order is paid, once
    with Worker("tasks", fresh, tmp_path, "-c1", **PATHS) as worker:
        until(lambda: worker.log.read_text().count("succeeded in") == published)
        assert worker.log.read_text().count(f"'{number} paid at attempt 1'") == 1
    with sqlite3.connect(tmp_path / "shop") as db:
        assert [table for (table,) in db.execute("SELECT number FROM orders")] == [number]
        assert list(db.execute("SELECT * FROM outbox")) == []
