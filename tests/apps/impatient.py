"""Lets a worker wait no longer than three seconds for the parts of a chord."""

from reliable import chords

chords.PARTS_TIMEOUT = 3
