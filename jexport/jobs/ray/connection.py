"""The connection to an existing Ray cluster. Starts no cluster, and knows no job."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from jexport import targets
from jexport.errors import ClusterError

CONNECT_S = 5.0


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connected to the cluster; a connection that there was before is used, and left open.

    Args:
        address: HOST:PORT, or 'auto' for the cluster of this machine.

    Yields:
        Nothing.

    Raises:
        DependencyError: ray is not installed.
        ClusterError: there is no cluster at that address, or it is Ray's client (ray://).
    """
    targets.check_installed(("ray",), extra="ray", purpose="running jobs on a cluster")
    import ray

    if ray.is_initialized():
        yield
        return
    _check_address(address)
    try:
        # What workers print is not ours to show: events come by themselves.
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable(address, str(error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse at once what Ray would wait for, and its client mode, where streams do not exist."""
    if address == "local":
        raise _unreachable(address, "it means a new cluster, which would be gone afterwards")
    if address.startswith("ray://"):
        raise _unreachable(address, "that is Ray's client, which cannot take files back")
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, evidence: str) -> ClusterError:
    return ClusterError(
        f"no Ray cluster at '{address}'",
        evidence=evidence,
        fix="start one with `ray start --head`, and run jexport on one of its nodes",
    )
