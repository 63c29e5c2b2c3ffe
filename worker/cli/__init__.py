"""Commands beside `run`: what they do, as plain functions; the command line itself is `__main__`."""
