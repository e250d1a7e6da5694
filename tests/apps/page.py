"""A page of the shop, which needs the result of a task. The web servers of the tests show it."""

import tasks


def answer(path: str) -> str:
    """Add one to a number; or print a label, which kills a worker process."""
    if path == "label":
        tasks.print_label.delay(1).get(timeout=20)
        return "printed"
    return str(tasks.add.delay(int(path), 1).get(timeout=20))
