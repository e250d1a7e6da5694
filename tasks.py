"""The tasks of a small shop. A checkout page hands its slow work to Celery, and answers at once.

$ celery -A tasks worker --loglevel info
"""

import contextlib
import hashlib
import os
import re
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from pathlib import Path

from celery.utils.log import get_task_logger
from celery.worker.control import inspect_command

from reliable import Celery, Task

app = Celery("tasks")
app.config_from_object("celeryconfig")


# --- Calling a task -----------------------------------------------------------------------------
@app.task
def add(x: int, y: int) -> int:
    """Add two amounts."""
    return x + y


# --- Slow work that a web page should not wait for ----------------------------------------------
@app.task
def send_email(address: str, seconds: float = 0.5) -> str:
    """Send an e-mail. The slow mail server is simulated by sleeping."""
    time.sleep(seconds)
    return f"sent to {address}"


# --- Real work on your own files ----------------------------------------------------------------
@app.task
def count_words(text: str) -> dict[str, int]:
    """Count the words in `text`, ignoring case."""
    return Counter(re.findall(r"\w+", text.casefold()))


# --- Workflows: small tasks for a chain, a group and a chord ------------------------------------
@app.task
def add_tax(cents: int, percent: int = 20) -> int:
    """Add the tax to an amount in cents."""
    return cents + cents * percent // 100


@app.task
def total(amounts: list[int]) -> int:
    """Add up amounts in cents."""
    return sum(amounts)


@app.task
def receipt(cents: int) -> str:
    """Write the line that the customer reads."""
    return f"You paid {cents / 100:.2f} EUR"


# --- Progress: the customer watches the parcel being packed -------------------------------------
@app.task(bind=True)
def pack_order(self: Task, items: int, seconds: float = 0.1) -> int:
    """Pack items (simulated: it sleeps for `seconds` per item), and report the progress."""
    for packed in range(1, items + 1):
        time.sleep(seconds)
        self.update_state(state="PROGRESS", meta={"packed": packed, "items": items})
    return items


# --- Retries ------------------------------------------------------------------------------------
class GatewayBusyError(Exception):
    """The payment gateway is busy: try again later."""


# The first delay is 1 s. Without jitter the lesson can predict the others. In production keep Celery's
# default, a random delay: then a thousand tasks do not all come back at the same moment.
@app.task(bind=True, autoretry_for=(GatewayBusyError,), retry_backoff=1, retry_jitter=False, secret=True)
def charge_card(self: Task, order: str, busy: int = 2, card: str = "4111 1111 1111 1111") -> str:
    """Charge a card at a simulated gateway, which is busy the first `busy` times."""
    if self.request.retries < busy:
        raise GatewayBusyError(f"attempt {self.request.retries + 1} of {order}: gateway busy")
    if not charge_once(order):
        return f"{order} was paid before"
    return f"{order} paid at attempt {self.request.retries + 1}"


# A task can run twice: its worker may die after the payment, before it acknowledges the task. The number
# of the order is the idempotency key: the books of the simulated gateway hold each number once. They are an
# SQLite file that all workers share. Workers on several machines would need a database server instead.
_default = Path(tempfile.gettempdir(), f"simulated-gateway-{os.getuid()}.sqlite3")
BOOKS = Path(os.environ.get("GATEWAY_BOOKS", _default))


def charge_once(order: str) -> bool:
    """Charge an order once, and return whether this call charged it."""
    with contextlib.closing(sqlite3.connect(BOOKS)) as books, books:
        books.execute("CREATE TABLE IF NOT EXISTS charges (order_number PRIMARY KEY)")
        return books.execute("INSERT OR IGNORE INTO charges VALUES (?)", (order,)).rowcount == 1


# --- Scheduled work: once, or again and again by beat -------------------------------------------
@app.task
def remind(customer: str) -> float:
    """Remind a customer of a full basket (simulated). Return the time, in seconds since the epoch."""
    return time.time()


@app.task(ignore_result=True)
def report_stock() -> None:
    """Report what is in stock (simulated). `celeryconfig.beat_schedule` runs it every ten seconds."""
    get_task_logger(__name__).info("Stock: all lamps are there")


# --- Failures -----------------------------------------------------------------------------------
class OutOfStockError(Exception):
    """There is nothing to ship yet."""


@app.task
def ship(item: str, in_stock_from: float) -> str:
    """Ship an item. It is out of stock before `in_stock_from`, in seconds since the epoch."""
    if time.time() < in_stock_from:
        raise OutOfStockError(f"{item}: out of stock")
    return f"{item}: shipped"


@app.task(soft_time_limit=1)
def draw_label(seconds: float) -> str:
    """Draw a label (simulated). After a second, SoftTimeLimitExceeded is raised here."""
    time.sleep(seconds)
    return "label"


@app.task(time_limit=1)
def draw_stubborn_label(seconds: float) -> str:
    """Draw a label in code that nothing can interrupt (simulated). After a second, its process is killed."""
    time.sleep(seconds)
    return "label"


# --- Priorities: real work for a processor ------------------------------------------------------
@app.task
def serve_customer(name: str) -> float:
    """Seal the gift voucher of a customer with scrypt. Return the time, in seconds since the epoch."""
    hashlib.scrypt(name.encode(), salt=b"shop", n=2**14, r=8, p=1)
    return time.time()


# --- Several worker nodes -----------------------------------------------------------------------
@app.task(bind=True)
def worker_name(self: Task) -> str:
    """Return the name of the worker node that runs this task."""
    return str(self.request.hostname)


@inspect_command()
def reload_prices(state: object) -> dict[str, str]:
    """Answer a broadcast: each worker node runs this remote control command and replies."""
    return {"ok": "prices reloaded"}


# --- Large workloads ----------------------------------------------------------------------------
@app.task(ignore_result=True)
def check_price(item: int) -> bool:
    """Do next to nothing, so that the cost of the messages shows."""
    return item >= 0


# --- Crashes ------------------------------------------------------------------------------------
@app.task(bind=True)
def print_label(self: Task, crashes: int) -> str:
    """Kill the worker process in the first `crashes` attempts, as a bug in C code would."""
    process = f"{os.getpid()} of {self.request.hostname}"
    self.update_state(state="PRINTING", meta={"process": process})
    if self.request.retries < crashes:
        os.kill(os.getpid(), signal.SIGKILL)
    return process
