"""Dead letters: the command that lists, shows, replays and discards them."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Exchange
from programs import PATHS, celery, declare_queues, python, start_python, what_is_wrong

from reliable.rabbitmq_node import Node
from reliable.testing import Worker, depth, take, until

PUBLISH_EXPIRED = (  # nobody consumes them
    "import sys, tasks\n"
    "tasks.app.publish_in_bulk(tasks.check_price.s(i).set(expires=0.001) for i in range(int(sys.argv[1])))\n"
)
PUBLISH_LARGE = (
    "import tasks\n"
    "tasks.app.publish_in_bulk(tasks.count_words.s('x' * 10_000).set(expires=0.001) for _ in range(3000))\n"
)


def expire(url: str, number: int, program: str = PUBLISH_EXPIRED) -> None:
    """Publish tasks that expire before anybody runs them, and wait until they are dead letters."""
    python("-c", program, str(number), CELERY_BROKER_URL=url).check_returncode()
    until(lambda: depth(url, "dead-letters") == number)


def dead_letters(url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `celery dead-letters`."""
    return celery(url, "dead-letters", *arguments)


def listed(url: str, *arguments: str) -> list[dict[str, Any]]:
    """Return what `dead-letters list --json` prints."""
    printed = dead_letters(url, "list", "--json", *arguments)
    assert printed.returncode == 0, printed.stderr
    return [json.loads(line) for line in printed.stdout.splitlines()]


def test_dead_letters_are_listed(fresh: str) -> None:
    # Given two expired tasks
    expire(fresh, 2)
    # When they are listed
    letters = listed(fresh)
    # Then each is there with all that is known of it, and stays
    assert [letter["arguments"] for letter in letters] == ["(0,)", "(1,)"]
    assert {(x["task"], x["reason"], x["queue"], x["count"]) for x in letters} == {
        ("tasks.check_price", "expired", "default", 1)
    }
    assert all(letter["age"].startswith("0:00:") and len(letter["id"]) == 36 for letter in letters)
    assert depth(fresh, "dead-letters") == 2
    # And people read them as a table
    lines = dead_letters(fresh, "list").stdout.splitlines()
    assert lines[0].split() == ["task", "id", "arguments", "reason", "count", "age"]
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80


def test_the_list_has_the_whole_name_of_a_task(fresh: str) -> None:
    declare_queues(fresh)
    name = "shop.services.notifications.send_notification"
    with Connection(fresh) as connection:
        producer: Any = connection.Producer(exchange=Exchange("dead-letters", "fanout"))
        producer.publish({}, headers={"task": name, "argsrepr": "('a@example.com', 'b@example.com')"})
    _, line = dead_letters(fresh, "list").stdout.splitlines()
    assert line.startswith(f"{name} ")
    assert "('a@example.com', '… " in line


def test_what_is_no_task_is_listed_without_its_control_characters(fresh: str) -> None:
    declare_queues(fresh)
    with Connection(fresh) as connection, connection.channel() as channel:
        producer: Any = connection.Producer(channel, exchange=Exchange("dead-letters", "fanout"))
        producer.publish(
            b"\x1b[31mred\x07" + b"x" * 100, content_type="text/plain", content_encoding="binary"
        )
        producer.publish({}, headers={"task": "\x1b[2Jred\n", "id": "\x1b7"})
    first, second = listed(fresh)
    assert (first["task"], first["reason"], first["queue"]) == ("not a task", "published here", "")
    assert len(first["arguments"]) == 40
    assert (second["task"], second["id"]) == ("?[2Jred?", "?7")
    assert len(listed(fresh, "--task", "not a task")) == 1
    # They have no queue to go back to
    replayed = dead_letters(fresh, "replay")
    assert (replayed.returncode, replayed.stdout) == (2, "0 published again\n")
    assert "2 not published again: not a task: it did not come from a queue; ?7: it" in replayed.stderr
    assert depth(fresh, "dead-letters") == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"replays": "many", "id": ["7"]},
        {"x-death": "\x1b[31m", "id": None},
        {"x-death": [], "compression": "no such thing"},
        {"x-death": ["default"], "compression": "application/x-gzip"},
        {"x-death": [{"queue": ["default"], "reason": "\x1b[31m", "time": 7}]},
    ],
)
def test_odd_headers_do_no_harm(fresh: str, headers: dict[str, Any]) -> None:
    declare_queues(fresh)
    with Connection(fresh) as connection, connection.channel() as channel:
        producer: Any = connection.Producer(channel, exchange=Exchange("dead-letters", "fanout"))
        producer.publish(b"{}", headers=headers, content_type="application/json", content_encoding="utf-8")
    (letter,) = listed(fresh)
    assert letter["count"] == 1
    assert "\x1b" not in str(letter)
    assert "1 not published again: " in dead_letters(fresh, "replay").stderr
    assert depth(fresh, "dead-letters") == 1


def test_a_compressed_task_is_replayed_as_it_is(fresh: str, tmp_path: Path) -> None:
    with Worker("tasks", fresh, tmp_path, "-c1", **PATHS):
        code = (
            "import subprocess, sys, tasks, time\n"
            "from reliable.dead_letters import wait_for\n"
            "result = tasks.ship.apply_async(('lamp', time.time() + 2), compression='zlib')\n"
            "try: result.get(timeout=20)\n"
            "except tasks.OutOfStockError: result.forget()\n"
            "with wait_for(tasks.app, result.id): time.sleep(2)\n"
            "replay = ['-m', 'celery', '-A', 'tasks', 'dead-letters', 'replay', result.id]\n"
            "subprocess.run([sys.executable, *replay], check=True)\n"
            "print(tasks.app.AsyncResult(result.id).get(timeout=20))"
        )
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout.endswith("\nlamp: shipped\n")


def test_a_replay_to_a_full_queue_says_so(fresh: str, session_node: Node) -> None:
    expire(fresh, 20)
    host = fresh.rpartition("/")[2]
    session_node.control("set_policy", "-p", host, "full", "^default$", '{"max-length": 3}')
    stopped = dead_letters(fresh, "replay")
    assert "the queue default is full" in what_is_wrong(stopped)
    published = int(stopped.stdout.split()[0])
    assert 0 < published < 20
    assert depth(fresh, "default") == published
    assert depth(fresh, "dead-letters") == 20 - published


def test_an_empty_id_is_refused(fresh: str) -> None:
    # Given a script whose variable is not set
    expire(fresh, 1)
    for command in "replay", "discard":
        refused = dead_letters(fresh, command, "")
        # Then no letter is touched
        assert "it is empty" in refused.stderr
        assert refused.returncode == 2
    assert depth(fresh, "dead-letters") == 1


def test_a_replayed_task_may_be_retried_as_often_as_a_new_one(fresh: str) -> None:
    # Given the dead letter of a task after its second retry
    code = "import tasks; tasks.check_price.apply_async((1,), retries=2, expires=0.001)"
    python("-c", code, CELERY_BROKER_URL=fresh).check_returncode()
    until(lambda: depth(fresh, "dead-letters") == 1)
    # When it is replayed
    dead_letters(fresh, "replay").check_returncode()
    # Then it is at its first attempt
    (message,) = take(fresh, "default")
    assert message.headers["retries"] == 0


def test_letters_of_one_task_are_selected(fresh: str) -> None:
    expire(fresh, 2)
    assert len(listed(fresh, "--task", "tasks.check_price")) == 2
    assert len(listed(fresh, "--reason", "expired")) == 2
    for command, prints in [
        (("list", "--task", "tasks.add", "--json"), ""),
        (("discard", "--yes", "--reason", "rejected"), "0 deleted\n"),
        (("replay", "--task", "tasks.add"), "0 published again\n"),
    ]:
        finished = dead_letters(fresh, *command)
        assert what_is_wrong(finished) == "None of the 2 dead letters matches"
        assert finished.stdout == prints


def test_a_whole_letter_is_shown(fresh: str) -> None:
    expire(fresh, 1)
    (letter,) = listed(fresh)
    shown = json.loads(dead_letters(fresh, "show", letter["id"][:8]).stdout)
    assert shown["headers"]["task"] == "tasks.check_price"
    assert shown["headers"]["x-death"][0]["reason"] == "expired"
    assert shown["body"][0] == [0]
    assert json.loads(dead_letters(fresh, "show").stdout)["headers"]["id"] == letter["id"]
    assert "No dead letter has an ID that starts with no-such-id" in what_is_wrong(
        dead_letters(fresh, "show", "no-such-id")
    )


def test_the_arguments_of_a_secret_task_that_follows_are_not_shown(fresh: str) -> None:
    code = (
        "import tasks\n"
        "first = tasks.count_words.si('sesame').set(expires=0.001)\n"
        "(first | tasks.charge_card.si('order 7', card='5500')).delay()"
    )
    python("-c", code, CELERY_BROKER_URL=fresh).check_returncode()
    until(lambda: depth(fresh, "dead-letters") == 1)
    shown = dead_letters(fresh, "show").stdout
    assert "sesame" in shown
    assert "5500" not in shown


def test_a_letter_is_found_by_an_id_of_any_length(fresh: str) -> None:
    task_id = f"{'order ' * 10}parcel"
    code = f"import tasks; tasks.check_price.apply_async((1,), task_id={task_id!r}, expires=0.001)"
    python("-c", code, CELERY_BROKER_URL=fresh).check_returncode()
    until(lambda: depth(fresh, "dead-letters") == 1)
    assert json.loads(dead_letters(fresh, "show", task_id).stdout)["headers"]["id"] == task_id


def test_a_reader_that_goes_away_is_not_an_error_of_rabbitmq(fresh: str) -> None:
    expire(fresh, 1)
    listing = ["-m", "celery", "-A", "tasks", "dead-letters", "list"]
    with start_python(*listing, CELERY_BROKER_URL=fresh) as program:
        assert program.stdout
        assert program.stderr
        program.stdout.close()
        assert "RabbitMQ" not in program.stderr.read()


def test_letters_are_discarded_after_a_question(fresh: str) -> None:
    expire(fresh, 3)
    first = listed(fresh)[0]["id"]
    assert dead_letters(fresh, "discard").returncode == 1  # Nobody says yes
    assert depth(fresh, "dead-letters") == 3
    with_another_reason = dead_letters(fresh, "discard", "--yes", first, "--reason", "rejected")
    assert what_is_wrong(with_another_reason) == "None of the 3 dead letters matches"
    assert dead_letters(fresh, "discard", "--yes", first, "no-such-id").stdout == "1 deleted\n"
    assert dead_letters(fresh, "discard", "--yes").stdout == "2 deleted\n"
    assert depth(fresh, "dead-letters") == 0


def test_named_dead_letters_are_replayed(fresh: str, tmp_path: Path) -> None:
    # Given three dead letters, and a worker
    expire(fresh, 3)
    letters = listed(fresh)
    with Worker("tasks", fresh, tmp_path, "-c2", **PATHS):
        # When two are replayed, and one that is not there
        ids = [letters[0]["id"], letters[2]["id"], "no-such-id"]
        replayed = dead_letters(fresh, "replay", *ids)
        # Then these two run, though they are late, and the driver names the one
        assert replayed.stdout == "2 published again\n"
        assert replayed.returncode == 2
        assert "starts with no-such-id, or another command is reading it" in what_is_wrong(replayed)
        until(lambda: depth(fresh, "default") == 0)
        assert [letter["id"] for letter in listed(fresh)] == [letters[1]["id"]]


def test_a_replay_can_be_interrupted(fresh: str) -> None:
    # Given thousands of dead letters
    expire(fresh, left := 3000)
    replay = ["-m", "celery", "-A", "tasks", "dead-letters", "replay"]
    for _ in range(6):
        before = depth(fresh, "default")
        with start_python(*replay, CELERY_BROKER_URL=fresh) as program:
            # When a replay is interrupted while it runs
            until(lambda: depth(fresh, "default") > before)  # noqa: B023
            program.send_signal(signal.SIGINT)
            # Then it ends, and reports how many it has published
            printed, _ = program.communicate(timeout=20)
        left -= int(printed.removesuffix(" published again\n"))
        until(lambda: depth(fresh, "dead-letters") == left)  # noqa: B023


def test_a_replay_that_fails_again_is_counted(fresh: str, tmp_path: Path) -> None:
    # Given a task that fails each time
    with Worker("tasks", fresh, tmp_path, "-c1", **PATHS):
        code = "import tasks; tasks.ship.apply_async(('lamp', 1e12), ignore_result=True)"
        python("-c", code, CELERY_BROKER_URL=fresh).check_returncode()
        # When it is replayed, twice
        for _ in range(2):
            until(lambda: depth(fresh, "dead-letters") == 1)
            assert dead_letters(fresh, "replay").stdout == "1 published again\n"
        # Then it is a dead letter again, of three deaths
        until(lambda: depth(fresh, "dead-letters") == 1)
        (letter,) = listed(fresh)
        assert (letter["task"], letter["reason"], letter["count"]) == ("tasks.ship", "rejected", 3)


def test_a_replay_that_is_killed_loses_nothing(fresh: str) -> None:
    # Given many dead letters
    expire(fresh, 500)
    # When a replay is killed in the middle
    command = ["-m", "celery", "-A", "tasks", "dead-letters", "replay"]
    with start_python(*command, CELERY_BROKER_URL=fresh) as replay:
        until(lambda: depth(fresh, "default") > 100)
        replay.kill()
    # Then each is in one queue or the other, and at most one in both
    until(lambda: depth(fresh, "default") + depth(fresh, "dead-letters") >= 500)
    assert 500 <= depth(fresh, "default") + depth(fresh, "dead-letters") <= 501
    assert depth(fresh, "dead-letters") > 0
    # And the rest can be replayed
    dead_letters(fresh, "replay").check_returncode()
    assert depth(fresh, "dead-letters") == 0
    assert 500 <= depth(fresh, "default") <= 501


@pytest.mark.timeout(300)  # seconds
def test_thousands_of_dead_letters_take_no_more_memory_than_ten(fresh: str) -> None:
    # Given a program that prints the greatest use of memory
    code = (
        "import resource, subprocess, sys\n"
        "command = [sys.executable, '-m', 'celery', '-A', 'tasks', 'dead-letters', *sys.argv[1:]]\n"
        "done = subprocess.run(command, stdout=subprocess.DEVNULL)\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )

    def kibibytes(*arguments: str) -> int:
        status, used = python("-c", code, *arguments, CELERY_BROKER_URL=fresh).stdout.split()
        assert status == "0"
        return int(used)

    expire(fresh, 10)
    few = kibibytes("list"), kibibytes("replay")
    celery(fresh, "amqp", "queue.purge", "default").check_returncode()  # nothing expires behind what does not
    expire(fresh, 3000, PUBLISH_LARGE)
    # Then it needs for 30 MB what it needs for ten small ones, and 10 MiB at most beside
    assert kibibytes("list") < few[0] + 10 * 1024
    assert kibibytes("replay") < few[1] + 10 * 1024
    assert depth(fresh, "dead-letters") == 0
    until(lambda: depth(fresh, "default") == 3000)


def test_a_virtual_host_where_no_worker_has_run_is_left_as_it_is(
    fresh: str, session_node: Node, tmp_path: Path
) -> None:
    for command in ("list",), ("show",), ("replay",), ("discard", "--yes"):
        stopped = dead_letters(fresh, *command)
        assert "no queue 'dead-letters' in vhost" in what_is_wrong(stopped)
    assert session_node.queues("messages", tmp_path.name) == {}


def test_a_user_who_may_only_read_can_look(fresh: str, session_node: Node, tmp_path: Path) -> None:
    expire(fresh, 1)
    session_node.control("add_user", "looker", "secret")
    session_node.control("set_permissions", "-p", tmp_path.name, "looker", "^$", "^$", "^dead-letters$")
    (letter,) = listed(fresh.replace("guest:guest", "looker:secret"))
    assert letter["task"] == "tasks.check_price"


def test_without_rabbitmq_there_are_none() -> None:
    for variables in ({"CELERY_BROKER_URL": "amqp://ada:secret@127.0.0.1:1//"}, {"RABBITMQ_PORT": "1"}):
        stopped = python("-m", "celery", "-A", "tasks", "dead-letters", "list", **variables)
        assert what_is_wrong(stopped).startswith("Cannot connect to RabbitMQ at amqp://")


@pytest.mark.parametrize("delay", [None, 1])
def test_a_replayed_dead_letter_reaches_its_caller(worker: Worker, shop: Any, delay: int | None) -> None:
    # Given a task that fails, at once or after a delay, so that its first death is in a delay queue
    in_stock_from = time.time() + 5
    shipped = shop.ship.apply_async(("lamp", in_stock_from), countdown=delay)
    with pytest.raises(shop.OutOfStockError):
        shipped.get(timeout=10)
    # When its dead letter is published again, once it can be run
    shipped.forget()
    until(lambda: time.time() > in_stock_from)
    until(lambda: depth(worker.url, "dead-letters") == 1)
    (letter,) = listed(worker.url)
    assert (letter["reason"], letter["queue"]) == ("rejected", "default")
    assert dead_letters(worker.url, "replay", shipped.id).stdout == "1 published again\n"
    # Then its result reaches the caller, and no dead letter is left
    assert shop.app.AsyncResult(shipped.id).get(timeout=10) == "lamp: shipped"
    assert depth(worker.url, "dead-letters") == 0
