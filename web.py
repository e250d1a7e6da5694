"""The checkout page of the shop. It does its slow work before it answers, or hands the work to Celery.

$ pip install -e '.[web]'
$ CELERY_RESULT_BACKEND=db+sqlite:///results.sqlite flask --app web run
"""

from typing import Any
from uuid import UUID, uuid4

from celery import Signature
from flask import Flask, render_template
from kombu.exceptions import OperationalError

import tasks
from reliable.errors import exit_now
from reliable.local import run_until_exit

if tasks.app.conf.result_backend == "rpc://":  # Only the process that called a task would see its result
    exit_now("The page needs a database for results", "CELERY_RESULT_BACKEND=db+sqlite:///results.sqlite")
run_until_exit(tasks.app)
app = Flask(__name__)
EMAILS = [f"customer{number}@example.com" for number in range(8)]


@app.get("/")
def page() -> str:
    """Show the page. The number of its order is the idempotency key of the payment."""
    return render_template("checkout.html", order=uuid4())


@app.post("/orders/<uuid:order>/slow")
def check_out_one_after_another(order: UUID) -> str:
    """Charge the card and send the e-mails before the page answers."""
    tasks.charge_card(str(order), busy=0)
    for email in EMAILS:
        tasks.send_email(email)
    return "Paid, and eight e-mails sent."


def work_after_payment(order: UUID) -> dict[str, Signature]:
    """Return the tasks of an order by name. Their ids name the order, so any process can ask for them."""
    work = {"parcel": tasks.pack_order.si(10, 0.3)}
    work |= {f"e-mail {number}": tasks.send_email.si(email) for number, email in enumerate(EMAILS, 1)}
    for name, task in work.items():
        task.freeze(f"{order} {name}")
    return work


@app.post("/orders/<uuid:order>/celery")
def check_out_with_celery(order: UUID) -> tuple[str, int]:
    """Hand the work to Celery in one message, so that the whole order is accepted or none of it."""
    work = list(work_after_payment(order).values())
    try:
        tasks.charge_card.apply_async((str(order), 0), task_id=f"{order} payment", link=work)
    except OperationalError:
        return "Your order was not accepted. Please try again.", 503
    return "Thank you.", 202


@app.get("/orders/<uuid:order>")
def states(order: UUID) -> dict[str, Any]:
    """Return the state of each task of an order, and how many items of the parcel are packed."""
    names = ["payment", *work_after_payment(order)]
    results = {name: tasks.app.AsyncResult(f"{order} {name}") for name in names}
    parcel = results["parcel"].info  # The progress, the result, or an error
    packed = parcel["packed"] if isinstance(parcel, dict) else parcel
    return {
        "states": {name: result.state for name, result in results.items()},
        "packed": packed if isinstance(packed, int) else None,
    }
