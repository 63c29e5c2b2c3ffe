"""The prompt tokens of an image, as the providers' documentation says."""

import pytest

from worker.model.image_tokens import image_tokens


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        # The examples in OpenAI's documentation.
        ("gpt-4o", (1024, 1024), 765),
        ("gpt-4o", (2048, 4096), 1105),
        ("gpt-4o", (512, 512), 255),
        ("gpt-4o-mini", (1024, 1024), 2833 + 4 * 5667),
        # A patch of 28 pixels is a token; 4 to 16,384 tokens, according to the model card.
        ("Qwen/Qwen2.5-VL-7B-Instruct", (28, 28), 4 + 2),
        ("Qwen/Qwen2.5-VL-7B-Instruct", (1008, 756), 36 * 27 + 2),
        ("Qwen/Qwen2-VL-72B-Instruct", (1, 1), 4 + 2),
        ("Qwen/Qwen2-VL-72B-Instruct", (7168, 7168), 128 * 128 + 2),
        ("qwen3-vl-8b", (640, 480), 20 * 15 + 2),
        ("meta-llama/Llama-3.2-90B-Vision-Instruct", (640, 480), None),
    ],
)
def test_the_tokens_are_those_of_the_published_rule(
    model: str, size: tuple[int, int], tokens: int | None
) -> None:
    assert image_tokens(model, *size) == tokens
