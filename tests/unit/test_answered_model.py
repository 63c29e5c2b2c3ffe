"""A substituted model is logged, once in a while."""

import pytest
from structlog.testing import CapturingLogger

from worker.model.answered_model import AnsweredModels, is_same_model


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("gpt-4o", "gpt-4o"),
        ("gpt-4o", "GPT-4o"),
        ("gpt-4o", "gpt-4o-2024-08-06"),
        ("qwen-vl-max", "qwen-vl-max-20250813"),
        ("mistral-large", "mistral-large-2411"),
        ("openai/gpt-4o", "gpt-4o"),
        ("gemini-2.5-flash", "models/gemini-2.5-flash"),
    ],
)
def test_a_model_has_several_spellings(asked: str, answered: str) -> None:
    assert is_same_model(asked, answered)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("gpt-4o", "gpt-4o-mini"),
        ("gpt-4o-mini", "gpt-4o"),
        ("llama-3", "llama-3-70b"),
        ("m", "other"),
        ("gpt-4o", "xgpt-4o"),
        ("meta-llama/Llama-3.2-90B-Vision-Instruct", "meta-llama/Llama-4-Scout"),
    ],
)
def test_another_model_is_another_model(asked: str, answered: str) -> None:
    assert not is_same_model(asked, answered)


def test_each_pair_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log = CapturingLogger()
    monkeypatch.setattr("worker.model.answered_model.log", log)
    models = AnsweredModels()
    for answered in ("m", None, "x", "x", "y" * 1000, "x", "m"):
        models.check("m", answered)
    assert [call.kwargs for call in log.calls] == [
        {"model": "m", "answered_model": "x"},
        {"model": "m", "answered_model": "y" * 200},
    ]
