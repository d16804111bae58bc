"""Where a server listens, and who reaches it."""

from __future__ import annotations

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.http.run import is_loopback, listen, url


@pytest.mark.parametrize(("host", "alone"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_who_reaches_a_listener(host: str, alone: bool):
    with listen(host, 0) as listener:
        assert is_loopback(listener) == alone and url(listener) == f"http://{listener.getsockname()[0]}:" + str(
            listener.getsockname()[1]
        )


def test_an_address_that_is_taken_or_unknown():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SemkvError, match=rf"127\.0\.0\.1:{port}: cannot listen: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(SemkvError, match=r"cannot listen.*Give another --host or --port"):
        listen("203.0.113.1", 0)
