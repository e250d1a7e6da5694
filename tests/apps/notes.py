"""Tasks for the tests of security."""

import os
import time
from typing import Any

from reliable import Task
from tasks import app


@app.task(bind=True)
def note(self: Task, *args: Any, **kwargs: Any) -> None:
    """Write the id of the message to the ledger."""
    with open(os.environ["LEDGER"], "a") as file:
        print(self.request.properties.get("message_id"), file=file)


@app.task(secret=True)
def pay(card: str, seconds: float = 0) -> None:
    """Fail, with an argument that nobody should see."""
    time.sleep(seconds)
    raise ValueError("paid too late")
