"""Whether the Hugging Face Hub can be asked, and its cache alone where it cannot.

The Hub's libraries try each file several times before they give up, about a minute in all, with a warning for each try.
"""

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


def why_no_hub() -> str:
    """Why the Hub cannot be asked; empty where it may answer.

    It cannot where its address has no place on the network. With HF_HUB_OFFLINE=1 its libraries do not ask, and behind
    a proxy the address need not be known here.
    """
    if constants.HF_HUB_OFFLINE or getproxies():
        return ""
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return f"{host} cannot be reached, and they are not in its cache"
    return ""


@contextlib.contextmanager
def cache_alone() -> Iterator[None]:
    """The Hub's libraries read their cache for the length of the block, as with HF_HUB_OFFLINE=1."""
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
