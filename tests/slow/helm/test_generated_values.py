"""All values that the schema allows either render to valid objects or are rejected with a message."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.slow.helm.rendering import CHART, Rendered, Values, ci_values, faults, helm, merged, render
from worker.settings.sources import KNOWN_VARIABLES

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
# Strings with a special meaning in YAML, templates or Kubernetes.
WORDS = st.sampled_from(
    ["a", "true", "null", "1", "1e3", "0x1f", "a: b", "it's", '"', "{{ x }}", "- x", "#", "é", "a b", "~"]
)
LABELS = st.dictionaries(st.sampled_from(["a", "on", "1", "example.com/b"]), WORDS, max_size=3)
# Strings with a required format, by pattern or name.
BY_PATTERN = {
    "^[^,]+$": WORDS,
    "^(https?://.+)?$": st.sampled_from(["", "http://rabbitmq:15672", "https://rabbitmq/path/"]),
    r"^(https?://\S+/)?$": st.sampled_from(["", "https://git.example/vqa-worker/"]),
    "^(https?://[^/?#]+.*)?$": st.sampled_from(["", "http://minio:9000", "https://s3.example"]),
    "^https?://[^/?#]+": st.sampled_from(["http://vllm:8000/v1", "https://api.example/v1"]),
    r"^(metadata\..+)?$": st.sampled_from(["", "metadata.team"]),
    "^(s3://.+)?$": st.sampled_from(["", "s3://answers/prefix"]),
    "^(sha256:[0-9a-f]{64})?$": st.sampled_from(["", f"sha256:{'0' * 64}"]),
    "^([a-z]([-a-z0-9]*[a-z0-9])?)?$": st.sampled_from(["", "on", "true", "null", "y", "a" * 40]),
    "^[0-9]+%$": st.sampled_from(["0%", "25%"]),
    "^([0-9]+(ms|s|m|h))+$": st.sampled_from(["15s", "1m30s"]),
}
# Not in the API of the oldest supported Kubernetes version: `tolerance` of an HPA requires 1.33.
NEWER_FIELDS = {"tolerance"}
BY_NAME = {"rabbitmqUrl": st.sampled_from(["", "amqp://rabbitmq/", "amqps://u:p@rabbitmq:5671/v"])}


def _allowed(schema: Any, example: Any = None, name: str = "") -> st.SearchStrategy[Any]:
    """Return a strategy for a part of the schema; `example` is its value in ci/full-values.yaml."""
    if "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]]
    if name in BY_NAME:
        return BY_NAME[name]
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([_allowed(part, example) for part in schema["anyOf"]])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_of_kind(kind, schema, example) for kind in kinds])


def _of_kind(kind: str, schema: Any, example: Any) -> st.SearchStrategy[Any]:
    match kind:
        case "null" | "boolean":
            return st.none() if kind == "null" else st.booleans()
        case "integer":
            return st.integers(schema.get("minimum", 0), schema.get("maximum", 2**31 - 1))
        case "number":
            return st.floats(schema.get("minimum", 0.5), schema.get("exclusiveMaximum", 2000) - 1)
        case "string":
            return _text(schema)
        case "array" if schema["items"].get("type") in ("string", "integer"):
            return st.lists(_allowed(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
        case "object" if "properties" in schema:
            return _object(schema, example or {})
        case "object" if schema.get("additionalProperties") == {"type": "string"}:
            return LABELS
    # The schema leaves this part to Kubernetes: use an empty value or the valid example.
    nothing: Any = [] if kind == "array" else {}
    return st.sampled_from([nothing, nothing if example is None else example])


def _text(schema: Any) -> st.SearchStrategy[str]:
    if "pattern" in schema:
        return BY_PATTERN[schema["pattern"]]
    return WORDS if schema.get("minLength") else st.just("") | WORDS


def _object(schema: Any, example: Any) -> st.SearchStrategy[Any]:
    parts = {
        name: _allowed(part, example.get(name) if isinstance(example, dict) else None, name)
        for name, part in schema["properties"].items()
        if name not in NEWER_FIELDS
    }
    required = set(schema.get("required", ())) if not example else set()
    return st.fixed_dictionaries(
        {name: part for name, part in parts.items() if name in required},
        optional={name: part for name, part in parts.items() if name not in required},
    )


SECTIONS = {
    name: _allowed(section, ci_values("full").get(name), name)
    for name, section in SCHEMA["properties"].items()
}


@st.composite
def values(draw: st.DrawFn) -> Values:
    """Draw the values of a `ci/` file with up to three changed sections."""
    base = ci_values(draw(st.sampled_from(["minimal", "keda", "hpa", "airgapped", "full"])))
    sections = draw(st.sets(st.sampled_from(sorted(SECTIONS)), min_size=1, max_size=3))
    return merged(base, {name: draw(SECTIONS[name]) for name in sorted(sections)})


def _result(drawn: Values) -> Rendered | str:
    """Return the rendered chart, or the error message."""
    try:
        # Names that YAML parses as a boolean and a number if they are not quoted.
        return render(drawn, name="on", namespace="1")
    except helm.HelmRenderError as error:
        return str(error)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values())
def test_values_render_to_valid_objects_or_are_rejected_with_a_message(drawn: Values) -> None:
    rendered = _result(drawn)
    if isinstance(rendered, str):
        assert "Invalid combination of values:\n- " in rendered
        return
    assert [fault for found in rendered.objects for fault in faults(found)] == []
    assert {*rendered.settings, *rendered.secrets} <= KNOWN_VARIABLES
    grace_s = rendered.pod["spec"]["terminationGracePeriodSeconds"]
    assert (
        grace_s
        > float(rendered.settings["VQA_SHUTDOWN_GRACE"])
        > float(rendered.settings["VQA_MODEL_TIMEOUT"])
    )
    for scaler in rendered.all("ScaledObject"):
        assert 0 <= scaler["spec"]["minReplicaCount"] <= scaler["spec"]["maxReplicaCount"]


@settings(max_examples=25, deadline=None)
@given(WORDS, WORDS, st.lists(WORDS.filter(lambda word: "," not in word), min_size=1))
def test_strings_reach_the_worker_unchanged(queue: str, key: str, buckets: list[str]) -> None:
    changes = {"settings": {"jobsQueue": queue, "allowedBuckets": buckets}, "secrets": {"modelApiKey": key}}
    rendered = render(merged(ci_values("keda"), changes))
    assert rendered.settings["VQA_JOBS_QUEUE"] == queue
    assert rendered.settings["VQA_ALLOWED_BUCKETS"] == ",".join(buckets)
    assert rendered.secrets["VQA_MODEL_API_KEY"] == key
    (trigger,) = rendered.one("ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["queueName"] == queue
