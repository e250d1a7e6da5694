"""What strangers, thieves and broken programs try: TLS, a user of few rights, hostile messages, secrets."""

import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
from amqp import AccessRefused, AMQPError, NotAllowed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Connection, Exchange, Producer, Queue
from programs import PATHS, PROJECT, celery, drive, outcomes, python, what_is_wrong

import run_tasks
from reliable.rabbitmq_node import Node, clean_environment, free_port
from reliable.testing import Worker, depth, until


# --- TLS ----------------------------------------------------------------------------------------
class TLSNode(Node):
    """A RabbitMQ node that speaks TLS on a second port, with a certificate that can be changed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "[rabbitmq_auth_mechanism_ssl].")
        self.tls_port, self.files = free_port(), folder
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        with self.configuration.open("a") as configuration:
            configuration.write(
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
                f"ssl_options.cacertfile = {folder}/ca.pem\n"
                f"ssl_options.certfile = {folder}/server.pem\n"
                f"ssl_options.keyfile = {folder}/server.key\n"
                "ssl_options.verify = verify_peer\n"
                "ssl_options.fail_if_no_peer_cert = false\n"
                "ssl_cert_login_from = common_name\n"
                "auth_mechanisms.1 = PLAIN\nauth_mechanisms.2 = AMQPLAIN\nauth_mechanisms.3 = EXTERNAL\n"
            )
        self.take_certificate()

    def take_certificate(self, *names: str, **options: Any) -> None:
        """Take a certificate of the authority for these names."""
        server = self.authority.issue_cert(*(names or ["127.0.0.1"]), **options)
        server.private_key_pem.write_to_path(self.files / "server.key")
        server.cert_chain_pems[0].write_to_path(self.files / "server.pem")
        if self.running():
            self.control("eval", "ssl:clear_pem_cache().")

    def variables(self, **more: str) -> dict[str, str]:
        """Return what `.env` says to reach it."""
        variables = {"RABBITMQ_HOST": "127.0.0.1", "RABBITMQ_PORT": str(self.tls_port)}
        return {**variables, "RABBITMQ_CA": str(self.files / "ca.pem"), **more}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TLSNode]:
    """Run a node with TLS."""
    with TLSNode(tmp_path_factory.mktemp("tls")) as node:
        yield node


def all_lessons_pass(**variables: str) -> None:
    """Run all lessons, and check that each passes."""
    lessons = outcomes(drive("--json", *run_tasks.LESSONS, **variables))
    assert {name: lesson["status"] for name, lesson in lessons.items()} == dict.fromkeys(
        run_tasks.LESSONS, "passed"
    )


def test_all_lessons_run_over_tls(tls: TLSNode) -> None:
    all_lessons_pass(**tls.variables())


def test_a_certificate_bears_the_name_of_the_first_node_in_the_url(tls: TLSNode) -> None:
    urls = f"amqps://first.invalid//;amqps://127.0.0.1:{tls.tls_port}//"
    code = "import tasks; print(tasks.app.connection_for_write().ensure_connection().connected)"
    variables = tls.variables(CELERY_BROKER_URL=urls)
    tls.take_certificate("first.invalid", "127.0.0.1")
    try:
        assert python("-c", code, **variables).stdout == "True\n"
    finally:
        tls.take_certificate()


def test_a_client_certificate_is_a_login(tls: TLSNode, tmp_path: Path) -> None:
    tls.control("add_user", "ada", "not used")
    tls.control("clear_password", "ada")
    tls.control("set_permissions", "ada", ".*", ".*", ".*")
    for name in "ada", "eve":
        client = tls.authority.issue_cert(f"{name}@example.com", common_name=name)
        client.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")

    def hello(name: str) -> "subprocess.CompletedProcess[str]":
        file = str(tmp_path / f"{name}.pem")
        return drive("hello", **tls.variables(RABBITMQ_CERT=file, RABBITMQ_KEY=file))

    assert hello("ada").returncode == 0
    assert "refuses this user" in what_is_wrong(hello("eve"))


def test_what_is_wrong_with_tls_is_reported(tls: TLSNode, tmp_path: Path) -> None:
    hello = partial(drive, "hello")
    # Another authority
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    other = str(tmp_path / "other.pem")
    refused = " is refused ("
    assert f"{refused}self-signed certificate in" in what_is_wrong(hello(**tls.variables(RABBITMQ_CA=other)))
    # Another name
    tls.take_certificate("rabbitmq.example")
    assert f"{refused}IP address mismatch" in what_is_wrong(hello(**tls.variables()))
    tls.take_certificate()
    # Without TLS to its port, and with TLS to the other
    plain = f"amqp://guest:guest@127.0.0.1:{tls.tls_port}//"
    assert "does that port require TLS?" in what_is_wrong(hello(CELERY_BROKER_URL=plain))
    assert "does not support TLS (" in what_is_wrong(hello(**tls.variables(RABBITMQ_PORT=str(tls.port))))
    # Out of date
    long_ago = datetime.now(timezone.utc) - timedelta(days=30)
    tls.take_certificate(not_before=long_ago, not_after=long_ago + timedelta(days=1))
    try:
        assert f"{refused}certificate has expired" in what_is_wrong(hello(**tls.variables()))
    finally:
        tls.take_certificate()
    assert hello(**tls.variables()).returncode == 0


def test_files_of_tls_are_looked_at_first(tls: TLSNode, tmp_path: Path) -> None:
    assert "No such file" in what_is_wrong(drive("hello", RABBITMQ_CA="no-such.pem"))
    (tmp_path / "no.pem").write_text("no certificate")
    assert "no.pem" in what_is_wrong(drive("hello", RABBITMQ_CA=str(tmp_path / "no.pem")))
    assert "set together" in what_is_wrong(drive("hello", **tls.variables(RABBITMQ_CERT="some.pem")))
    login = {"RABBITMQ_CERT": str(tls.files / "server.pem"), "RABBITMQ_KEY": str(tls.files / "server.key")}
    for variables in (tls.variables(), login):
        stopped = drive("hello", **variables | {"CELERY_BROKER_URL": tls.url})
        assert "has a node without TLS" in what_is_wrong(stopped)


# --- A user of few rights -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def few_rights(session_node: Node) -> str:
    """Make the user of docs/security.md, with its very commands; give the URL for that user."""
    page = (PROJECT / "docs" / "security.md").read_text()
    (names,) = re.findall(r"^\$ names='(.*)'$", page, re.MULTILINE)
    commands = re.findall(r"^\$ sudo rabbitmqctl (.*)$", page, re.MULTILINE)
    for command in commands:
        session_node.control(*(names if word == "$names" else word for word in shlex.split(command)))
    session_node.control("set_permissions", "-p", "shop", "guest", ".*", ".*", ".*")
    assert [command.split()[0] for command in commands] == ["add_vhost", "add_user", "set_permissions"]
    return session_node.url.replace("guest:guest", "shop:choose-one").removesuffix("/") + "shop"


def test_all_lessons_run_as_a_user_of_few_rights(few_rights: str) -> None:
    all_lessons_pass(CELERY_BROKER_URL=few_rights)


def test_a_user_of_few_rights_can_do_no_more(few_rights: str) -> None:
    with Connection(few_rights.replace("shop:choose-one", "guest:guest")) as guest:
        others = Queue("others", Exchange("others", "fanout"))(guest.channel())
        others.declare()
    attempts: list[Callable[[Any], Any]] = [
        lambda channel: channel.queue_declare("mine"),
        lambda channel: channel.exchange_declare("mine", "fanout"),
        lambda channel: channel.queue_delete("others"),
        lambda channel: channel.queue_purge("others"),
        lambda channel: channel.basic_get("others"),
        lambda channel: channel.basic_consume("others"),
        lambda channel: channel.queue_bind("default", "others"),
        lambda channel: channel.queue_bind("others", "tasks", "#"),
        lambda channel: Producer(channel).publish("x", exchange="others"),
        lambda channel: Producer(channel).publish("x", exchange="amq.topic"),
    ]
    confirming = {"confirm_publish": True}
    for attempt in attempts:
        with Connection(few_rights, transport_options=confirming) as connection, pytest.raises(AccessRefused):
            attempt(connection.channel())
    elsewhere = Connection(few_rights.removesuffix("shop") + "/")
    with elsewhere, pytest.raises(NotAllowed):
        elsewhere.connect()


def test_a_worker_whose_rights_are_taken_away_for_a_while_goes_on(
    session_node: Node, tmp_path: Path, fresh: str
) -> None:
    host = tmp_path.name
    grant = partial(session_node.control, "set_permissions", "-p", host, "ada")

    def connections() -> int:
        return session_node.control("-q", "list_connections", "vhost").split().count(host)

    def add() -> str:
        code = "import tasks; print(tasks.add.delay(2, 2).get(timeout=60))"
        return python("-c", code, CELERY_BROKER_URL=fresh).stdout

    session_node.control("add_user", "ada", "secret")
    grant(".*", ".*", ".*")
    with Worker("tasks", fresh.replace("guest:guest", "ada:secret"), tmp_path, "-c1") as worker:
        assert add() == "4\n"
        before = connections()
        # When it has tried to declare its queues many times
        grant("^$", ".*", ".*")
        session_node.control("close_all_connections", "-p", host, "test")
        until(lambda: worker.log.read_text().count("ACCESS_REFUSED") > 20)
        grant(".*", ".*", ".*")
        # Then it runs tasks again, and none of those connections is left
        assert add() == "4\n"
        until(lambda: connections() <= before)


# --- Hostile messages ---------------------------------------------------------------------------
class Victim:
    """A worker, and the means to publish what nobody should."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.ledger, self.log = url, folder / "ledger", folder / "worker.log"
        self.ledger.touch()
        arguments = ("-c2", "-E", "--include", "apps.notes")
        self.worker = Worker("tasks", url, folder, *arguments, **PATHS, LEDGER=str(self.ledger))
        self.producer: Producer | None = None
        self.connection: Connection

    def process(self) -> psutil.Process:
        """Return the worker's main process."""
        assert self.worker.process
        return psutil.Process(self.worker.process.pid)

    def call(self, code: str) -> "subprocess.CompletedProcess[str]":
        """Run Python code that publishes as it should."""
        return python("-c", f"import tasks\nfrom apps import notes\n{code}", CELERY_BROKER_URL=self.url)

    def send(self, *messages: tuple[bytes, dict[str, Any]]) -> int:
        """Publish messages, each with its properties, to the queue `default`; return how many were taken."""
        taken = 0
        for body, properties in messages:
            with contextlib.suppress(AMQPError, OSError):
                if self.producer is None:
                    self.connection = Connection(self.url, transport_options={"confirm_publish": True})
                    self.producer = Producer(self.connection.channel())
                try:
                    self.producer.publish(body, exchange="tasks", routing_key="default", **properties)
                    taken += 1
                except BaseException:  # it is no more
                    self.producer = None
                    raise
        return taken

    def letters(self, number: int) -> list[Any]:
        """Wait for dead letters, as they are: to unpack one could be what it wants."""
        with Connection(self.url) as connection:
            channel: Any = connection.channel()
            return [until(partial(channel.basic_get, "dead-letters", no_ack=True)) for _ in range(number)]

    def ran(self) -> list[str]:
        """Return the message id of each task that ran."""
        return self.ledger.read_text().split()

    def rest(self) -> int:
        """Wait until no message waits or is unacknowledged; return how many dead letters there are."""
        inspect = partial(celery, self.url, "inspect", "-j")
        until(lambda: depth(self.url, "default") == 0)
        until(lambda: '"id"' not in inspect("active").stdout + inspect("reserved").stdout, 5)
        return depth(self.url, "dead-letters")


@pytest.fixture(scope="module")
def victim(session_node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """Run a worker on a virtual host of its own."""
    victim = Victim(session_node.virtual_host("victim"), tmp_path_factory.mktemp("victim"))
    with victim.worker:
        yield victim
        assert victim.worker.running()
    victim.connection.release()


def properties(task: str = "apps.notes.note", content_type: str = "application/json", **headers: Any) -> Any:
    """Return the properties of a message that is a task, or says so."""
    headers = {"task": task, "id": str(uuid.uuid4()), **headers}
    return {"content_type": content_type, "content_encoding": "binary", "headers": headers}


def bomb() -> bytes:
    """Return ten megabytes that unpack to ten gigabytes."""
    packer = zlib.compressobj(9)
    head, zeros = packer.compress(b"[") + packer.flush(zlib.Z_FULL_FLUSH), bytes(2**26)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + 150 * block


HOSTILE: dict[str, Callable[[str], tuple[bytes, Any]]] = {
    "pickle": lambda command: (
        pickle.dumps(Command(command)),
        properties(content_type="application/x-python-serialize"),
    ),
    "yaml": lambda command: (
        f"!!python/object/apply:os.system ['{command}']".encode(),
        properties(content_type="application/x-yaml"),
    ),
    "pickle that says it is JSON": lambda command: (pickle.dumps(Command(command)), properties()),
    "a bomb": lambda _: (bomb(), properties(compression="application/x-gzip")),
    "deep": lambda _: (b"[" * 200_000 + b"]" * 200_000, properties()),
    "a task of control characters": lambda _: (
        b"[[], {}, {}]",
        properties("\x1b[31m\r\nCRITICAL: all is lost"),
    ),
    "odd arguments": lambda _: (b"[1, 2]", properties()),
    "compressed by who knows": lambda _: (b"[[], {}, {}]", properties(compression="application/zstd")),
    "a bomb of a codec": lambda _: (
        bomb(),
        properties(content_type="application/data") | {"content_encoding": "zlib"},
    ),
    **{
        f"odd {name}": partial(lambda headers, _: (b"[[], {}, {}]", properties(**headers)), {name: value})
        for name, value in {
            "timelimit": ["x", None],
            "eta": "2099-01-01T00:00:00",
            "stamped_headers": [[1]],
        }.items()
    },
    "odd keyword arguments": lambda _: (b"[[], 5, {}]", properties()),
}


class Command:
    """Unpickled, it runs a command of the shell."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_message_does_nothing(victim: Victim, tmp_path: Path, what: str) -> None:
    ran = victim.ran()
    assert victim.send(HOSTILE[what](f"touch {tmp_path}/run")) == 1
    # It becomes a dead letter, and nothing of it is run
    (letter,) = victim.letters(1)
    assert letter.headers["x-death"][0]["reason"] == "rejected"
    assert not (tmp_path / "run").exists()
    assert victim.ran() == ran
    # The log holds no control characters, and the worker's memory is no more than before
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", victim.log.read_text())
    status = Path(f"/proc/{victim.process().pid}/status").read_text()
    assert int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) < 500_000
    assert victim.call("print(notes.note.delay().get(timeout=20))").stdout == "None\n"


def test_a_task_with_ten_thousand_headers_is_run(victim: Victim) -> None:
    ran = victim.ran()
    many: dict[str, Any] = {f"h{number}": 1 for number in range(10_000)}
    assert victim.send((b"[[], {}, {}]", properties(**many))) == 1
    until(lambda: len(victim.ran()) == len(ran) + 1)


def test_what_unpacks_to_less_is_run(victim: Victim) -> None:
    for name in "zlib", "bzip2", "lzma":
        code = f"print(notes.note.apply_async(('x' * 2**22,), compression={name!r}).get(timeout=20))"
        assert victim.call(code).stdout == "None\n"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
ODD_HEADERS = ["argsrepr", "compression", "eta", "group", "ignore_result", "kwargsrepr", "lang", "origin"]
ODD_HEADERS += ["parent_id", "replaced_task_nesting", "retries", "root_id", "shadow", "stamped_headers"]
ODD_HEADERS += ["timelimit", "x-delivery-count", "id", "task"]
TASKS = st.sampled_from([*["apps.notes.note"] * 8, "no.such"])
USUAL = st.fixed_dictionaries({"task": TASKS, "id": st.uuids().map(str)})
HEADERS = st.builds(dict.__or__, USUAL, st.dictionaries(st.sampled_from(ODD_HEADERS), VALUES, max_size=2))
EMBEDDED = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["callbacks", "errbacks", "chain", "chord"], JSON)
)
BODIES = st.one_of(
    st.just(b"[[], {}, {}]"),
    st.tuples(JSON, JSON, JSON | EMBEDDED).map(lambda value: json.dumps(value).encode()),
    st.tuples(st.lists(JSON), st.just({}), EMBEDDED).map(lambda value: json.dumps(value).encode()),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
)
TYPES = st.sampled_from([*["application/json"] * 6, "text/plain", "application/data"])
PROPERTIES = st.fixed_dictionaries(
    {
        "headers": HEADERS,
        "content_type": TYPES | TYPES | st.text(st.characters(codec="ascii"), max_size=20),
        "content_encoding": st.sampled_from([*["utf-8"] * 8, "binary", "utf-16", "zlib", "rot13", ""]),
    }
)


@pytest.mark.parametrize(
    ("exchange", "key", "content_type"),
    [("celery.pidbox", "", "text/plain"), ("celeryev", "worker.odd", "application/json")],
    ids=["remote control", "event"],
)
def test_an_odd_broadcast_stops_nothing(victim: Victim, exchange: str, key: str, content_type: str) -> None:
    before = victim.log.read_text().count("Connected to")
    with Connection(victim.url) as connection:
        producer = Producer(connection.channel())
        producer.publish(
            b"{}", exchange=exchange, routing_key=key, content_type=content_type, content_encoding="utf-8"
        )
    assert victim.call("print(notes.note.delay().get(timeout=20))").stdout == "None\n"
    assert celery(victim.url, "inspect", "ping").returncode == 0
    assert victim.log.read_text().count("Connected to") == before


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")  # a false alarm
@pytest.mark.timeout(600)  # seconds
def test_thousands_of_hostile_messages_are_accounted_for(victim: Victim) -> None:
    sent = 0

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(BODIES, PROPERTIES)
    def send(body: bytes, properties: dict[str, Any]) -> None:
        nonlocal sent
        sent += victim.send((body, {**properties, "message_id": str(sent)}))

    process = victim.process()
    children = {child.pid for child in process.children()}
    send()
    letters = victim.letters(victim.rest())
    assert sent > 1000
    died = {letter.properties.get("message_id") for letter in letters} - {None}
    ran = set(victim.ran()) - {"None"}
    print(f"{sent} hostile messages: {len(ran)} were tasks and ran, {len(died)} are dead letters")
    # Some ran, and failed at what was to be done with their result
    assert ran | died == set(map(str, range(sent)))
    assert len(ran) > 100
    # The worker is the one that it was, with its processes
    assert process.is_running()
    assert {child.pid for child in process.children()} == children
    # Both of them run tasks
    victim.call("[notes.pay.delay('', 5) for _ in range(2)]")
    until(lambda: celery(victim.url, "inspect", "active", "-j").stdout.count("worker_pid") == 2, 10)
    victim.letters(2)


# --- Secrets ------------------------------------------------------------------------------------
CARD = "5500 0000 0000 0004"


def test_a_secret_argument_is_in_no_log_and_no_monitor(victim: Victim, tmp_path: Path) -> None:
    watched = tmp_path / "events"
    command = [sys.executable, "-m", "celery", "-A", "tasks", "events", "--dump"]
    environment = clean_environment(CELERY_BROKER_URL=victim.url, PYTHONUNBUFFERED="1")
    with watched.open("w") as output:
        monitor = subprocess.Popen(command, env=environment, cwd=PROJECT, stdout=output)
    try:
        until(lambda: "heartbeat" in watched.read_text())
        # When a task that has the number of a card runs, and fails; and when nobody knows it
        celery(victim.url, "call", "apps.notes.pay", "-a", json.dumps([CARD, 5]))  # Unknown to its caller
        active = until(lambda: celery(victim.url, "inspect", "active", "-j").stdout.partition("notes.pay")[2])
        victim.call(f"tasks.charge_card.delay('order 7', busy=0, card={CARD!r}).get(timeout=20)")
        victim.send((json.dumps([[CARD], {}, {}]).encode(), properties("no.such")))
        until(lambda: depth(victim.url, "dead-letters") == 2)
        listing = "dead-letters", "list", "--task", "apps.notes.pay"
        listed = celery(victim.url, *listing, app="apps.notes").stdout
        letters = victim.letters(2)
        until(lambda: "task failed" in watched.read_text())
    finally:
        monitor.terminate()
        monitor.wait()
    # Then it is in the messages, and nowhere else
    assert all(CARD in str(letter.body) for letter in letters)
    for seen in active, watched.read_text(), listed:
        assert "(secret)" in seen
    for seen in active, victim.log.read_text(), watched.read_text(), listed:
        assert CARD not in seen


# --- Containers ---------------------------------------------------------------------------------
def test_the_user_of_compose_may_do_what_the_one_of_the_docs_may() -> None:
    page, compose = ((PROJECT / name).read_text() for name in ("docs/security.md", "docker-compose.yml"))
    (names,) = re.findall(r"^\$ names='(.*)'$", page, re.MULTILINE)
    permissions = re.findall(r"default_permissions\.\w+ = (.*)", compose)
    assert [permission.replace("$$", "$") for permission in permissions] == 3 * [names]


def test_containers_are_published_on_this_machine_and_can_do_little() -> None:
    command = ["docker", "compose", "--profile", "*", "config", "--format", "json"]
    run = partial(subprocess.run, cwd=PROJECT, env=clean_environment(), capture_output=True)
    if not shutil.which("docker") or run(["docker", "compose", "version"]).returncode:
        pytest.skip("docker compose is not on PATH")
    services = json.loads(run(command, check=True).stdout)["services"]
    brokers, programs = {"rabbitmq", "rabbit1", "rabbit2", "rabbit3"}, {"worker", "beat", "flower"}
    assert set(services) == brokers | programs | {"prometheus"}
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ()))
        assert int(service["mem_limit"]) <= 2**30
        assert service["cpus"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for name in programs:
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]
        assert "USER app" in services[name]["build"]["dockerfile_inline"]
        (shared,) = services[name]["volumes"]
        assert Path(services[name]["environment"]["GATEWAY_BOOKS"]).parent == Path(shared["target"])
    for name in brokers:
        assert re.fullmatch(r"rabbitmq:\d+\.\d+-management", services[name]["image"])
