"""Lets a worker try to connect again and again without a pause. Otherwise 100 attempts take 45 minutes."""

from kombu.utils import functional

functional.sleep = lambda _seconds: None
