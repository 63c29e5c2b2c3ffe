"""Logs, metrics, traces, redaction and HTTP endpoints."""
