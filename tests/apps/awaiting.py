"""A program with an event loop, in which hundreds of coroutines call tasks and wait for them."""

import asyncio
import sys

from kombu.exceptions import OperationalError

from reliable.aio import aget
from tasks import add, send_email


async def call(number: int) -> int:
    """Call a task, and wait for its result."""
    while True:
        try:
            result = await asyncio.to_thread(add.delay, number, 1)
        except OperationalError:
            continue  # RabbitMQ has not accepted it
        print("called", flush=True)
        return int(await aget(result, timeout=60))


async def count_turns(turns: list[int]) -> None:
    """Count how often the event loop comes round, every hundredth of a second if nothing blocks it."""
    while True:
        await asyncio.sleep(0.01)
        turns.append(1)


async def main(number: int) -> None:
    """Call so many tasks at once. Then give up waiting, in two ways."""
    turns: list[int] = []
    counting = asyncio.create_task(count_turns(turns))
    sums = await asyncio.gather(*map(call, range(number)))
    counting.cancel()
    print(sum(sums) == number * (number + 1) // 2, len(turns) > 10)
    slow = await asyncio.to_thread(send_email.delay, "Ada", 2)
    waiting = asyncio.create_task(aget(slow))
    await asyncio.sleep(0.1)
    waiting.cancel()
    for wait in (waiting, aget(slow, timeout=0.1)):
        try:
            await wait
        except (asyncio.CancelledError, asyncio.TimeoutError) as error:
            print(type(error).__name__)
    print(await aget(slow, timeout=20))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
