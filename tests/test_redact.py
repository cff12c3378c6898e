"""redact: no shape of a credential comes through, and other words stay."""

from __future__ import annotations

import pytest

from jexport.redact import brief, redact

SECRET = "s3cr3tValue99"


@pytest.mark.parametrize(
    "text",
    [
        f"https://ana:{SECRET}@host/path",
        f"oci://{SECRET}@host/repo:tag",
        f"Authorization: Bearer {SECRET}.abc.def",
        f"authorization: basic {SECRET}==",
        f"https://bucket.host/key?X-Amz-Signature={SECRET}&X-Amz-Date=1 failed",
        f"{{'aws_secret_access_key': '{SECRET}'}}",
        f'"token": "{SECRET}"',
        f"password={SECRET}",
        f"HF_TOKEN={SECRET}",
        f"hf_{SECRET}abcdefgh",
        "AKIA" + SECRET.upper(),
    ],
)
def test_credentials_are_hidden(text: str) -> None:
    shown = redact(text)
    assert SECRET not in shown
    assert SECRET.upper() not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        f"oci://host:5000/team/model@sha256:{'a' * 64}",
        "s3://bucket/prefix:latest",
        "cannot use folder:///srv/models: PermissionError: [Errno 13]",
        "is it there? try again = later",
        "cuts at 512 tokens, special tokens included",
    ],
)
def test_other_words_stay(text: str) -> None:
    assert redact(text) == text


def test_brief_is_one_line_without_credentials() -> None:
    error = OSError(f"\n  https://ana:{SECRET}@host/ is down\nmore " + "x" * 900)
    assert brief(error) == "OSError: https://***@host/ is down"
    assert len(brief(ValueError("x" * 900))) == 300
