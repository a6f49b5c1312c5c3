"""Where the ranks of an engine meet: a file for those of one machine, rank 0's node for those of several.

Who can reach the addresses of tensors can disturb them: they are for one machine, or a private network.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

Gloo = Any
"""torch's gloo group, of which stubs know only part."""

LOCALHOST = "127.0.0.1"


def host_store(host: str) -> TCPStore:
    """A store on this machine, for as long as it is kept; `address_of` says where."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def address_of(store: TCPStore) -> str:
    """What others give `meet`: tcp://host:port."""
    return f"tcp://{store.host}:{store.port}"


def meet(address: str, size: int) -> Store:
    """The store at `address`, the path of a file or tcp://host:port, that `size` ranks share."""
    if not address.startswith("tcp://"):
        return FileStore(address, size)
    url = urlsplit(address)
    assert url.hostname is not None
    assert url.port is not None
    return TCPStore(url.hostname, url.port, is_master=False, wait_for_workers=False)


def gloo(store: Store, rank: int, size: int, patience: timedelta) -> Gloo:
    """The gloo group of the ranks that share `store`; waits until all are there.

    Its sockets are at the address from which this machine reaches rank 0's, whatever its name may resolve to.

    Args:
        patience: How long an exchange may take.
    """
    options = torch.distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = patience
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=_own_address(store))]
    return torch.distributed.ProcessGroupGloo(store, rank, size, options)


def _own_address(store: Store) -> str:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return LOCALHOST
    family, kind, *_, peer = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(peer)  # sends nothing: only the route is looked up
        address: str = probe.getsockname()[0]
    return address
