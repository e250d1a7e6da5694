"""Chords with rpc:// results: each form that Celery has, with a real worker."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from amqp import NotFound
from celery import chord, group
from celery.exceptions import ChordError
from kombu import Connection
from programs import PATHS, python

from reliable import Celery
from reliable.rabbitmq_node import Node
from reliable.testing import Worker, depth, take, until

pytestmark = pytest.mark.usefixtures("worker")


def numbers(shop: Any, *values: int) -> list[Any]:
    """Return tasks that return these numbers."""
    return [shop.add.s(value, 0) for value in values]


def chord_error(result: Any, timeout: float = 20) -> str:
    """Wait for a chord to fail, and return the text of the ChordError that its caller gets."""
    result.get(timeout=timeout, propagate=False)
    assert isinstance(result.result, ChordError)
    return str(result.result)


FORMS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "a list": (lambda shop: chord(numbers(shop, 1, 2, 3), shop.total.s()), 6),
    "a generator": (lambda shop: chord((shop.add.s(n, 0) for n in range(4)), shop.total.s()), 6),
    "one task": (lambda shop: chord(numbers(shop, 5), shop.total.s()), 5),
    "no task": (lambda shop: chord([], shop.total.s()), 0),
    "a group and a task": (lambda shop: group(numbers(shop, 1, 2)) | shop.total.s(), 3),
    "of chains": (lambda shop: chord([shop.add.s(n, 0) | shop.add.s(1) for n in (1, 2)], shop.total.s()), 5),
    "of a chord": (
        lambda shop: chord([chord(numbers(shop, 1, 2), shop.total.s()), *numbers(shop, 3)], shop.total.s()),
        6,
    ),
    "of a group": (lambda shop: chord([group(numbers(shop, 1, 2)), *numbers(shop, 3)], shop.total.s()), 6),
    "of a chain that ends in a group": (
        lambda shop: chord(
            [shop.add.s(1, 0) | group(shop.add.s(1), shop.add.s(2)), *numbers(shop, 4)],
            shop.app.tasks["celery.accumulate"].s(),
        ),
        [[[2, 3], 4]],
    ),
    "a chain of chords": (
        lambda shop: (
            group(numbers(shop, 1, 2)) | shop.total.s() | group(shop.add.s(1), shop.add.s(2)) | shop.total.s()
        ),
        9,
    ),
    "a chain as body": (lambda shop: chord(numbers(shop, 1, 2), shop.total.s() | shop.add.s(1)), 4),
    "a group as body": (lambda shop: chord(numbers(shop, 1), group(shop.total.s(), shop.total.s())), [1, 1]),
    "a chord as body": (
        lambda shop: chord(numbers(shop, 1), chord([shop.total.s(), shop.total.s()], shop.total.s())),
        2,
    ),
    "a body on another queue": (
        lambda shop: chord(numbers(shop, 1, 2), shop.total.s().set(queue="priority")),
        3,
    ),
    "a thousand tasks": (lambda shop: chord(numbers(shop, *range(1000)), shop.total.s()), 499_500),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_chord(form: str, shop: Any) -> None:
    make, expected = FORMS[form]
    assert make(shop).delay().get(timeout=60) == expected


def test_the_results_come_in_the_order_of_the_tasks(shop: Any) -> None:
    # Given two tasks, of which the first ends last
    tasks = [shop.send_email.s("Ada", 1), shop.send_email.s("Grace", 0)]
    (results,) = chord(tasks, shop.app.tasks["celery.accumulate"].s()).delay().get(timeout=20)
    assert results == ["sent to Ada", "sent to Grace"]


def test_results_may_be_large(shop: Any) -> None:
    texts = [" ".join(map(str, range(number, number + 10_000))) for number in range(10)]
    body = shop.app.tasks["celery.accumulate"].s()
    (counts,) = chord([shop.count_words.s(text) for text in texts], body).delay().get(timeout=20)
    assert [len(counted) for counted in counts] == [10_000] * 10  # 120 kB each


def test_a_chord_whose_parts_are_never_given_back_fails(fresh: str, tmp_path: Path) -> None:
    # Given a worker of little patience, and a chord of two tasks. Somebody takes the first part, and keeps it
    program = (
        "from celery import chord\nfrom kombu import Connection\nfrom reliable.testing import depth, until\n"
        "from tasks import add, app, total\n"
        "late = add.s(2, 0).set(countdown=4)\n"
        "result = chord([add.s(1, 0), late], total.s())()\n"
        "queue = f'chord-{result.parent.id}'\n"
        "until(lambda: depth(app.conf.broker_url, queue) == 1)\n"
        "with Connection(app.conf.broker_url) as connection:\n"
        "    connection.default_channel.basic_consume(queue)\n"
        "    print(repr(result.get(timeout=60, propagate=False)))"
    )
    with Worker("tasks", fresh, tmp_path, "-c1", "--include", "apps.impatient", **PATHS):
        finished = python("-c", program, CELERY_BROKER_URL=fresh)
    # Then the second task does not wait forever, and the caller is told
    assert finished.stdout == "ChordError('RabbitMQ does not redeliver the parts of the chord')\n", (
        finished.stderr
    )


def test_a_body_that_is_too_large_fails(shop: Any) -> None:
    # Given ten results of two megabytes each, together more than RabbitMQ takes in a message
    accumulate = shop.app.tasks["celery.accumulate"]
    result = chord([accumulate.s("x" * 2_000_000) for _ in range(10)], accumulate.s()).delay()
    # Then the caller is told
    assert "larger than configured max size" in chord_error(result, 60)


def test_a_part_that_is_too_large_fails_its_chord(shop: Any, rabbitmq: str) -> None:
    # Given a task whose result is larger than its argument, and is for its chord only
    text = " ".join(map(str, range(1_300_000)))
    large = shop.count_words.s(text).set(ignore_result=True)
    result = chord([large, *numbers(shop, 1)], shop.total.s()).delay()
    # Then the caller of the chord is told
    assert "larger than configured max size" in chord_error(result, 60)
    take(rabbitmq, "dead-letters")


def test_a_body_that_cannot_be_called_fails(shop: Any) -> None:
    # Given a body without an argument for the results
    result = chord(numbers(shop, 1, 2), shop.worker_name.s()).delay()
    assert "positional argument" in chord_error(result)


@pytest.mark.parametrize(
    "options",
    [["-c4", "broker_pool_limit=1"], ["--pool=threads", "-c20", "broker_pool_limit=2"]],
    ids=["one connection", "more threads than connections"],
)
def test_chords_in_a_worker_with_few_connections(fresh: str, tmp_path: Path, options: list[str]) -> None:
    code = (
        "from celery import chord\nfrom tasks import add, total\n"
        "results = [chord([add.s(1, 0) for _ in range(3)], total.s())() for _ in range(40)]\n"
        "print(sum(result.get(timeout=60) for result in results))"
    )
    with Worker("tasks", fresh, tmp_path, *options, **PATHS):
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout == "120\n"


def test_a_failure_fails_the_chain_that_is_the_body(shop: Any, worker: Worker, rabbitmq: str) -> None:
    def complaints() -> int:
        return worker.log.read_text().count("cannot be called")

    before = complaints()
    workflow = group(shop.ship.s("sofa", 9e9), *numbers(shop, 1)) | shop.total.s() | shop.add_tax.s()
    result = workflow.delay()
    assert chord_error(result)
    take(rabbitmq, "dead-letters")
    # And nobody misses a link_error that there is not
    assert complaints() == before


def test_a_failure_fails_groups_that_follow_one_another(shop: Any, rabbitmq: str) -> None:
    first, second = (group(shop.add.s(1), shop.add.s(2)) for _ in range(2))
    result = (shop.ship.s("sofa", 9e9) | first | second).delay()
    errors = [child.get(timeout=20, propagate=False) for child in result.results]
    assert [str(error) for error in errors] == ["sofa: out of stock"] * 2
    take(rabbitmq, "dead-letters")


def test_each_member_of_a_body_is_told_though_a_link_error_cannot_be_called(shop: Any, rabbitmq: str) -> None:
    # Given a group as body, and a link_error without an argument for the task that failed
    total = shop.total.s().on_error(shop.worker_name.s("one", "two"))
    result = chord([shop.ship.s("sofa", 9e9)], group(total, shop.total.s())).delay()
    errors = [child.get(timeout=20, propagate=False) for child in result.results]
    assert [type(error) for error in errors] == [ChordError] * 2
    take(rabbitmq, "dead-letters")


def test_a_body_for_an_exchange_that_does_not_exist_fails(shop: Any) -> None:
    body = shop.total.s().set(exchange="no-such-exchange", routing_key="x")
    result = chord(numbers(shop, 1, 2), body).delay()
    assert "no exchange 'no-such-exchange'" in chord_error(result)


def test_a_revoked_task_fails_the_rest_of_its_chain(shop: Any) -> None:
    # Given a chain whose first task is revoked before it is due
    late = shop.add.s(1, 0).set(countdown=2)
    late.freeze()
    shop.app.control.revoke(late.id)
    result = (late | shop.add.s(1) | group(numbers(shop, 1, 2))).delay()
    # Then those who wait for its last step are told
    errors = [child.get(timeout=20, propagate=False) for child in result.results]
    assert [type(error).__name__ for error in errors] == ["TaskRevokedError"] * 2


def test_a_failure_fails_the_group_at_the_end_of_its_chain(shop: Any, rabbitmq: str) -> None:
    result = (shop.ship.s("sofa", 9e9) | group(numbers(shop, 1, 2))).delay()
    with pytest.raises(Exception, match="sofa: out of stock"):
        result.get(timeout=20)
    assert [str(child.get(timeout=20, propagate=False)) for child in result.results] == 2 * [
        "sofa: out of stock"
    ]
    take(rabbitmq, "dead-letters")


@pytest.mark.parametrize("is_nested", [False, True], ids=["of tasks", "of a chord"])
def test_a_failure_fails_the_chord(shop: Any, worker: Worker, rabbitmq: str, is_nested: bool) -> None:
    # Given a chord of which a task fails
    part = shop.ship.s("sofa", 9e9)
    if is_nested:
        part = chord([part, *numbers(shop, 1)], shop.total.s())
    errback = shop.receipt.si(4200 + is_nested)
    result = chord([part, *numbers(shop, 2)], shop.total.s().on_error(errback)).delay()
    # Then its caller and its link_error are told, and its queue is deleted
    assert "sofa: out of stock" in chord_error(result)
    until(lambda: f"You paid {42 + is_nested / 100:.2f} EUR" in worker.log.read_text())
    with pytest.raises(NotFound):
        until(lambda: depth(rabbitmq, f"chord-{result.parent.id}") is None, 5)
    take(rabbitmq, "dead-letters")


def test_a_revoked_task_fails_its_chord(shop: Any) -> None:
    # Given a task that is revoked before it is due
    late = shop.add.s(1, 0).set(countdown=2)
    late.freeze()
    shop.app.control.revoke(late.id)
    result = chord([late, *numbers(shop, 2)], shop.total.s()).delay()
    # Then the caller is told
    assert chord_error(result)


def test_a_task_that_a_worker_refuses_fails_its_chord(shop: Any, rabbitmq: str) -> None:
    # Given a task whose time limit is not a number
    refused = shop.add.s(1, 0).set(time_limit="soon")
    result = chord([refused, *numbers(shop, 2)], shop.total.s()).delay()
    # Then the caller is told
    assert chord_error(result)
    take(rabbitmq, "dead-letters")


def test_a_task_that_no_worker_knows_fails_its_chord(shop: Any, rabbitmq: str) -> None:
    unknown = shop.app.signature("tasks.unknown")
    result = chord([unknown, *numbers(shop, 2)], shop.total.s()).delay()
    assert "tasks.unknown" in chord_error(result)
    take(rabbitmq, "dead-letters")


def test_a_chord_may_wait_longer_than_results_are_kept(rabbitmq: str) -> None:
    # Given a program whose results expire after a second
    program = (
        "from celery import chord\nfrom tasks import add, app, total\n"
        "app.conf.result_expires = 1\n"
        "late = add.s(2, 0).set(countdown=4)\n"
        "print(chord([add.s(1, 0), late], total.s())().get(timeout=60))"
    )
    # When the second task of a chord runs later
    finished = python("-c", program, CELERY_BROKER_URL=rabbitmq)
    # Then its body is called
    assert finished.stdout == "3\n", finished.stderr


def test_no_chord_is_lost_with_the_task_that_held_its_parts(shop: Any, rabbitmq: str) -> None:
    # Given a chord of two tasks. Somebody holds the part of the first when the second adds its own
    late = shop.add.s(2, 0).set(countdown=2)
    result = chord([*numbers(shop, 1), late], shop.total.s()).delay()
    queue = f"chord-{result.parent.id}"
    until(lambda: depth(rabbitmq, queue) == 1)
    with Connection(rabbitmq) as connection:
        held: list[Any] = []
        connection.default_channel.basic_consume(queue, callback=held.append)
        while len(held) < 2:
            connection.drain_events(timeout=10)
        time.sleep(1)  # This is the fault: meanwhile the second task looks for the parts
        # When it dies
    # Then the second task calls the body
    assert result.get(timeout=20) == 3


def test_a_chord_in_a_cluster_may_have_thousands_of_tasks(fresh: str, tmp_path: Path) -> None:
    # Given the URL of two nodes, here the same one twice, which makes the queue of a chord a quorum queue
    url = f"{fresh};{fresh}"
    program = (
        "from celery import chord\nfrom tasks import add, total\n"
        "print(chord([add.s(1, 0) for _ in range(2100)], total.s())().get(timeout=90))"
    )
    with Worker("tasks", url, tmp_path, "-c4", **PATHS):
        # When a chord has more tasks than the 2,000 messages that RabbitMQ sends at a time
        finished = python("-c", program, CELERY_BROKER_URL=url)
    # Then its body is called
    assert finished.stdout == "2100\n", finished.stderr


def test_a_chord_of_too_many_tasks_is_an_error_for_its_caller(shop: Any) -> None:
    with pytest.raises(ValueError, match="at most 65,535 tasks"):
        chord(70_000 * [shop.add.s(1, 0)], shop.total.s()).delay()


def test_a_body_whose_queue_is_full_fails(fresh: str, session_node: Node, tmp_path: Path) -> None:
    # Given a queue `priority` that nobody consumes from, with as many messages as it may have
    host = fresh.rpartition("/")[2]
    limit = ("set_policy", "-p", host, "limit", "^priority$", '{"max-length": 1}', "--apply-to", "queues")
    session_node.control(*limit)
    program = (
        "from celery import chord\nfrom tasks import add, total\n"
        "add.apply_async((1, 1), queue='priority')\n"
        "body = total.s().set(queue='priority')\n"
        "print(repr(chord([add.s(1, 0), add.s(2, 0)], body)().get(timeout=90, propagate=False)))"
    )
    with Worker("tasks", fresh, tmp_path, "-c1", "-Q", "default", **PATHS):
        # When a chord has its body there
        finished = python("-c", program, CELERY_BROKER_URL=fresh)
    # Then its caller is told, and the worker does not wait
    assert finished.stdout.startswith("ChordError"), finished.stderr
    assert "its queue is full" in finished.stdout


def test_a_temporary_queue_is_bound_so_that_rabbitmq_keeps_it(
    fresh: str, session_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given the queue of a chord, and the reply queue of its caller
    monkeypatch.setenv("CELERY_BROKER_URL", fresh)
    with Celery(backend="rpc://") as app:
        result = chord([app.signature("add")], app.signature("total")).delay()
        queues = {f"chord-{result.parent.id}", app.backend.oid}
        # Then each has a binding, which makes RabbitMQ write the queue itself to disk
        host = fresh.rpartition("/")[2]
        bindings = session_node.control("-q", "list_bindings", "-p", host, "source_name", "destination_name")
        bound = {line.split("\t")[1] for line in bindings.splitlines() if line.startswith("tasks\t")}
        assert queues <= bound
