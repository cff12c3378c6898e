"""TensorRT's messages: errors become evidence, nothing is printed, one logger for all."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest

from jexport.targets.trt import log


def test_errors_are_kept_and_the_rest_is_not(
    bench: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = log.Log()
    severity = bench.trt.ILogger.Severity
    with caplog.at_level(logging.DEBUG, logger="jexport.targets.trt"):
        for level in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR", "ERROR"):
            heard.logger.log(getattr(severity, level), f" said at {level}\n")
    assert heard.text() == "said at ERROR\nsaid at INTERNAL_ERROR"
    assert len(caplog.messages) == 6
    assert capsys.readouterr() == ("", "")


def test_all_share_one_logger_and_hear_only_from_their_beginning_on(bench: Any) -> None:
    first = log.Log()
    error = bench.trt.ILogger.Severity.ERROR
    first.logger.log(error, "one")
    second = log.Log()
    assert second.logger is first.logger
    second.logger.log(error, "two")
    assert first.text() == "one\ntwo"
    assert second.text() == "two"


def test_only_the_last_words_are_kept(bench: Any) -> None:
    heard = log.Log()
    for number in range(1000):
        heard.logger.log(bench.trt.ILogger.Severity.ERROR, str(number))
    assert heard.text().splitlines() == [str(n) for n in range(1000 - log.KEPT, 1000)]


def test_a_log_that_is_gone_hears_nothing(bench: Any) -> None:
    before = len(log._alive)
    heard = log.Log()
    made = heard.logger
    assert len(log._alive) == before + 1
    del heard
    gc.collect()
    assert len(log._alive) == before
    made.log(bench.trt.ILogger.Severity.ERROR, "to nobody")
