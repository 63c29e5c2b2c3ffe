"""Links out of `docs/` on the documentation site."""

import pytest
from mkdocs.exceptions import PluginError

from docs.site_links import LINK, _rewritten

REPOSITORY = "https://git.example/vqa-worker/"


def rewritten(link: str, page: str, repository: str | None = REPOSITORY) -> str:
    return LINK.sub(lambda found: _rewritten(found, page, repository), link)


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("concepts.md", "[a](messages.md#job)", "[a](messages.md#job)"),
        ("concepts.md", "[a](../README.md)", "[a](index.md)"),
        ("how-to/s3-stores.md", "[a](../settings.md)", "[a](../settings.md)"),
        ("how-to/s3-stores.md", "[a](../../deploy/aws/README.md)", "[a](../deploy/aws/README.md)"),
        (
            "quickstart.md",
            "[a](../helm/vqa-worker/README.md#testing)",
            "[a](helm/vqa-worker/README.md#testing)",
        ),
        ("helm/vqa-worker/README.md", "[a](../../docs/permissions.md)", "[a](../../permissions.md)"),
        ("helm/vqa-worker/README.md", "[a](../../deploy/aws/)", "[a](../../deploy/aws/README.md)"),
        ("CHANGELOG.md", "[a](docs/logging.md)", "[a](logging.md)"),
        (
            "quickstart.md",
            "[a](../examples/python/ask_with_pika.py)",
            "[a](https://git.example/vqa-worker/blob/HEAD/examples/python/ask_with_pika.py)",
        ),
        ("quickstart.md", "[a](https://pika.readthedocs.io/)", "[a](https://pika.readthedocs.io/)"),
        ("quickstart.md", "[a](#next-steps)", "[a](#next-steps)"),
    ],
)
def test_a_link_leads_to_a_page_of_the_site_or_to_the_source(page: str, link: str, expected: str) -> None:
    assert rewritten(link, page) == expected


def test_a_source_link_is_text_without_the_url_of_the_repository() -> None:
    assert rewritten("[a](../examples/python/ask_with_pika.py)", "quickstart.md", None) == "a"


@pytest.mark.parametrize("target", ["missing.md", "../missing.py", "../docs/missing.md"])
def test_a_broken_link_fails_the_build(target: str) -> None:
    with pytest.raises(PluginError, match=rf"docs/quickstart\.md: the link to {target} is broken"):
        rewritten(f"[a]({target}#anchor)", "quickstart.md")
