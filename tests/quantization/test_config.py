"""config: what `full` tries holds the recipe's own choice, and every trial has its own name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jexport.quantization import config
from jexport.quantization.config import QuantizationConfig

OWN = QuantizationConfig(scheme="asymmetric", smoothing=0.85)


@pytest.mark.parametrize("own", [OWN, replace(OWN, smoothing=0.6, clip=0.95)])
def test_the_own_config_is_tried_once_and_before_other_strengths(own: QuantizationConfig) -> None:
    tried = [one for _, one in config.candidate_configs(own)]
    assert tried.count(own) == 1
    assert tried.index(own) == 4  # after the four that leave a part out
    assert {one.gptq for one in tried[:2]} == {False}
    assert [one.balance for one in tried] == [False] * 4 + [True] * (len(tried) - 4)
    assert {(one.smoothing, one.clip) for one in tried[4:]} >= set(config.FULL_EFFORT_GRID)
    assert {one.scheme for one in tried} == {own.scheme}
    assert {one.precision for one in tried} == {own.precision}


def test_each_is_told_apart_in_words_and_in_names() -> None:
    tried = list(config.candidate_configs(OWN))
    assert len({what for what, _ in tried}) == len(tried)
    keys = [one.key(fallback) for _, one in tried for fallback in ((), ("a",), ("b", "a"))]
    assert len(set(keys)) == len(keys)
    assert not any(set(key) & set("/\0 ") for key in keys)
    assert OWN.key(("b", "a")) == OWN.key(("a", "b")) == "asymmetric-int8-0.85-1-gptq-balanced-a-b"
