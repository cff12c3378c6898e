"""redact: no shape of a credential comes through, and other words stay; `hidden` is sure."""

from __future__ import annotations

import pytest

from jexport.errors import HubError
from jexport.redact import brief, hidden, redact

SECRET = "s3cr3tValue99"


SURE = [
    f"https://ana:{SECRET}@host/path",
    f"https://ana:p@ss@{SECRET}@host/path",
    f"https://ana:it's{SECRET}@host/path",
    f"oci://ana:{SECRET}@host@sha256:{'a' * 64}",
    f"Authorization: Bearer  {SECRET}.abc.def",
    f"https://host/file?token={SECRET}",
    f"https://host/file?a=b&sig={SECRET}&c=d",
    f"https://host/key?X-Amz-Security-Token={SECRET}&X-Amz-Signature={SECRET}",
    f"hf_{SECRET}abcdefgh",
]


@pytest.mark.parametrize("text", SURE)
def test_what_can_only_be_a_credential_is_in_no_error(text: str) -> None:
    for shown in (hidden(text), redact(text), str(HubError(text, evidence=text, fix=text))):
        assert SECRET not in shown
        assert "p@ss" not in shown
        assert "***" in shown
    assert hidden(hidden(text)) == hidden(text)
    assert redact(hidden(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=512, tokenizer: WordPiece",
        "basic tokenizers and a bearer of news",
        "is hf_transfer installed?",
        "https://models.example.org/list?page=2",
        f"oci://host:5000@sha256:{'a' * 64}",
        f"oci://host:5000/team/model@sha256:{'a' * 64}",
    ],
)
def test_our_own_words_stay_in_errors(text: str) -> None:
    assert hidden(text) == text
    assert str(HubError(text, evidence=text, fix=text)).count(text) == 3


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
