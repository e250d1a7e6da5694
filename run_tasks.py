"""The driver: enqueues work lesson by lesson, and prints what came back.

    $ python run_tasks.py                   every lesson
    $ python run_tasks.py retries crash     these two
    $ python run_tasks.py words README.md   count the words of your own files and folders

It uses the RabbitMQ of `.env` and the workers that answer there; it starts a worker where none
does; and where there is no RabbitMQ, it runs both inside this process. A lesson that did not see
what it teaches fails, and so does the run (exit status 1).
"""

import contextlib
import difflib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NoReturn

import click
from amqp import AccessRefused, NotAllowed, PreconditionFailed
from celery import chord, group
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ImproperlyConfigured
from celery.exceptions import TimeoutError as NoAnswer
from celery.result import AsyncResult
from kombu import Exchange, Message, Queue
from kombu.exceptions import OperationalError

import celeryconfig
import tasks
from celeryconfig import stop
from tasks import app

HERE = Path(__file__).parent
TIMEOUT = 30  # seconds that a lesson waits for an answer
WORKERS: dict[str, Any] = {}  # what each worker node said of itself at the start, by its name
FOREVER = contextlib.ExitStack()  # never closed: it holds the embedded worker until the process ends
# Faults of the surroundings: they end the run, not only the lesson.
FAULTS = (PreconditionFailed, NoAnswer, OperationalError, OSError, ImproperlyConfigured)
Rows = list[dict[str, Any]]


class NotSeen(Exception):
    """A lesson did not see what it teaches, but this."""


# --- What the lessons are made of ---------------------------------------------------------------
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "rabbitmq": (lambda: not is_embedded(), "only RabbitMQ can: docker compose up -d --wait"),
    "rpc": (lambda: "rpc" in str(app.conf.result_backend), "no states come: CELERY_RESULT_BACKEND=rpc://"),
    "prefork": (lambda: is_prefork(), "it would kill the worker: celery -A tasks worker --pool prefork"),
}
LESSONS: dict[str, tuple[Callable[..., Rows], tuple[str, ...]]] = {}


def lesson(*needs: str) -> Callable[[Callable[..., Rows]], Callable[..., Rows]]:
    """Add a lesson: its docstring is the sentence above the rows of results that it returns."""

    def add(function: Callable[..., Rows]) -> Callable[..., Rows]:
        LESSONS[function.__name__] = function, needs
        return function

    return add


def check(as_taught: bool, saw: object) -> None:
    """Raise NotSeen, with what the lesson saw, unless it saw what it teaches."""
    if not as_taught:
        raise NotSeen(f"it saw {saw}")


def is_embedded() -> bool:
    """Tell whether the broker is kombu's memory:// in this process."""
    return os.environ.get("CELERY_BROKER_URL") == "memory://"


def is_prefork() -> bool:
    """Tell whether every worker node runs tasks in processes, of which one can be lost."""
    return all("prefork" in node["pool"]["implementation"] for node in WORKERS.values())


def slots() -> int:
    """Return how many tasks the worker nodes can run at once."""
    return sum(int(node["pool"]["max-concurrency"]) for node in WORKERS.values())


def inspect() -> Any:
    """Return Celery's remote control, which waits a second for answers, or until all nodes have answered."""
    return app.control.inspect(timeout=1, limit=len(WORKERS) or None)


def bar(steps: Any, label: str) -> Any:
    """Show a progress bar over an iterable, or a number of steps, on stderr: a line if that is no terminal."""
    kind = "length" if isinstance(steps, int) else "iterable"
    return click.progressbar(**{kind: steps}, label=f"  {label}", file=sys.stderr, show_eta=False)


def collect(results: list[AsyncResult[Any]], label: str) -> list[Any]:
    """Wait for results, and return their values in order. Raises what a task raised, or NoAnswer."""
    with bar(results, label) as waiting:
        return [result.get(timeout=TIMEOUT) for result in waiting]


def watch(result: AsyncResult[Any], steps: int, label: str) -> list[tuple[float, str, Any]]:
    """Wait for a result, and return the states on the way: the seconds until each, its name and content."""
    started, states = time.monotonic(), []
    with bar(steps, label) as waiting:

        def on_message(message: dict[str, Any]) -> None:
            if message["task_id"] == result.id:
                states.append((time.monotonic() - started, message["status"], message["result"]))
                waiting.update(1)

        result.get(timeout=TIMEOUT, on_message=on_message, propagate=False)
    return states


def depth(queue: str) -> int:
    """Return how many messages wait in a queue."""
    with app.connection_for_write() as connection, connection.channel() as channel:
        return int(channel.queue_declare(queue, passive=True).message_count)


def dead_letter(channel: Any, task_id: str) -> Message:
    """Return the dead letter of a task, not acknowledged; the others go back when the channel closes."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        letter = celeryconfig.dead_letters(channel).get()
        if letter is None:
            time.sleep(0.05)  # it is still on its way
        elif letter.headers.get("id") == task_id:
            return letter
    raise NotSeen(f"no dead letter of task {task_id}")


def replay(channel: Any, letter: Message) -> None:
    """Publish a dead letter to the queue it came from; acknowledge it once RabbitMQ has confirmed that."""
    properties = {name: value for name, value in letter.properties.items() if name != "application_headers"}
    headers = {name: value for name, value in letter.headers.items() if not name.startswith("x-")}
    queue = letter.headers["x-first-death-queue"]
    app.amqp.Producer(channel).publish(letter.body, routing_key=queue, headers=headers, **properties)
    letter.ack()


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
    """Yield a file's text in pieces of at most 16,000 signs (so 64,000 bytes), cut at white space.

    What is not UTF-8 becomes U+FFFD. Raises OSError, and ValueError for a file without text.
    """
    if not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        if b"\0" in file.read(8000):  # as git has it
            raise ValueError("binary")
    with path.open(encoding="utf-8", errors="replace") as text:
        while piece := text.read(15_000):
            while len(piece) <= 16_000 and not (sign := text.read(1)).isspace() and sign:
                piece += sign
            if len(piece) > 16_000:
                raise ValueError("from a word of more than 1,000 signs on")
            yield piece


def parcels(texts: Iterable[str]) -> Iterator[str]:
    """Put small texts together, up to 16,000 signs."""
    parcel: list[str] = []
    for text in texts:
        if sum(map(len, parcel)) + len(parcel) + len(text) > 16_000:
            yield "\n".join(parcel)
            parcel = []
        parcel.append(text)
    yield "\n".join(parcel)


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
    rows: Rows = [{"slots": slots(), "one after another, s": one_by_one, "at once, s": at_once}]
    rows[0] |= {"speed-up": one_by_one / at_once, "ideal": ideal, "share": one_by_one / at_once / ideal}
    check(rows[0]["share"] >= 0.85, rows)
    return rows


@lesson()
def words(*paths: Path) -> Rows:
    """A large input is cut into messages of a bounded size, counted by many workers, and merged."""
    skipped: Rows = []
    counted: Counter[str] = Counter()
    sent = size = 0

    def skip(path: object, error: Exception) -> None:
        skipped.append({"skipped": str(path), "why": getattr(error, "strerror", None) or str(error)})

    def texts(waiting: Iterable[Path]) -> Iterator[str]:
        for path in waiting:
            try:
                yield from pieces(path)
            except (OSError, ValueError) as error:
                skip(path, error)

    own_text = [HERE / "README.md", *sorted(HERE.glob("*.py"))]
    files = list(text_files(paths or own_text, lambda error: skip(error.filename, error)))
    with bar(files, f"{len(files)} files") as waiting:
        messages = parcels(texts(waiting))
        while batch := list(islice(messages, 32)):  # so that few messages are on their way at a time
            for counts in [tasks.count_words.delay(text) for text in batch]:
                counted.update(counts.get(timeout=TIMEOUT))
            sent, size = sent + len(batch), size + sum(len(text.encode()) for text in batch)
    check(bool(counted), f"no words in {len(files)} files")
    rows: Rows = [{"word": word, "count": count} for word, count in counted.most_common(5)]
    return [*rows, {"files": len(files), "tasks": sent, "bytes": size, "words": counted.total()}, *skipped]


@lesson()
def workflows() -> Rows:
    """Tasks make workflows: a chain hands results on, a group runs at once, a chord waits for its group."""
    prices = [1000, 2500, 4000]
    chain = tasks.total.s(prices) | tasks.add_tax.s() | tasks.receipt.s()
    with_tax = group(tasks.add_tax.s(price) for price in prices)
    results = [chain.delay().get(timeout=TIMEOUT), with_tax.delay().get(timeout=TIMEOUT)]
    try:
        results += [chord(with_tax)(tasks.total.s()).get(timeout=TIMEOUT)]
    except NotImplementedError:
        results += ["rpc:// has none; a line of .env that has: CELERY_RESULT_BACKEND=file:///some/folder"]
    check(results[:2] == ["You paid 90.00 EUR", [1200, 3000, 4800]], results)
    check(results[2] == 9000 or "rpc" in str(app.conf.result_backend), results)
    return [{"workflow": w, "result": r} for w, r in zip(("chain", "group", "chord"), results, strict=True)]


@lesson("rpc")
def progress() -> Rows:
    """A running task can tell how far it is, in a state of its own."""
    states = watch(tasks.pack_order.delay(6), 7, "packing 6 items")
    check([content["packed"] for *_, content in states[:-1]] == [1, 2, 3, 4, 5, 6], states)
    return [{"s": at, "state": state, "content": str(content)} for at, state, content in states]


@lesson("rpc")
def retries() -> Rows:
    """A task that fails in passing is tried again: the longest delay doubles, and chance picks one below."""
    task, before, rows = tasks.charge_card, 0.0, []
    for number, (at, state, content) in enumerate(watch(task.delay("order 7"), 4, "a busy gateway"), 1):
        longest = min(task.retry_backoff * 2 ** (number - 2), task.retry_backoff_max) if number > 1 else 0
        error = content["exc_message"][0] if state == "RETRY" else ""
        rows += [
            {"attempt": number, "waited, s": at - before, "at most": longest, "state": state, "error": error}
        ]
        before = at
    check([row["state"] for row in rows] == ["RETRY", "RETRY", "RETRY", "SUCCESS"], rows)
    check(all(row["waited, s"] < row["at most"] + 1.5 for row in rows), rows)
    return rows


@lesson()
def schedule() -> Rows:
    """A task can run later, or at a time, or not at all if it is too late by then."""
    started = time.time()
    later = tasks.remind.apply_async(("Ada",), countdown=1)
    at_a_time = tasks.remind.apply_async(("Ada",), eta=app.now() + timedelta(seconds=2))
    too_late = tasks.remind.apply_async(("Ada",), countdown=2, expires=1)
    ran = [at - started for at in collect([later, at_a_time], "2 reminders")]
    asked = {"countdown=1": 1, "eta=now + 2 s": 2}
    rows: Rows = [
        {"asked for": what, "ran after, s": after, "late by, s": after - seconds}
        for (what, seconds), after in zip(asked.items(), ran, strict=True)
    ]
    check(all(0 <= row["late by, s"] < 1.5 for row in rows), rows)
    never = error_of(too_late)
    check(never["error"] == "TaskRevokedError", never)
    return [*rows, {"asked for": "countdown=2, expires=1", "ran after, s": f"never: {never['message']}"}]


def error_of(result: AsyncResult[Any]) -> dict[str, str]:
    """Return the name and the text of the exception that a task ends with. Raises NotSeen without one."""
    result.get(timeout=TIMEOUT, propagate=False)
    check(isinstance(result.result, Exception), f"{result.result}, and no error")
    return {"error": type(result.result).__name__, "message": str(result.result)}


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
    check(len(rows) == 2, "a call with an argument too few")
    if is_embedded() or not is_prefork():
        return [*rows, {"not shown": "time limits and dead letters need RabbitMQ, and --pool prefork"}]
    label = tasks.draw_label.delay(5)
    rows += [{"failure": "over its soft time limit", **error_of(label)}]
    rows += [{"failure": "over its hard time limit", **error_of(tasks.draw_stubborn_label.delay(5))}]
    with app.connection_for_write() as connection, connection.channel() as channel:
        dead_letter(channel, label.id).ack()
    with app.connection_for_write() as connection, connection.channel() as channel:
        letter = dead_letter(channel, shipped.id)
        death = letter.headers["x-death"][0]
        age = (app.now().replace(tzinfo=None) - death["time"]).total_seconds()
        replay(channel, letter)
    value = app.AsyncResult(shipped.id).get(timeout=TIMEOUT)
    check(value == "lamp: shipped", value)
    return [*rows, {"dead letter": shipped.id, "reason": death["reason"], "age, s": age, "replayed": value}]


@lesson("rabbitmq")
def priorities() -> Rows:
    """Urgent work overtakes a backlog, in a queue that knows priorities."""
    backlog = max(24, 8 * slots())
    seconds = 0.5 + backlog / 100  # every slot is taken for as long as it takes to publish the backlog
    for _ in range(slots()):
        tasks.send_email.apply_async(("slow@example.com", seconds), queue="priority", ignore_result=True)
    customers = [0] * backlog + [9] * 4
    results = [tasks.serve_customer.apply_async((f"customer {p}",), priority=p) for p in customers]
    done = collect(results, f"{backlog} customers, then 4 urgent ones")
    rows: Rows = [
        {
            "urgent customer queued as": n,
            "done as": sorted(done).index(at) + 1,
            "overtook": sum(t > at for t in done[:backlog]),
        }
        for n, at in enumerate(done[backlog:], backlog + 1)
    ]
    check(all(row["overtook"] >= 0.75 * backlog for row in rows), rows)
    return rows


@lesson()
def routing() -> Rows:
    """A topic exchange copies a message to each queue whose pattern fits; a broadcast goes to each worker."""
    patterns = {"warehouse": "stock.low", "europe": "order.eu.*", "accounts": "order.#"}
    keys = ["order.eu.paid", "order.us.paid", "order.eu.paid.late", "stock.low", "stock.high"]
    shop, taken = Exchange("shop", "topic"), dict[str, list[str]]((key, []) for key in keys)
    with app.connection_for_write() as connection, connection.channel() as channel:
        queues = [
            Queue(f"{name}-{os.getpid()}", shop, pattern, exclusive=True, durable=False)(channel)
            for name, pattern in patterns.items()
        ]
        for queue in queues:
            queue.declare()
        for key in keys:
            app.amqp.Producer(channel).publish({"event": key}, exchange=shop, routing_key=key)
        for queue in queues:
            while message := queue.get(no_ack=True):
                taken[message.payload["event"]].append(
                    f"{queue.name.partition('-')[0]} ({queue.routing_key})"
                )
    check([len(queues) for queues in taken.values()] == [2, 1, 1, 1, 0], taken)
    answers = app.control.broadcast("reload_prices", reply=True, limit=len(WORKERS)) or []
    check(len(answers) == len(WORKERS), f"{answers} of {list(WORKERS)}")
    rows: Rows = [
        {"routing key": key, "taken by": ", ".join(queues) or "none"} for key, queues in taken.items()
    ]
    return [*rows, *({"broadcast": "reload_prices", "answer": str(answer)} for answer in answers)]


@lesson()
def nodes() -> Rows:
    """Several worker nodes share the work, and each tells what it does."""
    with worker() if len(WORKERS) == 1 and not is_embedded() else contextlib.nullcontext():
        before = inspect().stats()
        results = [tasks.send_email.delay("all@example.com", 0.1) for _ in range(16 * len(WORKERS))]
        active = inspect().active()
        collect(results, f"{len(results)} tasks")
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
    return [
        *rows,
        *({"queue": q, "messages": depth(q)} for q in (*app.amqp.queues, "dead-letters", "unrouted")),
    ]


@lesson()
def bulk() -> Rows:
    """Large workloads wait for the confirms of a thousand messages at once, or put a hundred items in one."""
    rows: Rows = []
    started = time.perf_counter()

    def row(way: str, messages: int, items: int) -> None:
        seconds = time.perf_counter() - started
        rows.append({"way": way, "tasks": messages, "items": items, "tasks/s": messages / seconds})
        rows[-1]["items/s"] = items / seconds

    with bar(range(500), "500 tasks, one by one") as waiting:
        for item in waiting:
            tasks.check_price.delay(item)
    row("one by one", 500, 500)
    started = time.perf_counter()
    row("in bulk", tasks.publish_in_bulk(tasks.check_price.s(item) for item in range(1000)), 1000)
    started = time.perf_counter()
    chunks = tasks.check_price.chunks(((item,) for item in range(10_000)), 100).apply_async()
    row("in chunks", len(chunks), 10_000)
    right = sum(map(sum, collect(list(chunks), "100 chunks of 100 items")))
    check(right == 10_000 and rows[2]["items/s"] > rows[0]["items/s"], rows)
    return rows


@lesson("rabbitmq", "rpc", "prefork")
def crash() -> Rows:
    """A killed process loses nothing: RabbitMQ delivers its task again, and another process finishes it."""
    states = watch(tasks.print_label.delay(), 3, "a crash, noticed within 5 s")
    check([state for _, state, _ in states] == ["PRINTING", "PRINTING", "SUCCESS"], states)
    (died, _, first), (again, _, second), (_, _, pid) = states
    check(first["pid"] != second["pid"] == pid, states)
    return [{"killed process": first["pid"], "finished by": pid, "lost, s": again - died}]


@lesson("rabbitmq", "rpc", "prefork")
def poison() -> Rows:
    """A task that kills each process that takes it ends: as an error for its caller, and a dead letter."""
    result = tasks.print_poison.delay()
    states = watch(result, celeryconfig.poison_limit + 1, "3 crashes, noticed within 5 s each")
    crashes = [state for _, state, _ in states].count("PRINTING")
    check(crashes == celeryconfig.poison_limit, states)
    with app.connection_for_write() as connection, connection.channel() as channel:
        letter = dead_letter(channel, result.id)
        letter.ack()
    row = {"crashes": crashes, "told after, s": states[-1][0], **error_of(result)}
    return [{**row, "dead letter": letter.headers["x-death"][0]["reason"]}]


# --- Where the lessons run ----------------------------------------------------------------------
@contextlib.contextmanager
def worker() -> Iterator[None]:
    """Run `celery -A tasks worker` with eight processes beside this one."""
    name = f"driver{time.monotonic_ns()}@localhost"
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-c8", "-lwarning", "-n", name]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (answer := app.control.inspect([name], timeout=0.5, limit=1).stats()):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    stop(
                        f"{log.read().decode(errors='replace')}The worker does not start", "see its log above"
                    )
            WORKERS.update(answer)
            yield
            del WORKERS[name]
            process.terminate()  # a warm shutdown: it finishes what it has begun
            process.wait(timeout=TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # nothing is lost: RabbitMQ delivers again
            raise


def connect() -> str:
    """Declare the topology in RabbitMQ, and return its version. Raises OSError where there is none."""
    with app.connection_for_write(connect_timeout=4) as connection:
        uri = connection.as_uri()  # without the password
        try:
            connection.connect()
            version = connection.connection.server_properties["version"]
        except AccessRefused:
            stop(
                f"{uri}: RabbitMQ refuses this user or password",
                "correct RABBITMQ_USER and RABBITMQ_PASSWORD",
            )
        except NotAllowed as error:
            stop(f"{uri}: {error.reply_text}", "rabbitmqctl add_vhost NAME, or correct CELERY_BROKER_URL")
    tasks.declare_topology_once()
    return f"RabbitMQ {version} at {uri}"


def settle(embedded: bool, stack: contextlib.ExitStack) -> str:
    """Find RabbitMQ and its workers, or be what is missing while `stack` is open; return what it is."""
    named = os.environ.get("CELERY_BROKER_URL") or os.environ.get("RABBITMQ_HOST")
    why = "as you asked"
    if not embedded and named != "memory://":
        try:
            where = connect()
            workers = "the workers that run there"
            WORKERS.update(inspect().stats() or {})
            if not WORKERS:
                stack.enter_context(worker())
                workers = "a worker started for this run, since none answered"
            return f"{where}, and {workers}"
        except OSError as error:
            uri = app.connection_for_write().as_uri()
            if named:
                stop(f"{uri}: no RabbitMQ there ({error})", "docker compose up -d --wait, or correct .env")
            why = f"no RabbitMQ at {uri}; to start one: docker compose up -d --wait"
    os.environ["CELERY_BROKER_URL"] = "memory://"
    app.conf.broker_transport_options = {"polling_interval": 0.01}  # seconds
    options = {"hostname": "embedded@localhost", "loglevel": "CRITICAL", "perform_ping_check": False}
    FOREVER.enter_context(start_worker(app, pool="threads", concurrency=8, **options))
    WORKERS.update(inspect().stats())
    return f"Embedded broker and worker, in this process: {why}"


def table(rows: Rows) -> Iterator[str]:
    """Yield the lines of a table for people, with a new heading wherever the columns change."""
    for columns, group_of_rows in groupby(rows, key=list):
        cells = [
            [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in group_of_rows
        ]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in [columns, *cells]:
            yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def run(name: str, paths: list[Path], as_json: bool) -> bool:
    """Run a lesson and print what came of it; return whether it did not fail."""
    if not as_json:
        click.echo(f"\n{click.style(name, bold=True)}  {LESSONS[name][0].__doc__}")
    started, rows, status, reason = time.perf_counter(), [], "passed", ""
    function, needs = LESSONS[name]
    missing = [message for is_there, message in map(NEEDS.__getitem__, needs) if not is_there()]
    try:
        if missing:
            status, reason = "skipped", missing[0]
        else:
            rows = function(*paths) if name == "words" else function()
    except FAULTS:
        raise
    except Exception as error:  # noqa: BLE001  (whatever a task raised)
        status, reason = "failed", str(error) if isinstance(error, NotSeen) else repr(error)
    seconds = round(time.perf_counter() - started, 2)
    if as_json:
        outcome = {"lesson": name, "status": status, "seconds": seconds, "reason": reason, "rows": rows}
        click.echo(json.dumps(outcome, default=str))
    else:
        for line in table(rows):
            click.echo(f"  {line}")
        colour = {"passed": "green", "skipped": "yellow", "failed": "red"}[status]
        click.secho(f"  {status}{reason and ': '}{reason}", fg=colour, nl=False)
        click.echo(f" ({seconds} s)")
    return status != "failed"


def chosen(arguments: Iterable[str]) -> tuple[list[str], list[Path]]:
    """Return the lessons that are asked for, and the paths behind `words`. Stops at what is neither."""
    names: list[str] = []
    paths: list[Path] = []
    for argument in arguments:
        if argument in LESSONS:
            names.append(argument)
        elif "words" not in names:
            near = difflib.get_close_matches(argument, LESSONS, n=1, cutoff=0)[0]
            stop(f"There is no lesson {argument!r}", f"python run_tasks.py {near} (--list names them all)")
        elif not os.path.lexists(argument):
            stop(f"There is no file or folder {argument!r}", "python run_tasks.py words README.md")
        else:
            paths.append(Path(argument))
    return names or [name for name in LESSONS if name != "poison"], paths


def explain(error: BaseException) -> None:
    """Tell a fault of the surroundings: what happened, and its cure. Raises SystemExit."""
    match error:
        case click.ClickException():
            stop(error.format_message(), "python run_tasks.py --help")
        case PreconditionFailed():
            stop(error.reply_text, tasks.INEQUIVALENT_CURE)
        case NoAnswer():
            stop(
                f"No worker answered within {TIMEOUT} s",
                "see the log of the worker; python run_tasks.py nodes",
            )
        case ImproperlyConfigured():
            stop(str(error), "compare .env with .env.example")
        case OperationalError() | OSError():
            stop(f"The connection to RabbitMQ is lost: {error}", "docker compose ps, or rabbitmqctl status")


@click.command()
@click.argument("lessons", nargs=-1, metavar="[LESSON | words [PATH]...]...")
@click.option("--list", "as_list", is_flag=True, help="Name the lessons, and what each shows.")
@click.option("--embedded", is_flag=True, help="Run without RabbitMQ, inside this process.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a lesson.")
def cli(lessons: tuple[str, ...], as_list: bool, embedded: bool, as_json: bool) -> int:
    """Run the lessons that are named, or all but `poison`, which takes ten seconds.

    Exit status: 0, 1 if a lesson failed, 2 if the surroundings let none run.
    """
    if as_list:
        for name, (function, _) in LESSONS.items():
            click.echo(f"{name:<12}{function.__doc__}")
        return 0
    names, paths = chosen(lessons)
    with contextlib.ExitStack() as stack:
        click.echo(settle(embedded, stack), err=as_json)
        passed = [run(name, paths, as_json) for name in names]
        return 0 if all(passed) else 1


def main() -> NoReturn:
    """Run the command line; a fault of the surroundings is told in two lines on stderr, status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 2
    try:
        status = cli(standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        status = 130
    except (SystemExit, click.ClickException, *FAULTS) as error:
        with contextlib.suppress(SystemExit):
            explain(error)
    sys.stdout.flush()
    os._exit(status)  # at once: an embedded worker would take four seconds to stop


if __name__ == "__main__":
    main()
