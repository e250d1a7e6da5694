"""The driver: enqueues work lesson by lesson, and prints what came back.

    $ python run_tasks.py                   every lesson
    $ python run_tasks.py retries crash     these two
    $ python run_tasks.py words README.md   count the words of your own files and folders
    $ python run_tasks.py --dead-letters    list the tasks that failed
    $ python run_tasks.py --replay [ID]...  run these again, or all of them

It uses the RabbitMQ of `.env` and the workers that answer there. It starts a worker where none does,
and where there is no RabbitMQ, it runs both inside this process. A lesson that did not see what it
teaches fails, and so does the run.
"""

import contextlib
import difflib
import functools
import json
import math
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NoReturn

import click
from amqp import AccessRefused, AMQPError, NotAllowed, PreconditionFailed
from amqp.basic_message import Message as Letter
from amqp.exceptions import MessageNacked
from celery import chord, group
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ImproperlyConfigured
from celery.exceptions import TimeoutError as NoAnswer
from celery.result import AsyncResult
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

import celeryconfig
import tasks
from celeryconfig import stop
from tasks import app

HERE = Path(__file__).parent
TIMEOUT = 30  # seconds that a lesson waits for one answer
WORKERS: dict[str, Any] = {}  # what each worker node said of itself when it was found, by its name
FOREVER = contextlib.ExitStack()  # never closed: it holds the embedded worker until the process ends
OWN_WORKERS: set[int] = set()  # the process groups of the workers that the driver started
# What may be wrong around a lesson: it ends the run, with a line on it and one on its cure.
FAULTS: dict[type[Exception], tuple[str, str]] = {
    PreconditionFailed: ("RabbitMQ has it with other arguments", tasks.INEQUIVALENT_CURE),
    AccessRefused: ("RabbitMQ refuses this user or password", "correct RABBITMQ_USER and RABBITMQ_PASSWORD"),
    NotAllowed: ("RabbitMQ does not let this user into the virtual host", tasks.ACCESS_CURE),
    AMQPError: ("RabbitMQ says no", "docker compose ps, or rabbitmqctl status"),
    NoAnswer: (
        f"No worker answered in {TIMEOUT} s",
        "read the worker's log; it must have this tasks.py, its queues and the same CELERY_RESULT_BACKEND",
    ),
    ImproperlyConfigured: ("A setting is wrong", "correct .env as .env.example shows"),
    ImportError: ("A setting asks for a package that is not there", "correct CELERY_RESULT_BACKEND"),
    OperationalError: ("The connection to RabbitMQ failed", "docker compose ps, or rabbitmqctl status"),
    ConnectionError: ("A connection was cut", "docker compose ps, or rabbitmqctl status"),
    TimeoutError: ("RabbitMQ does not answer", "rabbitmqctl status tells what it is short of"),
    OSError: ("The system refused", "correct what it names"),
    click.ClickException: ("The command line is wrong", "python run_tasks.py --help"),
}
Rows = list[dict[str, Any]]


class NotSeenError(Exception):
    """A lesson did not see what it teaches: what it saw instead."""


# --- What the lessons are made of ---------------------------------------------------------------
def is_embedded() -> bool:
    """Tell whether the broker is kombu's memory:// in this process."""
    return os.environ.get("CELERY_BROKER_URL") == "memory://"


def is_prefork() -> bool:
    """Tell whether every worker node runs its tasks in processes, of which one can be lost."""
    return all("prefork" in node["pool"]["implementation"] for node in WORKERS.values())


NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "rabbitmq": (lambda: not is_embedded(), "only RabbitMQ can (see the README: With RabbitMQ)"),
    "prefork": (is_prefork, "it would kill the worker: celery -A tasks worker --pool prefork"),
    "rpc": (lambda: app.backend.as_uri() == "rpc://", "no states come without CELERY_RESULT_BACKEND=rpc://"),
}
LESSONS: dict[str, tuple[Callable[..., Rows], tuple[str, ...]]] = {}


def lesson(*needs: str) -> Callable[[Callable[..., Rows]], Callable[..., Rows]]:
    """Add a lesson: its docstring is the sentence above the rows that it returns."""

    def add(function: Callable[..., Rows]) -> Callable[..., Rows]:
        LESSONS[function.__name__] = function, needs
        return function

    return add


def check(as_taught: bool, saw: object) -> None:
    """Raise NotSeenError with what the lesson saw, unless it saw what it teaches."""
    if not as_taught:
        raise NotSeenError(f"it saw {saw}")


def slots() -> int:
    """Return how many tasks the worker nodes can run at once."""
    return sum(int(node["pool"]["max-concurrency"]) for node in WORKERS.values())


def inspect() -> Any:
    """Return Celery's `inspect`: it waits five seconds for the nodes of WORKERS, or one for any."""
    return app.control.inspect(list(WORKERS) or None, timeout=5 if WORKERS else 1, limit=len(WORKERS) or None)


def bar(steps: Any, label: str) -> Any:
    """Show a progress bar on stderr, over an iterable or a number of steps; no terminal, no bar."""
    kind = "length" if isinstance(steps, int) else "iterable"
    return click.progressbar(**{kind: steps}, label=f"  {label}", file=sys.stderr, show_eta=False)


def collect(results: list[AsyncResult[Any]], label: str) -> list[Any]:
    """Wait for results, and return their values in order. Raises what a task raised, or NoAnswer."""
    with bar(results, label) as waiting:
        return [result.get(timeout=TIMEOUT) for result in waiting]


def watch(result: AsyncResult[Any], steps: int, label: str) -> list[tuple[float, str, Any]]:
    """Wait for a result, and return each state on its way: seconds until it came, name, content."""
    started, states = time.monotonic(), []
    with bar(steps, label) as waiting:

        def on_message(message: dict[str, Any]) -> None:
            if message["task_id"] == result.id:
                states.append((time.monotonic() - started, message["status"], message["result"]))
                waiting.update(1)

        result.get(timeout=TIMEOUT, on_message=on_message, propagate=False)
    return states


def error_of(result: AsyncResult[Any]) -> dict[str, str]:
    """Return name and text of the exception that a task ends with. Raises NotSeenError without one."""
    result.get(timeout=TIMEOUT, propagate=False)
    check(isinstance(result.result, Exception), f"{result.result}, and no error")
    return {"error": type(result.result).__name__, "message": str(result.result)}


def depth(queue: Queue, channel: Any) -> int:
    """Return how many messages wait in a queue by now."""
    bound: Any = queue(channel)
    return int(bound.queue_declare(passive=True).message_count)


def letters(channel: Any, steps: Iterable[int]) -> Iterator[Letter]:
    """Take a dead letter at each step, as it is. One that is not acknowledged goes back with the channel."""
    for _ in steps:
        if letter := channel.basic_get(celeryconfig.dead_letters.name):
            letter.channel = channel
            yield letter


def acknowledge(letter: Letter) -> None:
    """Let RabbitMQ forget a dead letter."""
    letter.channel.basic_ack(letter.delivery_tag)


@contextlib.contextmanager
def dead_letter(task_id: str) -> Iterator[Letter]:
    """Give the dead letter of a task, when it is there. Raises NotSeenError if it does not come."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        with app.connection_for_write() as connection, connection.channel() as channel:
            for letter in letters(channel, range(depth(celeryconfig.dead_letters, channel))):
                if described(letter)["id"] == task_id:
                    yield letter
                    return
        time.sleep(0.05)  # it is on its way
    check(as_taught=False, saw=f"no dead letter of task {task_id}")


def described(letter: Letter) -> dict[str, Any]:
    """Return what a person wants to know of a dead letter. Anybody may have made it, with any headers."""
    headers: dict[str, Any] = letter.headers or {}
    deaths = headers.get("x-death")  # what RabbitMQ notes, the last first
    death = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    died, replays = death.get("time"), headers.get("replays")

    def short(text: object, width: int) -> str:
        signs = [sign if sign.isprintable() else "?" for sign in str(text)[: width + 1]]
        return "".join(signs if len(signs) <= width else [*signs[: width - 1], "\u2026"])

    arguments = f"{headers.get('argsrepr', '')} {headers.get('kwargsrepr', '')}".removesuffix(" {}").strip()
    if tasks.is_secret(headers.get("task")):
        arguments = tasks.SECRET["argsrepr"]
    age = app.now() - died.replace(tzinfo=timezone.utc) if isinstance(died, datetime) else timedelta()
    return {
        "task": short(headers.get("task", "no task"), 40),
        "id": short(headers.get("id", ""), 36),
        "arguments": short(arguments or letter.body, 40),
        "reason": short(death.get("reason", "published here"), 16),
        "queue": short(death.get("queue", ""), 40),
        "count": 1 + (replays if isinstance(replays, int) else 0),
        "age": str(timedelta(seconds=int(age.total_seconds()))),
    }


def replay(letter: Letter) -> bool:
    """Publish a dead letter to the queue that it came from; acknowledge it once RabbitMQ has confirmed that.

    Return whether that could be: not if the queue is none of `celeryconfig.task_queues` (any more).
    Raises kombu's OperationalError if the queue is full.
    """
    known = described(letter)
    if known["queue"] not in app.amqp.queues:
        return False
    ours = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")
    headers: dict[str, Any] = {k: v for k, v in (letter.headers or {}).items() if not k.startswith(ours)}
    headers |= {"expires": None, "replays": known["count"]}  # it may run however late
    again = Letter(letter.body, **{**letter.properties, "application_headers": headers})
    try:
        letter.channel.basic_publish(again, celeryconfig.task_default_exchange, known["queue"])
    except MessageNacked:
        raise OperationalError(f"the queue {known['queue']} is full") from None
    acknowledge(letter)
    return True


def text_files(paths: Iterable[Path], skip: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the files that are named, and those in the folders that are named, but for hidden ones."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for folder, subfolders, names in os.walk(path, onerror=skip):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces of at most 16,000 signs, cut where there is no word.

    What is not UTF-8 becomes U+FFFD. Raises OSError, and ValueError for what is no text.
    """
    if not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        if b"\0" in file.read(8000):  # as git tells text from other files
            raise ValueError("binary")
    with path.open(encoding="utf-8", errors="replace") as file:
        rest = ""
        while block := file.read(8000):
            text = rest + block
            rest = re.split(r"\W", text)[-1]  # a word that may go on
            yield text.removesuffix(rest)
            if len(rest) > 8000:
                raise ValueError("left out from a word of more than 8,000 signs on")
        yield rest


def messages(files: Iterable[Path], skip: Callable[[Path, Exception], None]) -> Iterator[str]:
    """Yield the text of all files, in as few messages as their limit of 16,000 signs (64 kB) allows."""
    message = ""
    for path in files:
        try:
            for piece in pieces(path):
                if len(message) + len(piece) > 16_000:
                    yield message
                    message = ""
                message += piece
            message += "\n"
        except (OSError, ValueError) as error:
            skip(path, error)
    if message.strip():
        yield message


# --- The lessons --------------------------------------------------------------------------------
@lesson()
def hello() -> Rows:
    """Calling a task returns at once; its result comes back when a worker has run it."""
    rows: Rows = []
    for call, task in {"2 + 2": tasks.add.s(2, 2), "which worker?": tasks.worker_name.s()}.items():
        started = time.perf_counter()
        result = task.delay()
        value = result.get(timeout=TIMEOUT)
        milliseconds = 1000 * (time.perf_counter() - started)
        rows += [{"call": call, "result": value, "state": result.state, "ms": milliseconds, "id": result.id}]
    check(rows[0]["result"] == 4, rows)
    return rows


@lesson()
def parallel() -> Rows:
    """Slow work done one after another makes the visitor wait; done at once by many, it does not."""
    emails = [tasks.send_email.s(f"customer{number}@example.com") for number in range(1, 9)]
    started = time.perf_counter()
    with bar(emails, "8 e-mails, one after another") as waiting:
        for email in waiting:
            email.delay().get(timeout=TIMEOUT)
    one_by_one = time.perf_counter() - started
    collect([email.delay() for email in emails], "8 e-mails at once")
    at_once = time.perf_counter() - started - one_by_one
    ideal = len(emails) / math.ceil(len(emails) / slots())
    row = {"one after another, s": one_by_one, "at once, s": at_once, "speed-up": one_by_one / at_once}
    row |= {"slots": slots(), "ideal": ideal, "share of it": row["speed-up"] / ideal}
    check(row["share of it"] >= 0.5, row)  # other work on this machine may take some
    return [row]


@lesson()
def words(*paths: Path) -> Rows:
    """A large input is cut into messages of a bounded size, counted by many workers, and merged."""
    skipped: dict[str, str] = {}

    def skip(path: object, error: Exception) -> None:
        skipped[str(path)] = str(getattr(error, "strerror", None) or error)

    own_text = [HERE / "README.md", *sorted(HERE.glob("*.py"))]
    files = list(text_files(paths or own_text, lambda error: skip(error.filename, error)))
    counted: Counter[str] = Counter()
    sent = size = 0
    with bar(files, f"{len(files)} files") as waiting:
        texts = messages(waiting, skip)
        while batch := list(islice(texts, 32)):  # no more than that is under way at a time
            for counts in [tasks.count_words.delay(text) for text in batch]:
                counted.update(counts.get(timeout=TIMEOUT))
            sent, size = sent + len(batch), size + sum(len(text.encode()) for text in batch)
    check(bool(counted), f"no words in {len(files)} files {skipped or ''}")
    rows: Rows = [{"word": word, "count": count} for word, count in counted.most_common(5)]
    rows += [
        {
            "files": sum(str(path) not in skipped for path in files),
            "tasks": sent,
            "bytes": size,
            "words": counted.total(),
        }
    ]
    rows += [{"skipped": path, "why": why} for path, why in islice(skipped.items(), 10)]
    return rows if len(skipped) <= 10 else [*rows, {"skipped": f"and {len(skipped) - 10} more", "why": ""}]


@lesson()
def workflows() -> Rows:
    """Tasks make workflows: a chain hands results on, a group runs at once, a chord waits for its group."""
    prices = [1000, 2500, 4000]
    chain: Any = tasks.total.s(prices) | tasks.add_tax.s() | tasks.receipt.s()
    with_tax: Any = group(tasks.add_tax.s(price) for price in prices)
    results = [chain.delay().get(timeout=TIMEOUT), with_tax.delay().get(timeout=TIMEOUT)]
    try:
        results += [chord(with_tax)(tasks.total.s()).get(timeout=TIMEOUT)]
    except NotImplementedError:
        results += ["not with rpc://; with CELERY_RESULT_BACKEND=file://FOLDER in .env, if FOLDER exists"]
    check(results[:2] == ["You paid 90.00 EUR", [1200, 3000, 4800]], results)
    check(results[2] == 9000 or app.backend.as_uri() == "rpc://", results)
    return [{"workflow": w, "result": r} for w, r in zip(("chain", "group", "chord"), results, strict=True)]


@lesson("rpc")
def progress() -> Rows:
    """A running task can tell how far it is, in a state of its own."""
    states = watch(tasks.pack_order.delay(6), 7, "packing 6 items")
    check([content["packed"] for *_, content in states[:-1]] == [1, 2, 3, 4, 5, 6], states)
    return [{"after, s": at, "state": state, "content": str(content)} for at, state, content in states]


@lesson("rpc")
def retries() -> Rows:
    """A task that fails in passing is tried again, and the delay before it doubles each time."""
    task: Any = tasks.charge_card
    order = f"order {int(time.time())}"
    before, rows = 0.0, []
    for number, (at, state, content) in enumerate(watch(task.delay(order), 3, "a busy gateway"), 1):
        declared = task.retry_backoff * 2 ** (number - 2) if number > 1 else 0
        row = {"attempt": number, "declared delay, s": declared, "seen, s": at - before, "state": state}
        rows += [{**row, "error": content["exc_message"][0] if state == "RETRY" else ""}]
        check(declared <= at - before + 0.05 < declared + 1.5, rows)  # 0.05: the time to tell of a retry
        before = at
    check([row["state"] for row in rows] == ["RETRY", "RETRY", "SUCCESS"], rows)
    again = task.delay(order, busy=0).get(timeout=TIMEOUT)
    check("before" in again, again)
    return [*rows, {"the same order, charged again": again}]


@lesson()
def schedule() -> Rows:
    """A task can run later, or at a time, or not at all if it is too late by then."""
    started = time.time()
    countdown = tasks.remind.apply_async(("Ada",), countdown=1)
    eta = tasks.remind.apply_async(("Ada",), eta=app.now() + timedelta(seconds=2))
    expired = tasks.remind.apply_async(("Ada",), countdown=2, expires=1)
    ran = [at - started for at in collect([countdown, eta], "2 reminders")]
    rows: Rows = [
        {"asked for": "countdown=1", "ran after, s": ran[0], "late by, s": ran[0] - 1},
        {"asked for": "eta=now + 2 s", "ran after, s": ran[1], "late by, s": ran[1] - 2},
    ]
    check(all(0 <= row["late by, s"] < 1.5 for row in rows), rows)
    never = error_of(expired)
    check(never["error"] == "TaskRevokedError", never)
    return [*rows, {"asked for": "countdown=2, expires=1", "ran": "never", "why": never["message"]}]


@lesson()
def failures() -> Rows:
    """An error reaches the caller; and the task that failed is kept as a dead letter, to be run again."""
    shipped = tasks.ship.delay("lamp", time.time() + 1)
    rows: Rows = [{"failure": "an exception", **error_of(shipped)}]
    check("in ship" in str(shipped.traceback), shipped.traceback)
    try:
        tasks.add.delay(1)
    except TypeError as error:  # before anything is published
        rows += [{"failure": "an argument too few", "error": "TypeError", "message": str(error)}]
    check(len(rows) == 2, "no error of a call without an argument")
    if is_embedded() or not is_prefork():
        return [*rows, {"not shown here": "time limits and dead letters need RabbitMQ and --pool prefork"}]
    limits = {"soft": tasks.draw_label.delay(5), "hard": tasks.draw_stubborn_label.delay(5)}
    with bar(limits, "two tasks over their time limit") as waiting:
        rows += [{"failure": f"over its {limit} time limit", **error_of(limits[limit])} for limit in waiting]
    for late in limits.values():
        with dead_letter(late.id) as letter:
            acknowledge(letter)
    with dead_letter(shipped.id) as letter:
        known = described(letter)
        shipped.forget()  # its failure: the next result is the replay's
        replay(letter)
    value = app.AsyncResult(shipped.id).get(timeout=TIMEOUT)
    check(value == "lamp: shipped", value)
    row = {"dead letter": known["task"], "reason": known["reason"], "age": known["age"], "replayed": value}
    return [*rows, row]


@lesson("rabbitmq")
def priorities() -> Rows:
    """Urgent work overtakes a backlog, in a queue that knows priorities."""
    backlog = max(24, 8 * slots())
    seconds = 0.5 + backlog / 100  # every slot is taken for as long as publishing the backlog takes
    for _ in range(slots()):
        tasks.send_email.apply_async(("slow@example.com", seconds), queue="priority", ignore_result=True)
    customers = [("customer", 0)] * backlog + [("urgent customer", 9)] * 4
    results = [tasks.serve_customer.apply_async((name,), priority=value) for name, value in customers]
    done = collect(results, f"{backlog} customers, then 4 urgent ones")
    rows: Rows = []
    for place, at in enumerate(done[backlog:], backlog + 1):
        overtook = sum(other > at for other in done[:backlog])
        rows += [
            {"urgent": f"queued as {place}", "done as": sorted(done).index(at) + 1, "overtook": overtook}
        ]
    check(all(row["overtook"] >= 0.75 * backlog for row in rows), rows)
    return rows


@lesson()
def routing() -> Rows:
    """A topic exchange copies a message to each queue whose pattern fits; a broadcast goes to each worker."""
    patterns = {"warehouse": "stock.low", "europe": "order.eu.*", "accounts": "order.#"}
    keys = ["order.eu.paid", "order.us.paid", "order.eu.paid.late", "stock.low", "stock.high"]
    taken = {key: list[str]() for key in keys}
    shop = Exchange("shop", "topic", durable=False, auto_delete=True)
    with app.connection_for_write() as connection, connection.channel() as channel:
        queues = {
            name: Queue(f"{name}-{os.getpid()}", shop, pattern, exclusive=True, durable=False)(channel)
            for name, pattern in patterns.items()
        }
        for queue in queues.values():
            queue.declare()
        for key in keys:
            app.amqp.Producer(channel).publish({"event": key}, exchange=shop, routing_key=key)
        for name, queue in queues.items():
            while message := queue.get(no_ack=True):
                taken[message.payload["event"]].append(f"{name} ({patterns[name]})")
    check([len(names) for names in taken.values()] == [2, 1, 1, 1, 0], taken)
    options: dict[str, Any] = {"destination": list(WORKERS), "limit": len(WORKERS), "reply": True}
    answers: Any = app.control.broadcast("reload_prices", **options)
    check(len(answers) == len(WORKERS), f"{answers} of {list(WORKERS)}")
    rows: Rows = [
        {"routing key": key, "taken by": ", ".join(names) or "none"} for key, names in taken.items()
    ]
    return [*rows, *({"broadcast": "reload_prices", "answer": str(answer)} for answer in answers)]


@lesson()
def nodes() -> Rows:
    """Several worker nodes share the work, and each tells what it does."""
    with worker() if len(WORKERS) == 1 and not is_embedded() else contextlib.nullcontext():
        before = inspect().stats()
        results = [tasks.send_email.delay("all@example.com", 0.1) for _ in range(16 * len(WORKERS))]
        active = inspect().active()
        collect(results, f"{len(results)} e-mails")
        rows: Rows = [
            {
                "node": name,
                "pool": node["pool"]["implementation"].split(".")[2].split(":")[0],
                "slots": node["pool"]["max-concurrency"],
                "prefetch": node["prefetch_count"],
                "active": len(active[name]),
                "took": sum(node["total"].values()) - sum(before[name]["total"].values()),
                "processed": sum(node["total"].values()),
            }
            for name, node in sorted(inspect().stats().items())
        ]
    check(all(row["took"] for row in rows), rows)
    with app.connection_for_write() as connection, connection.channel() as channel:
        for queue in [*celeryconfig.task_queues, celeryconfig.dead_letters, celeryconfig.unrouted]:
            there = tasks.is_reachable(queue)
            messages = depth(queue, channel) if there else "its RabbitMQ node is down"
            rows += [{"queue": queue.name, "messages": messages}]
    return rows


@lesson()
def bulk() -> Rows:
    """Large workloads wait for a thousand confirms at a time, or put a hundred items in one message."""
    rows: Rows = []
    results: list[AsyncResult[Any]] = []

    def one_by_one() -> int:
        return len([tasks.check_price.delay(item) for item in range(200)])

    def in_bulk() -> int:
        return tasks.publish_in_bulk(tasks.check_price.s(item) for item in range(1000))

    def in_chunks() -> int:
        chunks: Any = tasks.check_price.chunks(((item,) for item in range(10_000)), 100)
        results.extend(chunks.apply_async())
        return len(results)

    with bar({one_by_one: 200, in_bulk: 1000, in_chunks: 10_000}.items(), "11,200 items") as waiting:
        for publish, items in waiting:
            started = time.perf_counter()
            number = publish()
            seconds = time.perf_counter() - started
            row = {"way": publish.__name__.replace("_", " "), "tasks": number, "items": items}
            rows += [{**row, "tasks/s": number / seconds, "items/s": items / seconds}]
    right = sum(map(sum, collect(results, "100 chunks of 100 items")))
    check(right == 10_000, f"{right} of 10000 items of the chunks")
    check(rows[2]["items/s"] > rows[0]["items/s"], rows)
    check(is_embedded() or rows[1]["tasks/s"] > rows[0]["tasks/s"], rows)
    return rows


@lesson("rabbitmq", "rpc", "prefork")
def crash() -> Rows:
    """A killed process loses nothing: RabbitMQ delivers its task again, and another process finishes it."""
    states = watch(tasks.print_label.delay(1), 3, "a crash, noticed within 5 s")
    check([state for _, state, _ in states] == ["PRINTING", "PRINTING", "SUCCESS"], states)
    (died, _, first), (again, _, second), (_, _, finisher) = states
    check(first["process"] != second["process"] == finisher, states)
    return [{"killed": first["process"], "finished by": finisher, "lost, s": again - died}]


@lesson("rabbitmq", "rpc", "prefork")
def poison() -> Rows:
    """A task that kills each process that takes it ends: as an error for its caller, and a dead letter."""
    result = tasks.print_label.delay(99)
    states = watch(result, celeryconfig.poison_limit + 1, "3 crashes, each noticed within 5 s")
    crashes = [state for _, state, _ in states].count("PRINTING")
    check(crashes == celeryconfig.poison_limit, states)
    row = {"crashes": crashes, "told after, s": states[-1][0], **error_of(result)}
    with dead_letter(result.id) as letter:
        acknowledge(letter)
    return [{**row, "dead letter": described(letter)["reason"]}]


# --- Where the lessons run ----------------------------------------------------------------------
@contextlib.contextmanager
def worker() -> Iterator[None]:
    """Run `celery -A tasks worker` with eight processes beside this one."""
    name = f"driver{time.monotonic_ns()}@localhost"
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-c8", "-lwarning", "-n", name]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log, start_new_session=True)
        OWN_WORKERS.add(process.pid)
        try:
            deadline = time.monotonic() + TIMEOUT
            with bar(1, "a worker starts") as waiting:
                while not (answer := app.control.inspect([name], timeout=0.5, limit=1).stats()):
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        sys.stderr.write(log.read().decode(errors="replace"))
                        stop("The worker does not start", "see its log above")
                waiting.update(1)
            WORKERS.update(answer)
            yield
            process.terminate()  # a warm shutdown: it finishes what it has begun
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=TIMEOUT)
        finally:
            WORKERS.pop(name, None)
            OWN_WORKERS.discard(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # nothing is lost: RabbitMQ delivers again


@functools.cache
def tell_blocked(_reason: str) -> None:
    """Tell, once, that RabbitMQ blocks all who publish.

    https://www.rabbitmq.com/docs/connection-blocked
    """
    click.echo("RabbitMQ takes no messages for now: it is short of memory or disk space. Waiting", err=True)


def connect() -> str:
    """Declare the topology in RabbitMQ, and return its version. Raises one of FAULTS."""
    app.conf.broker_transport_options |= {"on_blocked": tell_blocked}
    limits = {"read_timeout": 1.5, "write_timeout": 1.5}  # seconds: something else may listen there
    with app.connection_for_write(connect_timeout=1.5, transport_options=limits) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        version = connection.connection.server_properties["version"]
        tasks.declare_topology_once()
        return f"RabbitMQ {version} at {connection.as_uri()}"  # without the password


def no_rabbitmq(error: Exception) -> NoReturn:
    """Stop, since RabbitMQ is not where it should be."""
    uri, cause = app.connection_for_write().as_uri(), error.__cause__ or error  # without the password
    if isinstance(cause, ssl.SSLCertVerificationError):
        stop(f"{uri}: its certificate is refused: {cause.verify_message}", "correct RABBITMQ_CA or the host")
    if isinstance(cause, ssl.SSLError):
        stop(f"{uri}: no TLS there ({cause.reason})", "correct RABBITMQ_PORT (with TLS: usually 5671)")
    cut = isinstance(cause, ConnectionResetError) or "unexpectedly closed" in str(error)
    doubt = "; does that port speak TLS?" if cut else ""
    stop(f"{uri}: no RabbitMQ there ({error}{doubt})", "docker compose up -d --wait, or correct .env")


def settle(embedded: bool, stack: contextlib.ExitStack) -> str:
    """Find RabbitMQ and its workers, or be what is missing while `stack` is open; return what it is."""
    named = os.environ.get("CELERY_BROKER_URL") or os.environ.get("RABBITMQ_HOST")
    why, where = "as you asked", ""
    app.backend.as_uri()  # a wrong CELERY_RESULT_BACKEND is told before anything starts
    if not embedded and named != "memory://":
        try:
            where = connect()
        except (OperationalError, OSError) as error:
            if named:
                no_rabbitmq(error)
            uri = app.connection_for_write().as_uri()
            why = f"no RabbitMQ at {uri}; to start one: docker compose up -d --wait"
    if where:
        WORKERS.update(inspect().stats() or {})
        if WORKERS:
            return f"{where}, and the workers that run there"
        stack.enter_context(worker())
        return f"{where}, and a worker started for this run, since none answered"
    os.environ["CELERY_BROKER_URL"] = "memory://"
    app.conf.broker_transport_options = {"polling_interval": 0.01}  # seconds
    options: dict[str, Any] = {"hostname": "embedded@localhost", "loglevel": "CRITICAL"}
    options |= {"pool": "threads", "concurrency": 8, "perform_ping_check": False}
    FOREVER.enter_context(start_worker(app, **options))  # type: ignore[arg-type]  # a Celery of SafeTask
    WORKERS.update(inspect().stats())
    return f"Embedded broker and worker, in this process: {why}"


# --- The command line ---------------------------------------------------------------------------
def table(rows: Rows) -> Iterator[str]:
    """Yield the lines of a table for people, with a new heading wherever the columns change."""
    for columns, same in groupby(rows, key=list):
        cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in same]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in [columns, *cells]:
            yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def run(name: str, paths: list[Path], as_json: bool) -> bool:
    """Run a lesson and print what came of it; return whether it did not fail. Raises one of FAULTS."""
    function, needs = LESSONS[name]
    if not as_json:
        click.echo(f"\n{click.style(name, bold=True)}  {function.__doc__}")
    missing = [reason for is_there, reason in map(NEEDS.__getitem__, needs) if not is_there()]
    started, rows, status, reason = time.perf_counter(), [], "passed", ""
    try:
        if missing:
            status, reason = "skipped", missing[0]
        else:
            rows = function(*paths) if name == "words" else function()
    except tuple(FAULTS):
        raise
    except Exception as error:  # noqa: BLE001  (whatever a task raised)
        status, reason = "failed", str(error) if isinstance(error, NotSeenError) else repr(error)
    seconds = round(time.perf_counter() - started, 2)
    if as_json:
        outcome = {"lesson": name, "status": status, "seconds": seconds, "reason": reason, "rows": rows}
        click.echo(json.dumps(outcome, default=str))
    else:
        for line in table(rows):
            click.echo(f"  {line}")
        colour = {"passed": "green", "skipped": "yellow", "failed": "red"}[status]
        click.echo(f"  {click.style(status, fg=colour)}{reason and ': '}{reason} ({seconds} s)")
    return status != "failed"


def list_dead_letters(channel: Any, as_json: bool) -> None:
    """Print what is known of each dead letter, a hundred at a time."""
    there = range(depth(celeryconfig.dead_letters, channel))
    with contextlib.nullcontext(there) if sys.stdout.isatty() else bar(there, "dead letters") as steps:
        rows = map(described, letters(channel, steps))
        while page := list(islice(rows, 100)):
            click.echo("\n".join(map(json.dumps, page) if as_json else table(page)))


def replay_dead_letters(channel: Any, ids: tuple[str, ...]) -> None:
    """Publish the dead letters with these ids again, or all; stop with a word on what could not be."""
    published, left, asked, missing = 0, 0, set(ids), set(ids)
    try:
        with bar(range(depth(celeryconfig.dead_letters, channel)), "dead letters") as steps:
            for letter in letters(channel, steps):
                task_id = described(letter)["id"]
                if not asked or task_id in asked:
                    missing.discard(task_id)
                    if replay(letter):
                        published += 1
                    else:
                        left += 1
    finally:
        click.echo(f"{published} published again")
    if left:
        stop(f"{left} came from a queue that is gone", "name it in task_queues of celeryconfig.py")
    if missing:
        names = ", ".join(sorted(missing))
        stop(f"No dead letter of {names} (or somebody is reading it)", "python run_tasks.py --dead-letters")


def chosen(arguments: Iterable[str]) -> tuple[list[str], list[Path]]:
    """Return the lessons that are asked for, and the paths behind `words`; stop at what is neither."""
    names: list[str] = []
    paths: list[Path] = []
    for argument in arguments:
        if argument in LESSONS:
            names.append(argument)
        elif "words" not in names:
            near = difflib.get_close_matches(argument, LESSONS, n=1, cutoff=0)[0]
            stop(f"There is no lesson {argument!r}", f"python run_tasks.py {near} (--list names them all)")
        elif not os.path.lexists(argument):
            stop(
                f"There is no file or folder {argument!r}",
                f"name one that is there, as seen from {Path.cwd()}",
            )
        else:
            paths.append(Path(argument))
    return names or [name for name in LESSONS if name != "poison"], paths


@click.command()
@click.argument("lessons", nargs=-1, metavar="[LESSON | words [PATH]...]...")
@click.option("--list", "as_list", is_flag=True, help="Name the lessons, and what each shows.")
@click.option("--embedded", is_flag=True, help="Run without RabbitMQ, inside this process.")
@click.option("--dead-letters", is_flag=True, help="List the tasks that failed, and why.")
@click.option(
    "--replay", "as_replay", is_flag=True, help="Publish them again: those with the IDs given, or all."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a lesson, or a dead letter.")
@click.pass_context
def cli(  # noqa: PLR0913  (an argument for each option)
    context: click.Context,
    *,
    lessons: tuple[str, ...],
    as_list: bool,
    embedded: bool,
    dead_letters: bool,
    as_replay: bool,
    as_json: bool,
) -> int:
    """Run the lessons that are named, or all but `poison`, which takes up to 15 seconds.

    Exit status: 0; 1 if a lesson failed; 2 if something around them is wrong.
    """
    context.color = False if os.environ.get("NO_COLOR") else None
    if as_list:
        click.echo("\n".join(f"{name:<12}{function.__doc__}" for name, (function, _) in LESSONS.items()))
        return 0
    if dead_letters or as_replay:
        if (dead_letters and (as_replay or lessons)) or embedded:
            raise click.UsageError("--dead-letters takes nothing else than --json, and --replay only IDs")
        try:
            connect()
        except (OperationalError, OSError) as error:
            no_rabbitmq(error)
        with app.connection_for_write() as connection, connection.channel() as channel:
            if as_replay:
                replay_dead_letters(channel, lessons)
            else:
                list_dead_letters(channel, as_json)
        return 0
    names, paths = chosen(lessons)
    with contextlib.ExitStack() as stack:
        click.echo(settle(embedded, stack), err=as_json)
        passed = [run(name, paths, as_json) for name in names]
    return 0 if all(passed) else 1


def leave(signal_number: int, _frame: object) -> None:
    """End at once, without unwinding, and take along the workers that were started for this run."""
    for group_of_processes in OWN_WORKERS:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group_of_processes, signal.SIGKILL)
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(128 + signal_number)


def main() -> NoReturn:
    """Run the command line, and end the process at once: an embedded worker would take four seconds."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, leave)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, leave)
    status: Any = 2
    try:
        status = cli(standalone_mode=False)
    except SystemExit as stopped:
        status = stopped.code
    except tuple(FAULTS) as error:
        what, cure = next(told for fault, told in FAULTS.items() if isinstance(error, fault))
        with contextlib.suppress(SystemExit):
            stop(f"{what}: {' '.join(str(error).split())}", cure)
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    os._exit(status)


if __name__ == "__main__":
    main()
