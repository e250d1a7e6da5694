"""The driver: it enqueues tasks lesson by lesson, and prints what came back.

    $ python run_tasks.py

Each lesson checks its own claim, and fails if the claim does not hold.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
from celery import chord, group
from celery.exceptions import ImproperlyConfigured
from celery.exceptions import TimeoutError as NoAnswer
from celery.result import AsyncResult
from kombu import Exchange, Queue

import tasks
from reliable import local
from reliable.dead_letters import wait_for
from reliable.errors import UNREACHABLE, describe_error, exit_now
from reliable.local import Run
from reliable.own_worker import own_worker
from tasks import app

TIMEOUT = 30  # How long a lesson waits for one answer, in seconds
MESSAGE_SIZE = 16_000  # In characters; a message then continues to the end of the line
BROKER_ERRORS = (*UNREACHABLE, NoAnswer)
Rows = list[dict[str, Any]]


class ClaimError(Exception):
    """The claim of a lesson does not hold."""


#: What a lesson may need: whether a run has it, and what to do if it does not.
NEEDS: dict[str, tuple[Callable[[Run], bool], str]] = {
    "RabbitMQ": (lambda run: not run.embedded, "docker compose up -d --wait"),
    "worker processes": (lambda run: run.has_processes, "celery -A tasks worker --pool prefork"),
    "rpc:// results": (lambda _: app.backend.as_uri() == "rpc://", "remove CELERY_RESULT_BACKEND"),
}
Lesson = Callable[..., Rows | str]
LESSONS: dict[str, tuple[Lesson, tuple[str, ...]]] = {}


def lesson(*needs: str) -> Callable[[Lesson], Lesson]:
    """Add a lesson. Its docstring is printed above what it returns: rows or a sentence."""

    def add(function: Lesson) -> Lesson:
        LESSONS[function.__name__] = function, needs
        return function

    return add


def expect(holds: bool, claim: str, got: object) -> None:
    """Raise ClaimError unless the claim of a lesson holds."""
    if not holds:
        raise ClaimError(f"expected {claim}, got {got!s:.300}")


def collect(results: Iterable[AsyncResult]) -> list[Any]:
    """Wait for results, and return their values.

    Raises:
        ClaimError: a task failed, whatever its error. Connection errors are raised as they are.
        celery.exceptions.TimeoutError: no worker answered.
    """
    values = []
    for result in results:
        value = result.get(timeout=TIMEOUT, propagate=False)
        expect(result.successful(), "a result", repr(value))
        values.append(value)
    return values


def watch(result: AsyncResult) -> list[tuple[float, str, Any]]:
    """Wait for a result. Return each of its states: seconds since the start, name, content."""
    started, states = time.monotonic(), []

    def on_message(message: dict[str, Any]) -> None:
        if message["task_id"] == result.id:
            states.append((time.monotonic() - started, message["status"], message["result"]))

    result.get(timeout=TIMEOUT, propagate=False, on_message=on_message)
    return states


def error_of(result: AsyncResult) -> dict[str, str]:
    """Wait for a task that fails. Return the name and the text of its error."""
    result.get(timeout=TIMEOUT, propagate=False)
    expect(isinstance(result.result, Exception), "an error", result.result)
    return {"error": type(result.result).__name__, "message": str(result.result)}


# --- The lessons --------------------------------------------------------------------------------
@lesson()
def hello(run: Run) -> Rows:
    """A call returns at once; a worker runs the task."""
    calls = {
        "2 + 2": tasks.add.s(2, 2),
        "which worker?": tasks.worker_name.s(),
        "an e-mail": tasks.send_email.s("ada@example.com"),  # Takes half a second
    }
    rows: Rows = []
    for call, task in calls.items():
        started = time.perf_counter()
        result = task.delay()
        returned = 1000 * (time.perf_counter() - started)
        (value,) = collect([result])
        came = 1000 * (time.perf_counter() - started)
        rows += [{"call": call, "returned, ms": returned, "result": value, "came, ms": came}]
    expect(rows[0]["result"] == 4, "2 + 2 = 4", rows[0]["result"])
    expect(came - returned > 100, "the call to return before the e-mail is sent", rows[2])
    return rows


@lesson()
def parallel(run: Run) -> str:
    """Eight e-mails at once take less time than one after another."""
    emails = [tasks.send_email.s(f"customer{number}@example.com") for number in range(8)]
    started = time.perf_counter()
    for email in emails:
        collect([email.delay()])
    in_turn = time.perf_counter() - started
    collect([email.delay() for email in emails])
    at_once = time.perf_counter() - started - in_turn
    times = in_turn / at_once
    expect(
        times > 1.3 or run.processes == 1, "the e-mails at once to be faster", f"{times:.1f} times as fast"
    )
    return f"8 e-mails: {in_turn:.1f} s one after another, {at_once:.1f} s at once, {times:.1f} times as fast"


@lesson("RabbitMQ")
def nodes(run: Run) -> Rows:
    """Several worker nodes share the work, and a broadcast reaches each."""
    with contextlib.ExitStack() as stack:
        second = stack.enter_context(own_worker(app)) if len(run.workers) == 1 else {}
        names = [*run.workers, *second]
        ran = Counter(collect([tasks.worker_name.delay() for _ in range(16 * len(names))]))
        wanted = {"destination": names, "limit": len(names), "timeout": 5}
        replies = app.control.broadcast("reload_prices", reply=True, **wanted)
    answers = {name: answer["ok"] for reply in replies for name, answer in reply.items()}
    rows: Rows = [{"node": name, "tasks": ran[name], "broadcast": answers.get(name)} for name in names]
    expect(all(row["tasks"] and row["broadcast"] for row in rows), "each node to work and to answer", rows)
    return rows


@lesson()
def schedule(run: Run) -> Rows:
    """A task can run later, or not at all if it is too late."""
    started = time.time()
    countdown = tasks.remind.apply_async(("Ada",), countdown=1)
    eta = tasks.remind.apply_async(("Ada",), eta=app.now() + timedelta(seconds=2))
    expired = tasks.remind.apply_async(("Ada",), countdown=2, expires=1)
    ran = [at - started for at in collect([countdown, eta])]
    expect(ran[0] >= 1 and ran[1] >= 2, "neither task to run too early", ran)
    never = error_of(expired)
    expect(never["message"] == "expired", "the third task to expire", never)
    return [
        {"asked for": "countdown=1", "ran": f"after {ran[0]:.2f} s"},
        {"asked for": "eta=now + 2 s", "ran": f"after {ran[1]:.2f} s"},
        {"asked for": "countdown=2, expires=1", "ran": "never: expired"},
    ]


@lesson("rpc:// results")
def retries(run: Run) -> Rows:
    """A failed task is retried, waiting twice as long each time."""
    order = f"order {uuid4().hex[:8]}"  # Another one each time, since it is paid only once
    rows: Rows = []
    before = 0.0
    for at, state, content in watch(tasks.charge_card.delay(order)):
        error = content["exc_message"][0] if state == "RETRY" else ""
        rows += [{"waited, s": at - before, "state": state, "result": error or content}]
        before = at
    expect([row["state"] for row in rows] == ["RETRY", "RETRY", "SUCCESS"], "two retries, then success", rows)
    waits = [row["waited, s"] for row in rows[1:]]
    # A caller learns of a retry a moment after the delay has begun, so the waits are not exact
    expect(waits[0] > 0.5 and waits[1] > 1, "waits of about 1 and 2 s", waits)
    (again,) = collect([tasks.charge_card.delay(order, busy=0)])
    expect("before" in again, "each order to be paid once (all workers must share GATEWAY_BOOKS)", again)
    return [*rows, {"charged again": again}]


@lesson()
def failures(run: Run) -> Rows:
    """An error reaches the caller; the task is kept as a dead letter."""
    in_stock_from = time.time() + 3
    shipped = tasks.ship.delay("lamp", in_stock_from)
    rows: Rows = [{"failure": "an exception", **error_of(shipped)}]
    if run.embedded or not run.has_processes:
        return [*rows, {"not shown here": "time limits and dead letters, which need RabbitMQ and processes"}]
    limits = {"soft": tasks.draw_label.delay(5), "hard": tasks.draw_stubborn_label.delay(5)}
    for limit, late in limits.items():
        rows += [{"failure": f"the {limit} time limit", **error_of(late)}]
        with wait_for(app, late.id) as letter:
            letter.delete()
    with wait_for(app, shipped.id) as letter:
        time.sleep(max(0, in_stock_from - time.time()))
        shipped.forget()  # Forget the error: the replay sends a new result
        letter.replay()
    (value,) = collect([app.AsyncResult(shipped.id)])
    expect(value == "lamp: shipped", "the lamp to be shipped after the replay", value)
    return [*rows, {"dead letter": letter.task, "reason": letter.reason, "replayed": value}]


@lesson("RabbitMQ")
def priorities(run: Run) -> Rows:
    """Urgent work overtakes a backlog."""
    backlog = max(24, 8 * run.processes)
    seconds = 0.5 + backlog / 100  # Every process is busy while the backlog is published
    for _ in range(run.processes):
        tasks.send_email.apply_async(("slow@example.com", seconds), queue="priority", ignore_result=True)
    customers = [("customer", 0)] * backlog + [("urgent customer", 9)] * 2
    results = [tasks.serve_customer.apply_async((name,), priority=value) for name, value in customers]
    done = collect(results)
    rows: Rows = []
    for place, at in enumerate(done[backlog:], backlog + 1):
        overtook = sum(other > at for other in done[:backlog])
        rows += [{"queued as": place, "done as": sorted(done).index(at) + 1, "overtook": overtook}]
    early = all(row["overtook"] >= 0.75 * backlog for row in rows)
    expect(early, "the urgent customers to be served first", rows)
    return rows


@lesson()
def routing(run: Run) -> Rows:
    """RabbitMQ copies a message to each queue whose pattern matches."""
    patterns = {"warehouse": "stock.low", "europe": "order.eu.*", "accounts": "order.#"}
    keys = ["order.eu.paid", "order.us.paid", "order.eu.paid.late", "stock.low", "stock.high"]
    taken = {key: list[str]() for key in keys}
    shop = Exchange("shop", "topic", durable=False, auto_delete=True)
    with app.connection_for_write() as connection, connection.channel() as channel:
        queues = {
            name: Queue(f"{name}-{os.getpid()}", shop, pattern, exclusive=True, durable=False)(channel)
            for name, pattern in patterns.items()
        }
        producer = app.amqp.Producer(channel)
        for key in keys:
            producer.publish({"event": key}, exchange=shop, routing_key=key, declare=queues.values())
        for name, queue in queues.items():
            while message := queue.get(no_ack=True):
                taken[message.payload["event"]].append(f"{name} ({patterns[name]})")
    copies = [len(names) for names in taken.values()]
    expect(copies == [2, 1, 1, 1, 0], "2, 1, 1, 1 and 0 copies", taken)
    return [{"routing key": key, "taken by": ", ".join(names) or "none"} for key, names in taken.items()]


@lesson("RabbitMQ", "worker processes", "rpc:// results")
def crash(run: Run) -> Rows:
    """A killed process loses nothing: another one runs its task."""
    states = watch(tasks.print_label.delay(1))
    names = [state for _, state, _ in states]
    expect(names == ["PRINTING", "RETRY", "PRINTING", "SUCCESS"], "a crash, a retry and a success", states)
    (died, _, first), _, (again, _, _), (_, _, finisher) = states
    return [{"killed": first["process"], "finished by": finisher, "after, s": again - died}]


@lesson()
def words(run: Run, *paths: Path) -> Rows:
    """A large input is cut into messages that many workers process."""
    counted: Counter[str] = Counter()
    sent = 0
    here = Path(__file__).parent
    texts = cut(paths or [here / "README.md", *sorted(here.glob("*.py"))])
    while batch := list(islice(texts, 32)):  # At most 32 messages are in RabbitMQ at a time
        for counts in collect([tasks.count_words.delay(text) for text in batch]):
            counted.update(counts)
        sent += len(batch)
    expect(bool(counted), "words", "none")
    rows: Rows = [{"word": word, "count": count} for word, count in counted.most_common(5)]
    return [*rows, {"words": counted.total(), "messages": sent}]


def cut(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the text of files and folders, cut at the end of a line."""
    rest = ""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            try:
                if file.is_dir() or any(part.startswith(".") for part in file.relative_to(path).parts):
                    continue
                text = io.StringIO(rest + file.read_text(encoding="utf-8") + "\n")
            except (OSError, UnicodeDecodeError):
                click.echo(f"  skipped, since it cannot be read as text: {file}", err=True)
                continue
            while len(rest := text.read(MESSAGE_SIZE) + text.readline()) >= MESSAGE_SIZE:
                yield rest
    if rest:
        yield rest


@lesson()
def workflows(run: Run) -> Rows:
    """Tasks form chains, groups and chords."""
    prices = [1000, 2500, 4000]
    chain = tasks.total.s(prices) | tasks.add_tax.s() | tasks.receipt.s()
    with_tax = group(tasks.add_tax.s(price) for price in prices)
    (paid,) = collect([chain.delay()])
    taxed = collect(with_tax.delay())
    (both,) = collect([chord(with_tax)(tasks.total.s())])
    results = {"chain": paid, "group": taxed, "chord": both}
    right = [*results.values()] == ["You paid 90.00 EUR", [1200, 3000, 4800], 9000]
    expect(right, "90.00 EUR, with tax", results)
    return [{"workflow": workflow, "result": result} for workflow, result in results.items()]


@lesson("rpc:// results")
def progress(run: Run) -> Rows:
    """A running task reports how far it is."""
    states = watch(tasks.pack_order.delay(6))
    packed = [content["packed"] for *_, content in states[:-1]]
    expect(packed == [1, 2, 3, 4, 5, 6], "a state for each of 6 items", states)
    return [{"after, s": at, "state": state, "content": str(content)} for at, state, content in states]


@lesson()
def bulk(run: Run) -> Rows:
    """A thousand tasks in one call, ten thousand items in 100 messages."""
    times = [time.perf_counter()]
    for item in range(200):
        tasks.check_price.delay(item)
    times.append(time.perf_counter())
    app.publish_in_bulk(tasks.check_price.s(item) for item in range(1000))
    times.append(time.perf_counter())
    chunks = tasks.check_price.chunks(((item,) for item in range(10_000)), 100).apply_async()
    times.append(time.perf_counter())
    right = sum(map(sum, collect(chunks)))
    expect(right == 10_000, "10000 results of the chunks", right)
    ways = (("one by one", 200, 200), ("in bulk", 1000, 1000), ("in chunks", 100, 10_000))
    return [
        {"way": way, "messages": messages, "items": items, "items/s": round(items / (ended - started))}
        for (way, messages, items), (started, ended) in zip(ways, pairwise(times), strict=True)
    ]


@lesson("RabbitMQ", "worker processes", "rpc:// results")
def poison(run: Run) -> Rows:
    """A task that kills each process that runs it ends as a dead letter."""
    result = tasks.print_label.delay(99)
    states = watch(result)
    crashes = [state for _, state, _ in states].count("PRINTING")
    expect(crashes == 1 + tasks.print_label.max_retries, "one crash, and one for each retry", states)
    with wait_for(app, result.id) as letter:
        letter.delete()
    error = error_of(result)["error"]
    return [{"crashes": crashes, "after, s": states[-1][0], "error": error, "dead letter": letter.reason}]


# --- The command line ---------------------------------------------------------------------------
def table(rows: Rows) -> Iterator[str]:
    """Yield the lines of a table, with a new heading wherever the columns change."""
    for columns, same in groupby(rows, key=list):
        cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in same]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in [columns, *cells]:
            yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def run_lesson(name: str, run: Run, paths: Iterable[Path]) -> dict[str, Any]:
    """Run a lesson, and return its outcome. Errors of RabbitMQ are raised."""
    function, needs = LESSONS[name]
    result: Rows | str = []
    started, status, reason = time.perf_counter(), "passed", ""
    if missing := [need for need in needs if not NEEDS[need][0](run)]:
        status, reason = "skipped", f"needs {missing[0]}"
    else:
        try:
            result = function(run, *paths) if name == "words" else function(run)
        except BROKER_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001  (the other lessons run all the same)
            status, reason = "failed", str(error) if isinstance(error, ClaimError) else repr(error)
    seconds = round(time.perf_counter() - started, 2)
    return {"lesson": name, "status": status, "reason": reason, "result": result, "seconds": seconds}


def show(outcome: dict[str, Any]) -> None:
    """Print the outcome of a lesson."""
    result, status = outcome["result"], outcome["status"]
    for line in [result] if isinstance(result, str) else table(result):
        click.echo(f"  {line}")
    colour = {"passed": "green", "skipped": "yellow", "failed": "red"}[status]
    reason = f": {outcome['reason']}" if outcome["reason"] else ""
    click.echo(f"  {click.style(status, fg=colour)}{reason} ({outcome['seconds']:.1f} s)")


def summarize(outcomes: list[dict[str, Any]]) -> str:
    """Return how many lessons passed, failed or were skipped, and how to run the skipped ones."""
    counts = Counter(outcome["status"] for outcome in outcomes)
    seconds = sum(outcome["seconds"] for outcome in outcomes)
    text = ", ".join(f"{number} {status}" for status, number in counts.items()) + f" in {seconds:.0f} s."
    for need, (_, fix) in NEEDS.items():
        if skipped := [outcome["lesson"] for outcome in outcomes if outcome["reason"] == f"needs {need}"]:
            text += f"\nTo run {', '.join(skipped)}: {fix}"
    return text


PATH = click.Path(exists=True, path_type=Path)
EXAMPLES = """\b
Examples:
  python run_tasks.py                       all lessons but poison, which takes longer
  python run_tasks.py retries crash         these two
  python run_tasks.py words --path FOLDER   count the words of your own files
"""


@click.command(epilog=EXAMPLES)
@click.argument("names", nargs=-1, metavar="[LESSON]...", type=click.Choice(list(LESSONS)))
@click.option("--path", "paths", multiple=True, type=PATH, help="A file or folder for the lesson 'words'.")
@click.option("--list", "as_list", is_flag=True, help="List the lessons.")
@click.option("--embedded", is_flag=True, help="Run without RabbitMQ, inside this process.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each lesson.")
def cli(names: tuple[str, ...], paths: tuple[Path, ...], as_list: bool, embedded: bool, as_json: bool) -> int:
    """Run lessons on the RabbitMQ that .env or the environment names, with the workers that answer.

    If no worker answers, this program starts one. If no RabbitMQ answers and none is named, a broker and a
    worker run inside this process.

    Exit status: 0 if no lesson failed; 1 if any lesson failed; 2 if the lessons could not run.
    """
    if as_list:
        for name, (function, needs) in LESSONS.items():
            click.echo(f"{name:<10} {'*' if 'RabbitMQ' in needs else ' '} {function.__doc__}")
        click.echo("* needs RabbitMQ")
        return 0
    outcomes = []
    app.backend.as_uri()  # A wrong CELERY_RESULT_BACKEND is reported before anything starts
    with local.find_or_start(app, embedded) as run:
        click.echo(run.description, err=as_json)
        for name in names or [name for name in LESSONS if name != "poison"]:
            if not as_json:
                click.echo(f"\n{click.style(name, bold=True)}: {LESSONS[name][0].__doc__}")
            outcomes.append(outcome := run_lesson(name, run, paths))
            click.echo(json.dumps(outcome, default=str)) if as_json else show(outcome)
    click.echo(f"\n{summarize(outcomes)}", err=as_json)
    return int(any(outcome["status"] == "failed" for outcome in outcomes))


def main() -> None:
    """Run the command line. Print an error of the command line, a setting or RabbitMQ in two lines."""
    # Ctrl-C ends the run at once. A KeyboardInterrupt could stop a connection in the middle of a message.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.exit(cli(standalone_mode=False, color=False if os.environ.get("NO_COLOR") else None))
    except click.ClickException as error:
        exit_now(error.format_message(), "python run_tasks.py --help")
    except NoAnswer:
        exit_now(f"No worker answered in {TIMEOUT} s", "celery -A tasks inspect active_queues")
    except (ImproperlyConfigured, ImportError, *BROKER_ERRORS) as error:
        exit_now(*describe_error(error))


if __name__ == "__main__":
    main()
