"""A worker that holds acknowledgements for a minute, so that a test can count them."""

from reliable import acknowledging

acknowledging.DELAY = 60
