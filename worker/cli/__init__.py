"""The commands except `run`, as plain functions; `worker.__main__` parses the command line."""
