"""The benchmark: this project beside what people would use instead, on one RabbitMQ, in one run.

    $ pip install -e '.[bench]'
    $ python benchmarks/benchmark.py

It starts a RabbitMQ of its own (rabbitmq-server must be on PATH), or uses one that is given, in virtual
hosts that it makes and deletes: `--url amqp://guest:guest@127.0.0.1//`. `--rabbitmqctl` is the command
that controls it: in a container, 'docker compose exec -T rabbitmq rabbitmqctl'. To measure a part:

    $ python benchmarks/benchmark.py --only "this project" --only "Celery, stock" --step consuming

Each figure is the median of as many rounds as `--rounds` says, in which the contenders take turns, with its
lowest and its highest. A worker has two processes. On another machine the figures are others: what counts
is their ratio.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import re
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import celery
import click
import psutil
from kombu import Connection, Queue

HERE = Path(__file__).parent
PROJECT = HERE.parent
sys.path += [str(PROJECT), str(HERE / "contenders")]

from reliable.rabbitmq_node import Node, Program, clean_environment  # noqa: E402
from run_tasks import table  # noqa: E402


class Entry(NamedTuple):
    """What is measured: a module, the packages whose versions are told, and how its worker differs."""

    module: str
    packages: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    settings: str = "{}"  # JSON


CELERY = ("celery", "kombu", "amqp")
TINY = ("--prefetch-multiplier", "32")
CONTENDERS = {
    "this project": Entry("project", CELERY),
    "this project, prefetch 32": Entry("project", CELERY, TINY),
    # Results do not survive a restart of RabbitMQ, as with stock Celery
    "this project, prefetch 32, transient results": Entry(
        "project", CELERY, TINY, '{"result_persistent": false}'
    ),
    "Celery, stock": Entry("stock", CELERY),
    "Dramatiq": Entry("with_dramatiq", ("dramatiq", "pika")),
    "Taskiq": Entry("with_taskiq", ("taskiq", "taskiq-aio-pika", "aio-pika")),
    "kombu alone": Entry("limit", ("kombu", "amqp")),
}
# This project with one thing changed at a time: what a guarantee costs, and what a setting gains
VARIANTS = {
    "as it is": Entry("project", CELERY),
    "without confirms": Entry("project", CELERY, settings='{"unconfirmed": true}'),
    "acknowledged before the work": Entry("project", CELERY, settings='{"task_acks_late": false}'),
    "classic queues": Entry("project", CELERY, settings='{"classic": true}'),
    "prefetch 4": Entry("project", CELERY, ("--prefetch-multiplier", "4")),
    "prefetch 32": Entry("project", CELERY, TINY),
    "prefetch 32, acknowledged one by one": Entry("project", CELERY, TINY, '{"ungrouped": true}'),
    "prefetch 32, threads": Entry("project", CELERY, (*TINY, "--pool", "threads")),
    "prefetch 32, solo": Entry("project", CELERY, (*TINY, "--pool", "solo")),
    "prefetch 32, 8 processes": Entry("project", CELERY, (*TINY, "-c8")),
    "prefetch 32, events": Entry("project", CELERY, (*TINY, "-E")),
    "prefetch 32, log level info": Entry("project", CELERY, (*TINY, "-linfo")),
    "prefetch 32, no gossip, mingle, heartbeat": Entry(
        "project", CELERY, (*TINY, "--without-gossip", "--without-mingle", "--without-heartbeat")
    ),
}
# Where results can go. Stock Celery has chords only with the last of these.
BACKENDS = {
    "this project, rpc://": Entry("project", CELERY, TINY),
    "this project, SQLite": Entry(
        "project", CELERY, TINY, '{"result_backend": "db+sqlite:///FOLDER/results"}'
    ),
    "Celery, stock, Redis": Entry(
        "stock", (*CELERY, "redis"), settings='{"result_backend": "redis+socket://FOLDER/redis"}'
    ),
}
STEPS = (
    "publishing",
    "consuming",
    "tiny_items",
    "nodes",
    "lessons",
    "results",
    "depths",
    "memory",
    "guarantees",
)
FIGURES: dict[str, dict[str, list[float]]] = {}  # by figure, then by contender: one number a round
#: The figures of the chart.
PANELS = {
    "publish in bulk, 100 B, tasks/s": "more is better →",
    "consume, 100 B, tasks/s": "more is better →",
    "with results, 100 B, tasks/s": "more is better →",
    "round trip p50, ms": "← less is better",
}


class GivenNode(NamedTuple):
    """A RabbitMQ that runs already, and the command that controls it."""

    url: str
    rabbitmqctl: str

    def control(self, *arguments: str) -> str:
        """Run rabbitmqctl, and return what it prints."""
        return subprocess.run(
            [*shlex.split(self.rabbitmqctl), *arguments], check=True, stdout=subprocess.PIPE, text=True
        ).stdout


# --- In a process of its own: one who publishes -------------------------------------------------
def prepare_process(environment: dict[str, str]) -> None:
    """Begin such a process."""
    os.environ.update(environment)


def about(contender: str) -> tuple[tuple[str, ...], bool, int]:
    """Return how the worker of a contender is started, whether it has results, how many items it gets."""
    module = importlib.import_module(contender)
    return module.WORKER, hasattr(module, "call"), module.ITEMS


def timed(contender: str, function: str, *arguments: Any) -> tuple[float, float, Any]:
    """Call a function of a contender, ready to publish; return when it began and ended, and its value."""
    module = importlib.import_module(contender)
    module.publish(10, "x")
    began = time.perf_counter()
    value = getattr(module, function)(*arguments)
    ended = time.perf_counter()
    getattr(module, "close", int)()  # without: what was not confirmed may be lost as the process ends
    return began, ended, value


def hand_over(contender: str, accepted: Path) -> None:
    """Publish a thousand tasks, one every five milliseconds. Note the number of each one that is accepted."""
    module = importlib.import_module(contender)
    with accepted.open("w", buffering=1) as file:
        for number in range(1000):
            with contextlib.suppress(Exception):
                module.publish_slow(1, number)
                print(number, file=file)
            time.sleep(0.005)
    with contextlib.suppress(Exception):
        getattr(module, "close", int)()  # As in `timed`


def chord(contender: str, size: int) -> float:
    """Call a chord of so many tasks, ten times after the first; return the median of the seconds."""
    module, seconds = importlib.import_module(contender), []
    for _ in range(11):
        started = time.perf_counter()
        called = celery.chord(module.answer.s("x") for _ in range(size))(module.total.s())
        assert called.get(timeout=60) == size
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def growth(contender: str, function: str, number: int, times: int) -> float:
    """Call a function several times; return by how many KiB each time but the first raised the peak."""
    module, peaks = importlib.import_module(contender), []
    for _ in range(times):
        getattr(module, function)(number, "x" * 100)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (peaks[-1] - peaks[0]) / (times - 1)


# --- One contender ------------------------------------------------------------------------------
class Contender:
    """A contender with a virtual host of its own, and a file in which its workers note what they did."""

    def __init__(self, title: str, entry: Entry, node: Node | GivenNode, folder: Path) -> None:
        self.title, self.module, self.packages, self.node = title, entry.module, entry.packages, node
        self.host = tempfile.mkdtemp(dir=folder).rpartition("/")[2]  # a name that is not taken
        self.file, self.log = folder / self.host / "done", folder / self.host / "log"
        self.file.touch()
        self.published = 0
        node.control("add_vhost", self.host)
        node.control("set_permissions", "-p", self.host, urlsplit(node.url).username or "", *(3 * [".*"]))
        self.environment = {
            "CELERY_BROKER_URL": f"{node.url.rstrip('/')}/{self.host}",
            "BENCHMARK_FILE": str(self.file),
            "BENCHMARK_SETTINGS": entry.settings.replace("FOLDER", str(folder)),
            "PYTHONPATH": os.pathsep.join((str(PROJECT), str(HERE / "contenders"))),
        }
        with self.process() as process:
            worker, self.has_results, self.items = process.apply(about, (self.module,))
        self.command = (*worker, *entry.arguments)

    @contextmanager
    def process(self) -> Iterator[Any]:
        """Give a new process in which functions can be called."""
        context = multiprocessing.get_context("spawn")
        with context.Pool(1, prepare_process, (self.environment,)) as pool:
            yield pool
            pool.close()
            pool.join()

    def ask(self, function: str, *arguments: Any) -> tuple[float, float, Any]:
        """Do what `timed` does in a new process."""
        with self.process() as process:
            told: tuple[float, float, Any] = process.apply(timed, (self.module, function, *arguments))
        self.published += 10 + arguments[0]
        return told

    def rate_of(self, function: str, number: int, *arguments: Any) -> float:
        """Return how many tasks/s a function publishes."""
        began, ended, _ = self.ask(function, number, *arguments)
        return number / (ended - began)

    def note(self, figure: str, number: float, row: str = "") -> None:
        """Add the number of one round to a figure."""
        FIGURES.setdefault(figure, {}).setdefault(row or self.title, []).append(number)

    @contextmanager
    def workers(self, nodes: int = 1) -> Iterator[list[psutil.Process]]:
        """Run its workers, each of two processes; they are killed in the end."""
        names = [("-n", f"node{number}@localhost") for number in range(nodes)] if nodes > 1 else [()]
        with self.log.open("ab") as log:
            running = [
                subprocess.Popen(
                    [sys.executable, *self.command, *name],
                    cwd=HERE / "contenders",
                    env=clean_environment(**self.environment),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                for name in names
            ]
        try:
            yield [psutil.Process(process.pid) for process in running]
        finally:
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def done(self) -> int:
        """Return how much its workers have done: a byte a task."""
        return self.file.stat().st_size

    def numbers(self, before: int) -> set[int]:
        """Return the numbers of the tasks that its workers have run since then."""
        return {int(line) for line in self.file.read_bytes()[before:].replace(b".", b"").split()}

    def time_of(self, number: int) -> float:
        """Wait until its workers have done so much, and return when that was (seconds)."""
        seen, moved = 0, time.monotonic()
        while (done := self.done()) < number:
            if done > seen:
                seen, moved = done, time.monotonic()
            if time.monotonic() - moved > 60:
                raise RuntimeError(f"{self.title} stands still: {self.log.read_text()[-2000:]}")
            time.sleep(0.002)
        return time.perf_counter()

    def wait_for_silence(self) -> None:
        """Wait until its workers, once they have begun, have done nothing for three seconds."""
        seen = self.done()
        self.time_of(seen + 1)
        while seen < (seen := self.done()):
            time.sleep(3)

    def rate(self, first: int, last: int) -> float:
        """Return at how many tasks/s the workers go from the first to the last of those to come."""
        before = self.done()
        started = self.time_of(before + first)
        return (last - first) / (self.time_of(before + last) - started)

    def queues(self) -> dict[str, str]:
        """Return the type of each queue by its name."""
        listed = self.node.control(
            "-q", "list_queues", "-p", self.host, "name", "type", "--formatter", "json"
        )
        return {queue["name"]: queue["type"] for queue in json.loads(listed)}

    def empty(self) -> None:
        """Take away what is left in its queues."""
        listed = self.node.control(
            "-q", "list_queues", "-p", self.host, "name", "messages", "--formatter", "json"
        )
        with Connection(self.environment["CELERY_BROKER_URL"]) as connection, connection.channel() as channel:
            for queue in json.loads(listed):
                if queue["messages"]:  # others may be gone by now
                    Queue(queue["name"])(channel).purge()
        self.published = self.done()

    def catch_up(self) -> None:
        """Wait until its workers have done all that was published."""
        self.time_of(self.published)


def redis(folder: Path) -> Program:
    """Return a Redis server with its default settings, which listens on a socket in the folder."""
    command = ["redis-server", "--port", "0", "--unixsocket", f"{folder}/redis", "--dir", str(folder)]

    class Redis(Program):
        def after_start_check(self) -> bool:
            return (folder / "redis").exists()

    return Redis(command, folder / "redis.log", timeout=30)  # Seconds


def mebibytes(workers: list[psutil.Process]) -> float:
    """Return the memory of workers with all their processes, what they share counted once."""
    everything = [process for worker in workers for process in (worker, *worker.children(recursive=True))]
    return float(sum(process.memory_full_info().pss for process in everything)) / 2**20


# --- What is measured ---------------------------------------------------------------------------
def publishing(contender: Contender, size: int, what: str = "") -> None:
    """Publish tasks with a payload of so many bytes."""
    for way, function, number in (("publish", "publish", 1000), ("publish in bulk", "publish_bulk", 4000)):
        rate = contender.rate_of(function, number, "x" * size)
        contender.note(f"{what}{way}, {size} B, tasks/s", rate)


def consuming(contender: Contender, size: int, what: str = "") -> None:
    """Consume them, and more, whose results are collected."""
    published, started = contender.done(), time.perf_counter()
    with contender.workers() as running:
        contender.note(f"{what}start to first task, s", contender.time_of(published + 1) - started)
        contender.note(f"{what}consume, {size} B, tasks/s", contender.rate(500, 4500))
        contender.catch_up()
        contender.note(f"{what}memory of a worker, MiB", mebibytes(running))
        if contender.has_results:
            rate = contender.rate_of("collect", 1000, "x" * size)
            contender.note(f"{what}with results, {size} B, tasks/s", rate)
            *_, seconds = contender.ask("call", 310)
            calls = sorted(seconds[10:])
            contender.note(f"{what}round trip p50, ms", 1000 * calls[len(calls) // 2])
            contender.note(f"{what}round trip p95, ms", 1000 * calls[len(calls) * 95 // 100])
    contender.empty()


def tiny_items(contender: Contender) -> None:
    """Publish and run tiny items of work, in the contender's own way."""
    with contender.workers():
        contender.ask("publish", 10, "x")
        contender.catch_up()
        began, _, _ = contender.ask("publish_items", contender.items)
        contender.catch_up()
        contender.note("tiny items, items/s", contender.items / (time.perf_counter() - began))
    contender.empty()


def results(contender: Contender) -> None:
    """Collect the results of tasks, and of chords."""
    with contender.workers():
        contender.ask("call", 1)  # Wait for the worker
        contender.note("results: collected, tasks/s", contender.rate_of("collect", 1000, "x"))
        *_, seconds = contender.ask("call", 20)
        contender.note("results: round trip, ms", 1000 * statistics.median(seconds[10:]))
        for size in 10, 100:
            with contender.process() as process:
                seconds = process.apply(chord, (contender.module, size))
            contender.note(f"results: chord of {size}, ms a task", 1000 * seconds / size)
    contender.empty()


def depths(contender: Contender, rounds: int) -> None:
    """Consume from a queue of a thousand tasks, and from one of a hundred thousand."""
    for depth in 1000, 100_000:
        for number in range(rounds):
            if depth == 1000 or not number:
                contender.ask("publish_bulk", depth, "x" * 100)
            with contender.workers():
                contender.note(f"consume, {depth:,} queued, tasks/s", contender.rate(200, 1000))
    contender.empty()


def nodes(contender: Contender) -> None:
    """Consume with one worker node, two and four: tasks that wait for 20 ms."""
    ping = [sys.executable, "-m", "celery", *contender.command[2:4], "inspect", "ping"]
    options: Any = {"cwd": HERE / "contenders", "env": clean_environment(**contender.environment)}
    for number in 1, 2, 4:
        with contender.workers(number):
            while (
                subprocess.run(ping, check=False, capture_output=True, **options).stdout.count(b"pong")
                < number
            ):
                time.sleep(0.5)
            contender.ask("publish_slow", 400 * number)
            rate = contender.rate(4 * 20 * number, 4 * 220 * number) / 4
            contender.note("tasks of 20 ms, tasks/s", rate, f"{contender.title}, {number} nodes")
        contender.empty()


def memory(contender: Contender) -> None:
    """Let memory grow, if it does: in a worker over 100,000 tasks, in a caller with results and in bulk."""
    tasks = 100_000
    with contender.process() as process:
        kibibytes = process.apply(growth, (contender.module, "publish_bulk", tasks // 5, 5))
    contender.note("publisher: growth, B a task", 1024 * kibibytes / (tasks // 5))
    with contender.workers() as running:
        before = contender.done()
        contender.time_of(before + tasks // 5)
        first = mebibytes(running)
        contender.time_of(before + tasks)
        contender.note("worker: growth, B a task", (mebibytes(running) - first) * 2**20 / (tasks * 4 / 5))
        if contender.has_results:
            with contender.process() as process:
                kibibytes = process.apply(growth, (contender.module, "collect", 1000, 10))
            contender.note("caller: growth, B a result", 1024 * kibibytes / 1000)
    contender.empty()


def lessons(project: Contender) -> None:
    """Run all lessons without RabbitMQ, and `parallel` with it, through the driver."""
    driver = [sys.executable, str(PROJECT / "run_tasks.py"), "--json"]
    began = time.perf_counter()
    subprocess.run([*driver, "--embedded"], check=False, capture_output=True)
    project.note("all lessons embedded, s", time.perf_counter() - began)
    environment = clean_environment(**project.environment)
    printed = subprocess.run(
        [*driver, "parallel"], check=True, env=environment, stdout=subprocess.PIPE
    ).stdout
    sentence = json.loads(printed)["result"]
    found = re.search(r"([\d.]+) times as fast", sentence)
    if not found:
        raise RuntimeError(f"expected how many times as fast 8 e-mails at once are, got {sentence!r}")
    project.note("8 slow tasks at once, times as fast (8 is ideal)", float(found[1]))


def guarantees(contender: Contender) -> dict[str, Any]:
    """Return what RabbitMQ sees of a contender, and what a killed worker loses."""

    def channels() -> list[dict[str, Any]]:
        columns = ("vhost", "confirm", "--formatter", "json")
        listed = json.loads(contender.node.control("-q", "list_channels", *columns))
        return [channel for channel in listed if channel["vhost"] == contender.host]

    with contender.process() as process:
        publishing, confirmed = (
            process.apply_async(timed, (contender.module, "publish_bulk", 50_000, "x")),
            False,
        )
        while not publishing.ready():
            confirmed |= any(channel["confirm"] for channel in channels())
    with (
        Connection(contender.environment["CELERY_BROKER_URL"]) as connection,
        connection.channel() as channel,
    ):
        amqp: Any = channel
        queues = contender.queues().items()
        types = {kind for name, kind in queues if amqp.queue_declare(name, passive=True).message_count}
    contender.empty()
    contender.ask("publish_slow", 300)
    before = contender.done()
    with contender.workers():
        contender.time_of(before + 400)  # a quarter of them have run
    with contender.workers():
        contender.wait_for_silence()
    return {
        "contender": contender.title,
        "versions": ", ".join(f"{package} {version(package)}" for package in contender.packages),
        "confirmed publish": "yes" if confirmed else "no",
        "queue": ", ".join(types),
        "lost with a killed worker": f"{300 - len(contender.numbers(before))} of 300",
        "lost with a killed RabbitMQ": lost_with_rabbitmq(contender),
        "results": "yes" if contender.has_results else "no",
    }


def lost_with_rabbitmq(contender: Contender) -> str:
    """Kill RabbitMQ while tasks are published, start it again, and return how many of them never ran."""
    node = contender.node
    if not isinstance(node, Node):
        return ""
    before, file = contender.done(), contender.file.with_name("accepted")
    with contender.process() as process:
        publishing = process.apply_async(hand_over, (contender.module, file))
        while not file.exists() or file.read_text().count("\n") < 300:
            time.sleep(0.01)
        node.kill()
        node.start()
        publishing.get()
    with contender.workers():
        contender.wait_for_silence()
    accepted = {int(line) for line in file.read_text().split()}
    return f"{len(accepted - contender.numbers(before))} of {len(accepted)}"


# --- What is printed ----------------------------------------------------------------------------
def summary() -> list[dict[str, Any]]:
    """Return the median of each figure, its spread, and its ratio to Celery's with stock settings."""
    rows = []
    for figure, by_row in FIGURES.items():
        reference = statistics.median(by_row.get("Celery, stock") or next(iter(by_row.values())))
        for row, numbers in by_row.items():
            median = statistics.median(numbers)
            digits = 2 if abs(median) < 100 else 0
            spread = f"{min(numbers):,.{digits}f} to {max(numbers):,.{digits}f}"
            rows.append(
                {
                    "figure": figure,
                    "": row,
                    "median": f"{median:,.{digits}f}",
                    "lowest to highest": spread,
                    "ratio": f"{median / reference:.2f}" if reference else "",
                }
            )
    return rows


def chart(path: Path) -> None:
    """Draw four of the figures that compare the contenders, in colours for a light and a dark page."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  (slow to import, and needed here only)

    plt.rcParams["svg.fonttype"] = "none"  # text as text: a third of the size
    plt.rcParams |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.edgecolor"), "0.5")
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")
    for axis, (name, better) in zip(axes.flat, PANELS.items(), strict=True):
        shown = [title for title in CONTENDERS if title in FIGURES.get(name, {})]
        medians = [statistics.median(FIGURES[name][title]) for title in shown]
        colours = ["tab:orange" if title.startswith("this project") else "0.6" for title in shown]
        bars = axis.barh(
            [title.replace(", transient", ",\ntransient") for title in shown], medians, color=colours
        )
        axis.bar_label(bars, fmt=lambda x: f"{x:,.0f}" if x > 100 else f"{x:.1f}", padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(f"{name}: {better}", fontsize=10)
    figure.savefig(path, transparent=True)


def steps(
    contenders: list[Contender], variants: list[Contender], backends: list[Contender], rounds: int
) -> list[partial[None]]:
    """Return all that is measured, in its order: in each round the contenders take turns."""
    celery = [contender for contender in contenders if contender.title in ("this project", "Celery, stock")]
    one_round: list[partial[None]] = []
    for size in 100, 10_000:
        for contender in contenders:
            one_round += [partial(publishing, contender, size), partial(consuming, contender, size)]
    one_round += [partial(tiny_items, contender) for contender in contenders]
    for variant in variants:
        one_round += [partial(publishing, variant, 100, "variant: ")]
        one_round += [partial(consuming, variant, 100, "variant: ")]
    one_round += [partial(results, backend) for backend in backends]
    one_round += [partial(nodes, contender) for contender in celery]
    one_round += [partial(lessons, contender) for contender in celery if contender.title == "this project"]
    once = [partial(depths, contender, rounds) for contender in contenders]
    return [*one_round * rounds, *once, *(partial(memory, contender) for contender in celery)]


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Rounds in which the contenders take turns.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write each number of each round.")
@click.option(
    "--chart", "chart_file", type=click.Path(path_type=Path), help="Draw the comparison (SVG, PNG)."
)
@click.option("--url", help="The RabbitMQ to use.  [default: one that is started for the run]")
@click.option("--rabbitmqctl", default="rabbitmqctl", show_default=True, help="The command that controls it.")
@click.option("--only", multiple=True, help="Measure only this contender or variant. Can be repeated.")
@click.option(
    "--step", "names", multiple=True, type=click.Choice(STEPS), help="Measure only this. Can be repeated."
)
def main(  # noqa: PLR0913, PLR0917  (one argument for each option)
    rounds: int,
    json_file: Path | None,
    chart_file: Path | None,
    url: str,
    rabbitmqctl: str,
    only: tuple[str, ...],
    names: tuple[str, ...],
) -> None:
    """Measure this project and its peers side by side, in about seven minutes a round, and fifteen more."""
    if unknown := set(only) - {*CONTENDERS, *VARIANTS, *BACKENDS}:
        known = [*CONTENDERS, *VARIANTS, *BACKENDS]
        raise click.BadParameter(f"{unknown} not among {known}", param_hint="--only")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (home := folder / "rabbitmq").mkdir()
        node = GivenNode(url, rabbitmqctl) if url else stack.enter_context(Node(home))
        contenders, variants, backends = (
            [
                Contender(title, entry, node, folder)
                for title, entry in entries.items()
                if not only or title in only
            ]
            for entries in (CONTENDERS, VARIANTS, BACKENDS)
        )
        if not names or "results" in names:
            stack.enter_context(redis(folder))
        for contender in (*contenders, *variants, *backends):
            stack.callback(node.control, "-q", "delete_vhost", contender.host)
        machine = f"RabbitMQ {node.control('-q', 'version').strip()}, Python {platform.python_version()}"
        machine += f", {os.cpu_count()} cores, {rounds} rounds"
        told: list[dict[str, Any]] = []
        try:
            todo = [
                step
                for step in steps(contenders, variants, backends, rounds)
                if not names or step.func.__name__ in names
            ]
            with click.progressbar(todo, label="Measuring", file=sys.stderr, show_pos=True) as waiting:
                for step in waiting:
                    step()
            if not names or "guarantees" in names:
                told += map(guarantees, contenders)
        finally:
            if json_file:
                everything = {"machine": machine, "guarantees": told, "figures": FIGURES}
                json_file.write_text(json.dumps(everything, indent=1))
    print("\n".join([machine, *table(told), "", *table(summary())]))
    if chart_file:
        chart(chart_file)


if __name__ == "__main__":
    main()
