"""Tasks are functions: they can be called without a worker."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from programs import python

import tasks


@pytest.mark.parametrize(
    ("task", "arguments", "returned"),
    [
        (tasks.add, (2, 2), 4),
        (tasks.send_email, ("ada@example.com", 0), "sent to ada@example.com"),
        (tasks.count_words, ("One fish, ONE sea",), {"one": 2, "fish": 1, "sea": 1}),
        (tasks.add_tax, (1000,), 1200),
        (tasks.total, ([1, 2, 3],), 6),
        (tasks.receipt, (1999,), "You paid 19.99 EUR"),
        (tasks.pack_order, (2, 0), 2),
        (tasks.ship, ("lamp", 0), "lamp: shipped"),
        (tasks.draw_label, (0,), "label"),
        (tasks.draw_stubborn_label, (0,), "label"),
        (tasks.check_price, (3,), True),
        (tasks.report_stock, (), None),
    ],
)
def test_a_task_is_a_function(task: Any, arguments: tuple[Any, ...], returned: Any) -> None:
    assert task(*arguments) == returned


def test_an_order_is_paid_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "BOOKS", tmp_path / "books")
    assert tasks.charge_card("order 7", 0) == "order 7 paid at attempt 1"
    assert tasks.charge_card("order 7", 0) == "order 7 was paid before"
    assert tasks.charge_card("order 8", 0) == "order 8 paid at attempt 1"


def test_workers_in_several_containers_share_the_books(tmp_path: Path) -> None:
    paid = []
    for container in "one", "two":
        (tmp_path / container).mkdir()
        places = {"TMPDIR": str(tmp_path / container), "GATEWAY_BOOKS": str(tmp_path / "books")}
        paid += [python("-c", "import tasks; print(tasks.charge_card('order 7', 0))", **places).stdout]
    assert paid == ["order 7 paid at attempt 1\n", "order 7 was paid before\n"]


def test_the_gateway_is_busy_and_the_stock_empty() -> None:
    with pytest.raises(tasks.GatewayBusyError, match="attempt 1 of order 7"):
        tasks.charge_card("order 7")
    with pytest.raises(tasks.OutOfStockError, match="lamp"):
        tasks.ship("lamp", 1e12)


def test_times_and_names_are_returned() -> None:
    before = tasks.remind("Ada")
    assert tasks.serve_customer("Ada") >= before
    assert isinstance(tasks.worker_name(), str)


def test_a_crash_kills_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *what: killed.append(what))
    assert str(os.getpid()) in tasks.print_label(0)
    assert not killed
    tasks.print_label(1)
    assert killed == [(os.getpid(), signal.SIGKILL)]
