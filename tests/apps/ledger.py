"""Tasks that note in a file what they did, and a publisher that hands over many of them."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from kombu.exceptions import OperationalError

from reliable import Task
from tasks import app


@app.task
def note(number: int, seconds: float = 0.01) -> int:
    """Take so many seconds, and write a number and the time to the ledger."""
    time.sleep(seconds)
    ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(ledger, b"%d %f\n" % (number, time.time()))
    os.close(ledger)
    return number


@app.task
def note_and_linger(number: int) -> None:
    """Write a number to the ledger, and then take three seconds."""
    note(number)
    time.sleep(3)


@app.task
def note_later(number: int) -> int:
    """Write a number to the ledger once there is a file `go` beside it."""
    while not Path(os.environ["LEDGER"]).with_name("go").exists():
        time.sleep(0.1)
    return note(number)


@app.task(time_limit=1)
def hang() -> None:
    """Exceed the hard time limit."""
    time.sleep(60)


@app.task(bind=True)
def linger(self: Task) -> str:
    """Take a minute, but not when it is delivered again."""
    if not self.request.delivery_info["redelivered"]:
        time.sleep(60)
    return "finished"


def publish(number: int, pace: float, seconds: float = 0.01) -> None:
    """Publish so many tasks of some seconds, one every `pace` seconds, and print what became of them."""
    results: dict[int, Any] = {}
    refused: list[str] = []
    for one in range(number):
        time.sleep(pace)
        try:
            results[one] = note.delay(one, seconds)
        except OperationalError as error:
            refused.append(repr(error))
        print(len(results), flush=True)
    wrong = [one for one, result in results.items() if result.get(timeout=120) != one]
    print(json.dumps({"accepted": list(results), "refused": refused, "wrong": wrong}))


if __name__ == "__main__":
    from apps import ledger  # Under its own name, so that the tasks have theirs

    ledger.publish(int(sys.argv[1]), *map(float, sys.argv[2:]))
