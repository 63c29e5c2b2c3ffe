"""The dashboard: `panels.py` says what it shows; `python -m deploy.grafana [--check]` writes the JSON."""
