"""Messages, results and callers that go wrong: each ends where it is documented, and the worker goes on."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue
from programs import PATHS, celery, declare_queues, python, start_python

from reliable.rabbitmq_node import Node
from reliable.testing import Worker, depth, take, until


class Odd:
    """A worker that knows odd tasks, and programs that call them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.log = url, folder / "worker.log"
        self.worker = Worker("tasks", url, folder, "-c2", "--include", "apps.odd", **PATHS)

    def call(self, code: str) -> "subprocess.CompletedProcess[str]":
        """Run Python code that uses the odd tasks."""
        return python("-c", f"import tasks\nfrom apps import odd\n{code}", CELERY_BROKER_URL=self.url)

    def start(self, code: str) -> "subprocess.Popen[str]":
        """Start Python code that uses the odd tasks."""
        return start_python("-c", f"import tasks\nfrom apps import odd\n{code}", CELERY_BROKER_URL=self.url)


@pytest.fixture(scope="module")
def odd(session_node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Odd]:
    """Run a worker of odd tasks on a virtual host of its own."""
    odd = Odd(session_node.virtual_host("odd"), tmp_path_factory.mktemp("odd"))
    with odd.worker:
        yield odd


@pytest.fixture(autouse=True)
def _the_worker_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after each test that the worker still works, and that no queue holds a message."""
    yield
    if "odd" in request.fixturenames:
        odd = request.getfixturevalue("odd")
        assert odd.worker.running()
        assert odd.call("print(odd.size.delay('four').get(timeout=20))").stdout == "4\n"
        waiting = ("default", "dead-letters", "unrouted")
        until(lambda: not any(depth(odd.url, name) for name in waiting))


# --- Messages -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("tasks.app.send_task('apps.odd.size', (1, 2, 3))", "TypeError"),
        ("odd.unserialisable.delay()", "EncodeError"),
        ("odd.text.delay(20 * 2**20)", "PreconditionFailed"),
        ("odd.out_of_memory.delay()", "MemoryError"),
        ("odd.wait_with_a_limit.delay(30)", "TimeLimitExceeded"),
        ("odd.wait_as_a_plain_task.delay()", "TimeLimitExceeded"),
        ("odd.pass_a_time_limit_on.delay()", "TimeLimitExceeded"),
    ],
    ids=[
        "wrong arguments",
        "result not JSON",
        "result too large",
        "out of memory",
        "over its time limit",
        "the same, of Celery's class",
        "a time limit of its own",
    ],
)
def test_a_task_that_fails_is_an_error_for_its_caller_and_a_dead_letter(
    odd: Odd, task: str, error: str
) -> None:
    failed = odd.call(f"{task}.get(timeout=20)")
    assert error in failed.stderr.splitlines()[-1]
    (letter,) = take(odd.url, "dead-letters")
    assert letter.headers["x-death"][0]["reason"] == "rejected"


@pytest.mark.parametrize(
    ("publish", "error"),
    [
        ("odd.size.delay(object())", "EncodeError"),
        ("odd.size.delay('x' * 20 * 2**20)", "PreconditionFailed"),
        ("tasks.app.publish_in_bulk([odd.size.s(object())])", "EncodeError"),
        ("tasks.app.publish_in_bulk([odd.size.s('x' * 20 * 2**20)])", "OperationalError"),
        ("odd.size.apply_async(('x',), queue='no-such-queue')", "QueueNotFound"),
    ],
    ids=["not JSON", "too large", "not JSON, in bulk", "too large, in bulk", "no such queue"],
)
def test_what_can_not_be_published_is_an_error_for_its_caller(odd: Odd, publish: str, error: str) -> None:
    failed = odd.call(publish)
    assert error in failed.stderr.splitlines()[-1]


def test_a_message_that_is_too_large_unpacked_is_an_error_for_its_caller(odd: Odd) -> None:
    # Celery publishes it, since it is small when it is compressed
    failed = odd.call("odd.size.apply_async(('x' * 17 * 2**20,), compression='zlib').get(timeout=20)")
    assert "more than 16777216 bytes when it is unpacked" in failed.stderr.splitlines()[-1]
    take(odd.url, "dead-letters")


def test_a_time_limit_above_the_global_one_is_legal(odd: Odd) -> None:
    assert odd.call("print(odd.wait_long.delay().get(timeout=20))").stdout == "done\n"


def test_a_longer_soft_limit_does_not_put_off_the_hard_one(odd: Odd) -> None:
    failed = odd.call("odd.wait_with_a_limit.apply_async((30,), soft_time_limit=60).get(timeout=20)")
    assert "TimeLimitExceeded" in failed.stderr
    take(odd.url, "dead-letters")


def test_a_retry_with_a_short_countdown_is_not_lost(odd: Odd) -> None:
    assert odd.call("print(odd.retry_soon.delay().get(timeout=20))").stdout == "1\n"


def test_a_request_of_its_own_does_not_make_a_task_over_its_limit_run_again(odd: Odd) -> None:
    failed = odd.call("odd.wait_as_a_logged_task.delay().get(timeout=20)")
    assert "TimeLimitExceeded" in failed.stderr
    take(odd.url, "dead-letters")
    assert odd.log.read_text().count("exceeded for apps.odd.wait_as_a_logged_task") == 1


def test_a_time_limit_runs_link_error_once(odd: Odd) -> None:
    before = odd.log.read_text().count("complained\n")
    failed = odd.call(
        "odd.wait_with_a_limit.apply_async((30,), link_error=odd.complain.si()).get(timeout=20)"
    )
    assert "TimeLimitExceeded" in failed.stderr
    take(odd.url, "dead-letters")
    # Then a second one would have run before this one has
    odd.call("odd.complain.delay().get(timeout=20)")
    assert odd.log.read_text().count("complained\n") == before + 2


@pytest.mark.parametrize("in_a_chain", [False, True])
def test_the_result_of_a_replacement_reaches_the_caller(odd: Odd, in_a_chain: bool) -> None:
    assert odd.call(f"print(odd.replace.delay({in_a_chain}).get(timeout=20))").stdout == "4\n"


def test_a_queue_that_rabbitmq_refuses_does_not_stop_a_worker(odd: Odd) -> None:
    # Given a broadcast that names a queue, and the exchange of the tasks with another type
    code = (
        "arguments = {'queue': 'other', 'exchange': 'tasks', 'exchange_type': 'direct'}\n"
        "tasks.app.control.broadcast('add_consumer', arguments, reply=True, limit=1)"
    )
    before = odd.log.read_text().count("Connected to")
    odd.call(code)
    # Then the worker, whose connection RabbitMQ closes for that, connects once more
    until(lambda: odd.log.read_text().count("Connected to") == before + 1)


def test_a_message_that_a_worker_refuses_is_an_error_for_its_caller(odd: Odd) -> None:
    # Given a message that did not come through the delay queues, as a foreign program may publish it
    code = (
        "import celery\n"
        "stock = celery.Celery('stock', broker=tasks.app.conf.broker_url, backend='rpc://')\n"
        "stock.conf.update(task_default_queue='default', task_create_missing_queues=True)\n"
        "stock.amqp.queues['default'].no_declare = True\n"
        "options = {'countdown': 86_400, 'link_error': odd.complain.si()}\n"
        "stock.send_task('apps.odd.size', ('x',), **options).get(timeout=20)"
    )
    before = odd.log.read_text().count("complained\n")
    assert "the eta is more than 15 minutes away" in odd.call(code).stderr
    take(odd.url, "dead-letters")
    until(lambda: odd.log.read_text().count("complained\n") == before + 1)


def test_five_mebibytes_there_and_back(odd: Odd) -> None:
    code = "print(odd.size.delay(odd.text.delay(5 * 2**20).get(timeout=30)).get(timeout=30))"
    assert odd.call(code).stdout == f"{5 * 2**20}\n"


def test_a_task_that_comes_too_late_is_an_error_for_its_caller(odd: Odd) -> None:
    before = odd.log.read_text().count("complained\n")
    failed = odd.call(
        "odd.size.apply_async(('x',), expires=-1, link_error=odd.complain.si()).get(timeout=20)"
    )
    assert "TaskRevokedError: expired" in failed.stderr
    # And its link_error runs
    until(lambda: odd.log.read_text().count("complained\n") == before + 1)


def test_a_queue_that_refuses_is_an_error_for_its_caller(odd: Odd, session_node: Node) -> None:
    # Given a queue that takes no message at all
    session_node.control("set_policy", "-p", "odd", "full", "^priority$", '{"max-length": 0}')
    failed = [
        odd.call("tasks.serve_customer.delay('Ada')"),
        odd.call("import celery; celery.group([tasks.serve_customer.s('Ada')]).delay()"),
    ]
    session_node.control("clear_policy", "-p", "odd", "full")
    for program in failed:
        what = "QueueFullError: RabbitMQ did not accept tasks.serve_customer: its queue is full"
        assert what in program.stderr


def test_a_payment_that_is_delivered_twice_is_made_once(odd: Odd) -> None:
    # Given a worker whose process dies after the payment and before its acknowledgement
    order = f"order {time.time_ns()}"
    # When the card is charged
    charged = odd.call(f"print(tasks.charge_card.delay({order!r}, busy=0).get(timeout=20))")
    assert charged.stdout.startswith(order)
    # Then the task runs twice, and pays once
    until(lambda: odd.log.read_text().count(f"charge_card: {order}") == 2)
    assert f"charge_card: {order} paid at attempt 1" in odd.log.read_text()
    assert f"charge_card: {order} was paid before" in odd.log.read_text()


# --- Callers ------------------------------------------------------------------------------------
def test_a_result_comes_after_the_callers_connections_were_closed(odd: Odd, session_node: Node) -> None:
    # Given a caller that waits for a result
    code = (
        "result = odd.size.apply_async(('four',), countdown=3)\nprint('sent')\nprint(result.get(timeout=30))"
    )
    with odd.start(code) as caller:
        assert caller.stdout
        assert caller.stdout.readline() == "sent\n"
        # When all connections are closed before it is there
        session_node.control("close_all_connections", "-p", "odd", "a test")
        # Then it still comes
        assert caller.communicate(timeout=60)[0] == "4\n"


def test_results_that_came_while_the_caller_was_away(odd: Odd, session_node: Node) -> None:
    # Given a caller that has had a result, and whose connections are closed while others come
    code = (
        "print(odd.size.delay('four').get(timeout=30))\n"
        "results = [odd.size.delay('x' * number) for number in range(50)]\n"
        "input()\n"
        "print([result.get(timeout=30) for result in results] == list(range(50)))"
    )
    with odd.start(code) as caller:
        assert caller.stdout
        assert caller.stdout.readline() == "4\n"
        until(lambda: depth(odd.url, "default") == 0)
        session_node.control("close_all_connections", "-p", "odd", "a test")
        # Then it gets them
        assert caller.communicate("\n", timeout=60)[0] == "True\n"


def test_two_threads_of_one_caller_get_their_own_results(odd: Odd) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def sizes(first):\n"
        "    results = [odd.size.delay('x' * number) for number in range(first, first + 100)]\n"
        "    return [result.get(timeout=30) for result in results] == list(range(first, first + 100))\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    print(*pool.map(sizes, (0, 100)))"
    )
    assert odd.call(code).stdout == "True True\n"


def test_threads_wait_for_results_of_one_caller(odd: Odd) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "results = [odd.size.delay('x' * number) for number in range(200)]\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(list(pool.map(lambda result: result.get(timeout=30), results)) == list(range(200)))"
    )
    assert odd.call(code).stdout == "True\n"


def test_a_state_can_be_asked_for_after_a_result(odd: Odd) -> None:
    code = (
        "import time\n"
        "print(odd.size.delay('four').get(timeout=20))\n"
        "result, started = odd.size.delay('x'), time.monotonic()\n"
        "while not result.ready() and time.monotonic() < started + 20: pass\n"
        "print(result.ready(), result.state, result.get(timeout=1))"
    )
    assert odd.call(code).stdout == "4\nTrue SUCCESS 1\n"


def test_the_state_of_a_task_that_reports_progress_can_be_asked_for(odd: Odd, tmp_path: Path) -> None:
    code = (
        f"first, second = {str(tmp_path / '1')!r}, {str(tmp_path / '2')!r}\n"
        # Given two tasks that report progress
        "one, other = (odd.report_progress.delay(first) for _ in range(2))\n"
        "while one.state == 'PENDING' or other.state == 'PENDING': pass\n"
        "print(one.state, other.state, one.state, other.state)\n"
        "open(first, 'w')\n"
        "print(one.get(timeout=20), other.get(timeout=20))\n"
        # And one more, whose caller has waited for a result
        "late = odd.report_progress.delay(second)\n"
        "while late.state == 'PENDING': pass\n"
        "print(odd.size.delay('x').get(timeout=20), late.state, late.info)\n"
        "open(second, 'w')\n"
        "print(late.get(timeout=20), late.state)"
    )
    # Then their caller can ask for their states again and again
    assert odd.call(code).stdout.splitlines() == [
        "PROGRESS PROGRESS PROGRESS PROGRESS",
        "None None",
        "1 PROGRESS {'percent': 50}",
        "None SUCCESS",
    ]


@pytest.mark.parametrize("error", ["BrokenPipeError", "OperationalError"])
def test_an_error_of_on_message_reaches_the_caller(odd: Odd, error: str) -> None:
    code = (
        "from kombu.exceptions import OperationalError\n"
        f"def complain(meta): raise {error}('nobody listens')\n"
        "result = odd.size.delay('x')\n"
        "try: result.get(timeout=20, on_message=complain)\n"
        "except RuntimeError as error: print(error)\n"
        "print(result.get(timeout=20))"
    )
    # And the result is not lost
    assert odd.call(code).stdout == "on_message failed\n1\n"


def test_a_state_can_be_asked_for_after_the_connections_were_closed(odd: Odd, session_node: Node) -> None:
    # Given a caller that has had a result, and whose connections are closed before others come
    code = (
        "print(odd.size.delay('four').get(timeout=30))\n"
        "results = [odd.size.apply_async(('x',), countdown=3) for _ in range(20)]\n"
        "print(tasks.app.oid)\n"
        "input()\n"
        "print({result.state for result in results})"
    )
    with odd.start(code) as caller:
        assert caller.stdout
        assert caller.stdout.readline() == "4\n"
        queue = caller.stdout.readline().strip()
        session_node.control("close_all_connections", "-p", "odd", "a test")
        until(lambda: depth(odd.url, queue) == 21)  # The first one was not acknowledged
        # Then the first look finds them
        assert caller.communicate("\n", timeout=60)[0] == "{'SUCCESS'}\n"


def test_the_state_of_a_retry_has_its_error(odd: Odd) -> None:
    code = (
        "odd.size.delay('x').get(timeout=20)\n"
        "result = tasks.charge_card.delay('an order', busy=1)\n"
        "while result.state != 'RETRY': pass\n"
        "print(repr(result.info))\n"
        "result.get(timeout=20)"
    )
    assert odd.call(code).stdout == "GatewayBusyError('attempt 1 of an order: gateway busy')\n"


def test_a_caller_that_waits_no_time_at_all(odd: Odd) -> None:
    assert "TimeoutError" in odd.call("odd.wait_with_a_limit.delay(1).get(timeout=0)").stderr


def test_hundreds_of_states_are_one_look_at_the_queue(odd: Odd) -> None:
    # Given a caller that has had a result, and a group of tasks that never run
    code = (
        "from celery.result import GroupResult\n"
        "odd.size.delay('four').get(timeout=20)\n"
        "group = GroupResult('group', [tasks.app.AsyncResult(str(n)) for n in range(200)])\n"
        "looks, backend = [], tasks.app.backend\n"
        "drain = backend.result_consumer.drain_events\n"
        "backend.result_consumer.drain_events = lambda timeout: looks.append(1) or drain(timeout)\n"
        "print(group.completed_count(), len(looks) < 20)"
    )
    assert odd.call(code).stdout == "0 True\n"


def test_a_chain_can_be_waited_for_while_rabbitmq_restarts(node: Node, tmp_path: Path) -> None:
    # Given a caller that waits for a chain
    code = (
        "import tasks\n"
        "print(tasks.add.delay(1, 1).get(timeout=20))\n"
        "print((tasks.send_email.s('Ada', 4) | tasks.count_words.s()).delay().get(timeout=60))"
    )
    with (
        Worker("tasks", node.url, tmp_path, "-c1", **PATHS) as worker,
        start_python("-c", code, CELERY_BROKER_URL=node.url) as caller,
    ):
        until(lambda: "tasks.send_email[" in worker.log.read_text())
        # When RabbitMQ restarts
        node.stop()
        node.start()
        # Then its result comes
        assert caller.communicate(timeout=60) == ("2\n{'sent': 1, 'to': 1, 'ada': 1}\n", "")


def test_thousands_of_results_in_any_order(odd: Odd) -> None:
    code = (
        "calls = [odd.size.s('x') for _ in range(8_500)]\n"
        "results = [call.freeze() for call in calls]\n"
        "tasks.app.publish_in_bulk(calls)\n"
        "print(results[-1].get(timeout=100), sum(result.get(timeout=60) for result in results))"
    )
    finished = odd.call(code)
    assert (finished.stdout, finished.stderr) == ("1 8500\n", "")


def test_neither_caller_nor_worker_keeps_what_is_over(odd: Odd) -> None:
    # Given a thousand results, of which many came before they were asked for
    code = (
        "calls = [odd.size.s('x') for _ in range(1_000)]\n"
        "results = [call.freeze() for call in calls]\n"
        "tasks.app.publish_in_bulk(calls)\n"
        "assert sum(result.get(timeout=60) for result in reversed(results)) == 1_000\n"
        "print(len(tasks.app.backend._pending_messages))"
    )
    # Then nothing is left of them where they were taken, and no time limit where they ran
    assert odd.call(code).stdout == "0\n"
    ask = "print(tasks.app.control.broadcast('timers', reply=True, limit=1)[0]['test@localhost'])"
    until(lambda: int(odd.call(ask).stdout) < 100)


def test_the_reply_queue_of_a_dead_caller_expires(odd: Odd, session_node: Node) -> None:
    def reply_queues() -> list[str]:
        names = session_node.control("-q", "list_queues", "-p", "odd", "name", "--no-table-headers").split()
        return [name for name in names if name.count("-") == 4]

    # Given results that expire after ten seconds
    before = set(reply_queues())
    code = "tasks.app.conf.result_expires = 10\nodd.size.delay('x')\nimport os\nos._exit(0)"
    # When a caller dies that has not asked for its result
    odd.call(code)
    assert set(reply_queues()) - before
    # Then its queue is deleted
    until(lambda: not set(reply_queues()) - before, 60)


def test_a_caller_that_publishes_for_longer_than_its_results_last(odd: Odd) -> None:
    # Given a reply queue that expires after eight seconds without a consumer, though it is declared again
    code = (
        "import time\n"
        "tasks.app.conf.result_expires = 4\n"
        "started, calls = time.monotonic(), []\n"
        "while time.monotonic() - started < 10:\n"
        "    calls.append(odd.size.delay('four'))\n"
        "    time.sleep(0.2)\n"
        "print({call.get(timeout=20) for call in calls[-5:]})"
    )
    # Then its queue is still there, with the results of the last seconds
    assert odd.call(code).stdout == "{4}\n"


def test_a_result_lasts_its_time_though_the_reply_queue_was_not_used(odd: Odd) -> None:
    # Given results that expire after ten seconds, and a queue that was last declared five seconds ago
    code = (
        "import time\n"
        "tasks.app.conf.result_expires = 10\n"
        "odd.size.delay('x')\n"
        "time.sleep(4)\n"
        "result = odd.size.delay('four')\n"
        "time.sleep(7.5)\n"  # This is the test: the first ten seconds are over
        "print(result.get(timeout=5))"
    )
    assert odd.call(code).stdout == "4\n"


def test_a_caller_forgets_the_results_that_it_never_asks_for(odd: Odd) -> None:
    # Given results that expire after a second
    code = (
        "tasks.app.conf.result_expires = 1\n"
        "for _ in range(50): odd.size.delay('x')\n"
        "while odd.size.delay('four').get(timeout=20) and tasks.app.backend._pending_messages: pass\n"
        "print('forgotten')"
    )
    assert odd.call(code).stdout == "forgotten\n"


@pytest.mark.parametrize(
    "code",
    [
        "odd.size.delay('x'); odd.size.apply_async(('x',), ignore_result=True)",
        "tasks.app.publish_in_bulk(odd.size.s('x') for _ in range(3))",
        "print(tasks.app.AsyncResult('no such id').state)",
    ],
)
def test_a_caller_that_ends_leaves_no_queue(odd: Odd, session_node: Node, code: str) -> None:
    before = session_node.queues("messages", "odd")
    odd.call(code).check_returncode()
    until(lambda: session_node.queues("messages", "odd").keys() <= before.keys())


def test_a_caller_whose_connections_were_closed_leaves_no_queue(odd: Odd, session_node: Node) -> None:
    before = session_node.queues("messages", "odd")
    with odd.start("odd.size.delay('x')\nprint('called')\ninput()") as caller:
        assert caller.stdout
        assert caller.stdout.readline() == "called\n"
        session_node.control("close_all_connections", "-p", "odd", "a test")
        caller.communicate("\n", timeout=30)
    until(lambda: session_node.queues("messages", "odd").keys() <= before.keys())


def test_results_that_nobody_takes_expire_in_the_reply_queue(odd: Odd) -> None:
    # Given a caller that never asks, and calls again and again so that its queue does not expire
    code = (
        "import time, tasks\n"
        "from reliable.testing import depth\n"
        "tasks.app.conf.result_expires = 10\n"  # After half of it a program consumes, and then none expires
        "for _ in range(5): odd.size.delay('x')\n"
        "url, queue = tasks.app.conf.broker_url, tasks.app.oid\n"
        "while not depth(url, queue): pass\n"
        "while depth(url, queue): time.sleep(0.1)\n"
        "print('expired')"
    )
    assert odd.call(code).stdout == "expired\n"


def test_a_caller_that_was_idle_until_its_reply_queue_expired(odd: Odd, session_node: Node) -> None:
    # Given a caller whose reply queue expires after four seconds without a consumer, and that does nothing
    code = (
        "tasks.app.conf.result_expires = 2\n"
        "odd.size.delay('x')\n"
        "print(tasks.app.backend.oid)\n"
        "input()\n"
        "print(odd.size.delay('xx').get(timeout=20))"
    )
    with odd.start(code) as caller:
        assert caller.stdout
        queue = caller.stdout.readline().strip()
        until(lambda: queue not in session_node.control("-q", "list_queues", "-p", "odd", "name"))
        # When it calls again, then it gets its result
        assert caller.communicate("\n", timeout=30)[0] == "2\n"


# --- Traps of the pair --------------------------------------------------------------------------
def test_two_workers_of_one_name_both_work(fresh: str, tmp_path: Path) -> None:
    with (
        Worker("tasks", fresh, tmp_path, "-c1", **PATHS) as first,
        Worker("tasks", fresh, tmp_path, "-c1", **PATHS) as second,
    ):
        code = "import tasks; print(sum(tasks.add.delay(1, 1).get(timeout=20) for _ in range(20)))"
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout == "40\n"
        assert first.running()
        assert second.running()
        first.kill()
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout == "40\n"
        assert celery(fresh, "inspect", "ping", "-d", second.name).returncode == 0


def test_a_time_limit_spares_a_task_the_brokers_time_out(tmp_path: Path) -> None:
    # Given a RabbitMQ that waits five seconds for an acknowledgement, where thirty minutes are usual
    quick = (
        "-rabbit consumer_timeout 5000 -rabbit channel_tick_interval 1000 -rabbit quorum_tick_interval 1000"
    )
    with Node(tmp_path, RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=quick) as node:
        odd = Odd(node.url, tmp_path)
        with odd.worker:
            # When a task takes longer, and has a shorter time limit
            failed = odd.call("odd.wait_with_a_limit.delay(30).get(timeout=20)")
            assert "TimeLimitExceeded" in failed.stderr
            # Then it ran once, and is a dead letter
            (letter,) = take(node.url, "dead-letters")
            assert letter.headers["task"] == "apps.odd.wait_with_a_limit"
            assert odd.log.read_text().count("started\n") == 1


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("tasks.add", b"not JSON"),
        ("tasks.unknown", b"[[], {}, {}]"),
        ("apps.odd.wait_with_a_limit", b"[[300], {}, {}]"),
        ("apps.odd.kill_itself", b"[[], {}, {}]"),
        ("apps.odd.kill_itself_and_forget", b"[[], {}, {}]"),
    ],
    ids=["not JSON", "unknown", "over its time limit", "killed", "killed, and acknowledged when it fails"],
)
def test_what_a_worker_cannot_report_is_delivered_again(
    fresh: str, tmp_path: Path, task: str, body: bytes
) -> None:
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with (
        Worker("tasks", fresh, tmp_path, "-c1", "--include", "apps.odd", **PATHS) as worker,
        Connection(fresh) as connection,
    ):
        # Given a caller whose reply queue is full
        caller = Queue("caller", queue_arguments=limits)(connection.channel())
        caller.declare()
        producer = connection.Producer()
        producer.publish("full", routing_key="caller")
        # When a worker receives a message which it must report to that caller
        headers = {"task": task, "id": "1"}
        kind = {"content_type": "application/json", "content_encoding": "utf-8", "headers": headers}
        to = {"exchange": "tasks", "routing_key": "default", "reply_to": "caller", "correlation_id": "1"}
        producer.publish(body, **kind, **to)
        until(lambda: "so RabbitMQ will redeliver it" in worker.log.read_text())
        take(fresh, "caller")
        # Then its caller is told later, it is a dead letter, and the worker runs
        assert take(fresh, "caller")[0].payload["status"] == "FAILURE"
        if "forget" not in task:
            assert take(fresh, "dead-letters")[0].headers["x-death"][0]["reason"] == "rejected"
        assert worker.running()


@pytest.mark.parametrize(("persistent", "printed"), [("yes", "4"), ("no", "TimeoutError")])
def test_persistent_results_survive_a_restart_of_rabbitmq(
    node: Node, tmp_path: Path, persistent: str, printed: str
) -> None:
    # Given a result that its caller has not fetched yet
    code = (
        "import tasks\n"
        f"tasks.app.conf.result_persistent = {persistent == 'yes'}\n"
        "result = tasks.add.delay(2, 2)\n"
        "print(tasks.app.thread_oid)\n"
        "input()\n"
        "try: print(result.get(timeout=10))\n"
        "except Exception as error: print(type(error).__name__)"
    )
    options = ("-c1", f"result_persistent={persistent}")
    with (
        Worker("tasks", node.url, tmp_path, *options, **PATHS),
        start_python("-c", code, CELERY_BROKER_URL=node.url) as caller,
    ):
        assert caller.stdout
        reply_queue = caller.stdout.readline().strip()
        until(lambda: node.queues("messages").get(reply_queue) == 1)
        until(
            lambda: node.queues("messages")["default"] == 0
        )  # The task is acknowledged, and will not run again
        # When RabbitMQ is restarted
        node.stop()
        node.start()
        # Then a persistent result is still there, and a transient one is lost
        assert caller.communicate("\n", timeout=60)[0].strip() == printed


def test_dead_letters_that_were_looked_at_survive_a_restart_of_rabbitmq(node: Node) -> None:
    # Given fifty dead letters, of which ten are discarded after somebody has looked at all
    declare_queues(node.url)
    with Connection(node.url) as connection:
        producer: Any = connection.Producer(exchange=Exchange("dead-letters", "fanout"))
        for number in range(50):
            producer.publish({}, headers={"id": str(number), "task": "old" if number >= 40 else "new"})
    celery(node.url, "dead-letters", "list").check_returncode()
    discarded = celery(node.url, "dead-letters", "discard", "--yes", "--task", "old")
    assert discarded.stdout == "10 deleted\n"
    # When RabbitMQ is restarted
    node.stop()
    node.start()
    # Then the other forty are there
    listed = celery(node.url, "dead-letters", "list", "--json").stdout.splitlines()
    assert {json.loads(line)["id"] for line in listed} == {str(number) for number in range(40)}
    assert len(listed) == 40


def test_a_replay_that_is_cut_off_tells_why(fresh: str) -> None:
    # Given a dead letter
    declare_queues(fresh)
    with Connection(fresh) as connection:
        producer: Any = connection.Producer(exchange=Exchange("dead-letters", "fanout"))
        death = {"queue": "default", "reason": "rejected"}
        producer.publish({}, headers={"id": "1", "task": "tasks.add", "x-death": [death]})
    # When the connection breaks during a replay
    code = (
        "from celery.__main__ import main\nfrom reliable.dead_letters import DeadLetter\n"
        "replay = DeadLetter.replay\n"
        "def cut(self):\n"
        "    self.message.channel.connection.transport.sock.shutdown(2)\n"
        "    replay(self)\n"
        "DeadLetter.replay = cut\nmain()\n"
    )
    ended = python("-c", code, "-A", "tasks", "dead-letters", "replay", CELERY_BROKER_URL=fresh)
    # Then it ends with what happened, and a fix
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("Fix: ")


def test_dead_letters_of_no_app() -> None:
    finished = python("-m", "celery", "dead-letters", "list")
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1] == "Fix: name it after -A: celery -A APP dead-letters …"
