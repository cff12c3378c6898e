"""retry: so many attempts, pauses that grow, and the count anew where something was reached."""

from __future__ import annotations

import pytest

from jexport.errors import RegistryError
from jexport.publishing.retry import ATTEMPTS, LONGEST_PAUSE_S, TransientError, call_with_retry


def failing(times: int, pause_s: float = 0.0) -> tuple[list[int], object]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise TransientError("503", pause_s=pause_s)
        return "done"

    return calls, call


def test_what_passes_is_tried_again() -> None:
    pauses: list[float] = []
    calls, call = failing(ATTEMPTS - 1)
    assert call_with_retry(call, what="it", sleep=pauses.append) == "done"  # type: ignore[arg-type]
    assert (len(calls), len(pauses)) == (ATTEMPTS, ATTEMPTS - 1)
    assert 0 < pauses[0] < pauses[-1] <= LONGEST_PAUSE_S


def test_it_ends() -> None:
    calls, call = failing(99)
    with pytest.raises(RegistryError, match=f"it failed {ATTEMPTS} times") as caught:
        call_with_retry(call, what="it", sleep=lambda seconds: None)  # type: ignore[arg-type]
    assert len(calls) == ATTEMPTS
    assert caught.value.evidence == "503"


def test_other_errors_are_not_tried_again() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise ValueError("another")

    with pytest.raises(ValueError, match="another"):
        call_with_retry(call, what="it", sleep=lambda seconds: None)
    assert len(calls) == 1


def test_the_count_begins_anew_where_something_was_reached() -> None:
    calls, call = failing(5 * ATTEMPTS)
    reached = lambda: len(calls) // 3  # noqa: E731
    assert call_with_retry(call, what="it", reached=reached, sleep=lambda s: None) == "done"  # type: ignore[arg-type]


def test_the_tries_of_a_library_count() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise TransientError("503", tries=3)

    with pytest.raises(RegistryError, match=f"it failed {ATTEMPTS} times"):
        call_with_retry(call, what="it", sleep=lambda seconds: None)
    assert len(calls) == ATTEMPTS // 3


def test_a_service_may_ask_for_a_pause_but_not_for_an_hour() -> None:
    for asked, waited in ((3.0, 3.0), (3600.0, 2 * LONGEST_PAUSE_S)):
        pauses: list[float] = []
        call_with_retry(failing(1, asked)[1], what="it", sleep=pauses.append)  # type: ignore[arg-type]
        assert pauses == [waited]
