"""Addresses that lead to no cluster, refused before Ray is asked (which would wait)."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from jexport.errors import ClusterError, DependencyError
from jexport.jobs.ray import connection


def test_an_address_where_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(ClusterError, match="no Ray cluster at"):
        connection._check_address(f"127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", 0)) as open_one:
        connection._check_address(f"127.0.0.1:{open_one.getsockname()[1]}")
    connection._check_address("auto")


@pytest.mark.parametrize("address", ["local", "ray://127.0.0.1:10001", "127.0.0.1:port"])
def test_addresses_that_can_be_none(address: str) -> None:
    with pytest.raises(ClusterError, match="no Ray cluster at"):
        connection._check_address(address)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed here")
def test_without_ray() -> None:
    with (
        pytest.raises(DependencyError, match="running jobs on a cluster needs ray"),
        connection.connected("auto"),
    ):
        pytest.fail("connected")
