"""A worker that holds acknowledgements for a minute, so that a test can count them."""

from reliable import worker

worker.ACK_DELAY = 60
