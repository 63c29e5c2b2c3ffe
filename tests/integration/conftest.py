"""Integration tests start hundreds of workers."""

from tests.running import Worker

Worker.forks = True
