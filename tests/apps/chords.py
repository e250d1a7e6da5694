"""A publisher that hands over chords of ten tasks, each of which writes its number to the ledger."""

import json
import sys
import time

from apps.ledger import note
from celery import chord
from kombu.exceptions import OperationalError

from tasks import total

PARTS = 10


def publish(tasks: int, pace: float) -> None:
    """Publish chords of so many tasks in all, one every `pace` seconds, and print what became of them."""
    results = {}
    refused: list[str] = []
    accepted: list[int] = []
    for first in range(0, tasks, PARTS):
        time.sleep(pace)
        numbers = range(first, first + PARTS)
        try:
            results[numbers] = chord([note.s(number) for number in numbers])(total.s())
            accepted += numbers
        except OperationalError as error:
            refused.append(repr(error))
        print(len(accepted), flush=True)
    wrong = [numbers[0] for numbers, result in results.items() if result.get(timeout=120) != sum(numbers)]
    print(json.dumps({"accepted": accepted, "refused": refused, "wrong": wrong}))


if __name__ == "__main__":
    publish(int(sys.argv[1]), float(sys.argv[2]))
