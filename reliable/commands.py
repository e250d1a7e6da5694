"""The command `celery -A APP dead-letters`, which Celery finds by the entry point group `celery.commands`."""

import contextlib
import json
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import celery
import click
from amqp import AMQPError
from kombu.exceptions import OperationalError

from reliable.dead_letters import DeadLetter, Stuck, read, requeueing_channel, shorten
from reliable.errors import describe_error, describe_failed_connection, exit_now
from reliable.topology import DEAD_LETTERS

#: One line of the list, for a terminal of 80 columns. The name of a task is whole, since `--task` needs it.
LINE = "{task:<26} {id:<8.8} {arguments:<20} {reason:<9.9} {count:>5} {age:>7}"
HEADING = LINE.format(task="task", id="id", arguments="arguments", reason="reason", count="count", age="age")


def select(
    letters: Iterable[DeadLetter], ids: tuple[str, ...], task: str | None = None, reason: str | None = None
) -> Iterator[DeadLetter]:
    """Yield the dead letters that match the task, the reason and the start of an id.

    A filter that is not given matches all.

    The program exits at the end if there is no dead letter for one of the ids, or if none of them matches.
    """
    missing, others, found = set(ids), 0, False
    for letter in letters:
        if signal.SIGINT in signal.sigpending():  # See `dead_letter_queue`
            raise KeyboardInterrupt
        matching = {start for start in ids if letter.id.startswith(start)}
        missing -= matching
        is_of_task = task in (None, letter.task, letter.headers.get("task"))
        if (matching or not ids) and is_of_task and reason in (None, letter.reason):
            found = True
            yield letter
        else:
            others += 1
    if missing:
        names = ", ".join(sorted(missing)[:3]) + (" …" if len(missing) > 3 else "")
        exit_now(
            f"No dead letter has an ID that starts with {names}, or another command is reading it",
            "celery -A APP dead-letters list",
        )
    if others and not found:
        exit_now(f"None of the {others} dead letters matches", "celery -A APP dead-letters list")


@click.group("dead-letters")
def dead_letters() -> None:
    """List the tasks that failed, run them again, or discard them."""


def refuse_empty_id(
    _context: click.Context, _parameter: click.Parameter, ids: tuple[str, ...]
) -> tuple[str, ...]:
    """Refuse an empty id, such as a variable that is not set: every id starts with it."""
    if "" in ids:
        raise click.BadParameter("it is empty")
    return ids


TASK = "Only dead letters of this task. 'not a task' selects messages that are not tasks."
one_task = click.option("--task", metavar="NAME", help=TASK)
one_reason = click.option("--reason", help="Only dead letters with this reason: rejected, expired …")
some_ids = click.argument("ids", nargs=-1, metavar="[ID]...", callback=refuse_empty_id)


@contextlib.contextmanager
def dead_letter_queue(context: click.Context) -> Iterator[tuple[celery.Celery, Any]]:
    """Yield the app of the command and a channel. Exit if something is wrong with RabbitMQ.

    Ctrl-C takes effect between two dead letters. In the middle of a message it would break the connection,
    and the command would wait for RabbitMQ forever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    app = context.obj.app
    if not hasattr(app, "declare_topology_once"):
        exit_now(
            "This command needs an app of reliable.Celery", "name it after -A: celery -A APP dead-letters …"
        )
    if app.conf.broker_url == "memory://":
        exit_now("Dead letters need RabbitMQ", "name one in CELERY_BROKER_URL or .env")
    nobody_reads = False
    try:
        app.loader.import_default_modules()
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            with requeueing_channel(connection) as channel:
                DEAD_LETTERS(channel).queue_declare(passive=True)  # Declare nothing where no worker has run
                try:
                    yield app, channel
                except BrokenPipeError:
                    nobody_reads = bool(connection.connected)  # Otherwise RabbitMQ's end is closed
                    raise
    except (TimeoutError, AMQPError) as error:
        exit_now(*describe_error(error))
    except (OperationalError, OSError) as error:
        if nobody_reads:  # What is printed
            raise
        exit_now(*describe_failed_connection(app.connection_for_write(), error))


@dead_letters.command("list")
@one_task
@one_reason
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each dead letter.")
@click.pass_context
def list_letters(context: click.Context, task: str | None, reason: str | None, as_json: bool) -> None:
    """List the dead letters: which task, RabbitMQ's reason, how often, and how long since the last time."""
    with dead_letter_queue(context) as (app, channel):
        if not as_json:
            click.echo(HEADING)
        for letter in select(read(app, channel), (), task, reason):
            row = letter.summary()
            line = {**row, "arguments": shorten(row["arguments"], 20)}
            click.echo(json.dumps(row) if as_json else LINE.format(**line))


@dead_letters.command()
@some_ids
@click.pass_context
def show(context: click.Context, ids: tuple[str, ...]) -> None:
    """Show whole dead letters as JSON: headers (with RabbitMQ's `x-death` record), properties and body.

    The error is in the log of the worker.
    """
    with dead_letter_queue(context) as (app, channel):
        for letter in select(read(app, channel), ids):
            click.echo(json.dumps(letter.everything(), indent=2, default=str))


@dead_letters.command()
@some_ids
@one_task
@one_reason
@click.pass_context
def replay(context: click.Context, ids: tuple[str, ...], task: str | None, reason: str | None) -> None:
    """Run all dead letters again, or only the given ones. The first characters of an ID are enough.

    Each task goes back to the queue that it came from.
    """
    published, stuck = 0, []
    try:
        with dead_letter_queue(context) as (app, channel):
            app.declare_topology_once()
            for letter in select(read(app, channel, "Publishing again"), ids, task, reason):
                try:
                    letter.replay()
                    published += 1
                except Stuck as error:
                    stuck.append(f"{letter.name}: {error}")
    finally:
        click.echo(f"{published} published again")
        if stuck:
            first = "; ".join(stuck[:3]) + (" …" if len(stuck) > 3 else "")
            fix = "add the missing queue to task_queues, or empty the full one"
            exit_now(f"{len(stuck)} not published again: {first}", fix)


@dead_letters.command()
@some_ids
@one_task
@one_reason
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def discard(
    context: click.Context, ids: tuple[str, ...], task: str | None, reason: str | None, yes: bool
) -> None:
    """Delete all dead letters for good, or only the given ones. The first characters of an ID are enough.

    It asks first.
    """
    what = "all dead letters"
    what += f" of {task}" if task else ""
    what += f" with the reason {reason}" if reason else ""
    what += f" whose ID starts with {' or '.join(ids)}" if ids else ""
    if not yes:
        click.confirm(f"Permanently delete {what}?", abort=True)
    discarded = 0
    try:
        with dead_letter_queue(context) as (app, channel):
            for letter in select(read(app, channel, "Deleting"), ids, task, reason):
                letter.delete()
                discarded += 1
    finally:
        click.echo(f"{discarded} deleted")
