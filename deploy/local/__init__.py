"""The services that the worker needs, on this machine and without Docker, for tests, demo and development."""
