"""An app that is not called `tasks`, whose tasks are in another module, and whose processes are spawned."""

from reliable import Celery

app = Celery("other", backend="rpc://", include=["apps.shared"])
app.conf.worker_pool_start_method = "spawn"
