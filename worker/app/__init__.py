"""The composition root: build everything, run it, stop it in two phases."""
