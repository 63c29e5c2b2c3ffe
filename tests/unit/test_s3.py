import pytest

from worker.images.s3 import S3, S3ConfigurationError, _ca_bundle


def test_an_endpoint_that_cannot_be_one_is_told_with_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(S3ConfigurationError, match=r"VQA_S3_ENDPOINT_URL.*my_s3"):
        S3(endpoint_url="http://my_s3:9000", addressing_style="auto", max_connections=1)


def test_the_usual_variable_names_the_authorities_that_s3_is_checked_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert _ca_bundle() is None
    monkeypatch.setenv("SSL_CERT_FILE", "/ca.pem")
    assert _ca_bundle() == "/ca.pem"
    monkeypatch.setenv("AWS_CA_BUNDLE", "/aws.pem")
    assert _ca_bundle() == "/aws.pem"
