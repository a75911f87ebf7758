"""Who may ask: the Host, the Origin and the key of a request."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from cllm_spheres.web.guard import Rules, is_loopback
from cllm_spheres.web.refusals import Refused
from tests.runs import WAIT_S
from tests.web.served import Served

KEY = "a-key-of-sixteen-or-more"
STRANGERS = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1].x", "a@b", "localhost:x")


def status(rules, path="/v1/models", method="GET", **headers):
    """What the rules say to a request: its status, or 200."""
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    try:
        rules.check({"headers": raw, "path": path, "method": method})
    except Refused as refused:
        return refused.status
    return 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "localhost."]
)
def test_names_of_this_machine_are_served(host):
    assert status(Rules.of("127.0.0.1"), host=host) == 200


@pytest.mark.parametrize("host", STRANGERS)
def test_other_names_are_not(host):
    assert status(Rules.of("127.0.0.1"), host=host) == 403


def test_a_server_for_all_addresses_is_reached_by_any_of_them_but_by_no_name():
    for bound in ("0.0.0.0", "::"):
        rules = Rules.of(bound, key=KEY)
        for host in ("127.0.0.1:80", "192.0.2.7", "[2001:db8::1]:8000", "localhost"):
            assert status(rules, host=host, authorization=f"Bearer {KEY}") == 200
        for host in ("evil.example", "192.0.2.7.evil.example", "1.2.3"):
            assert status(rules, host=host, authorization=f"Bearer {KEY}") == 403


def test_headers_are_bounded_and_a_length_stands_once():
    rules = Rules.of("127.0.0.1")
    assert status(rules, host="localhost", x="a" * 16_000) == 200
    assert status(rules, host="localhost", x="a" * 16_400) == 431
    assert status(rules, host="localhost", **{f"x{i}": "a" * 80 for i in range(250)}) == 431
    assert status(rules, host="localhost", content_length="2", transfer_encoding="chunked") == 400


def test_no_host_or_two_of_them_are_refused():
    assert status(Rules.of("127.0.0.1")) == 403
    with pytest.raises(Refused):
        Rules.of("127.0.0.1").check({"headers": [(b"host", b"localhost")] * 2, "path": "/", "method": "GET"})


def test_hosts_and_origins_can_be_allowed():
    rules = Rules.of("192.0.2.1", ["Models.Example"], ["https://App.example/"], KEY)
    key = f"Bearer {KEY}"
    assert status(rules, host="models.example:80", authorization=key) == 200
    assert status(rules, host="127.0.0.1", authorization=key) == 403
    assert status(rules, host="192.0.2.1", origin="https://app.example", authorization=key) == 200
    for origin in ("https://app.example.evil", "http://app.example", "null", "http://192.0.2.1"):
        assert status(rules, host="192.0.2.1", origin=origin, authorization=key) == 403


def test_the_key_is_asked_for_everywhere_but_for_health_and_a_browsers_question():
    rules = Rules.of("127.0.0.1", origins=["https://app.example"], key=KEY)
    ok = dict(host="localhost")
    for given in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \xff"):
        assert status(rules, **ok, authorization=given) == 401
    assert status(rules, **ok) == 401 and status(rules, path="/metrics", **ok) == 401
    assert status(rules, **ok, authorization=f"bearer {KEY}") == 200
    assert status(rules, path="/health", **ok) == 200
    asks = dict(ok, origin="https://app.example", access_control_request_method="POST")
    assert status(rules, method="OPTIONS", **asks) == 200 and status(rules, method="POST", **asks) == 401


def test_which_addresses_only_this_machine_reaches():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "example.org")))


def test_a_server_for_others_wants_its_key_lets_allowed_pages_in_and_logs_no_secret(run, tmp_path):
    (tmp_path / "key").write_text(KEY + "\n")
    words = ["--host", "0.0.0.0", "--api-key-file", tmp_path / "key", "--allow-origin", "https://app.example"]
    words += ["--log-requests"]
    with Served([run], words) as server:
        server.url = f"http://localhost:{server.port}"
        server.client.base_url = server.url
        refused = server.client.get("/v1/models")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert server.client.get("/health").status_code == 200
        page = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        asked = server.client.options("/v1/completions", headers=page)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://app.example"
        keyless = server.client.get("/v1/models", headers={"Origin": "https://App.example"})  # the page may read why
        assert keyless.status_code == 401 and keyless.headers["access-control-allow-origin"] == "https://App.example"
        stranger = server.client.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert stranger.status_code == 403 and "access-control-allow-origin" not in stranger.headers
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        found = server.client.get("/v1/models", headers={"Origin": "https://app.example"})
        assert found.status_code == 200 and found.headers["access-control-allow-origin"] == "https://app.example"
        assert server.client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
        assert server.client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert b"CLLM_SPHERES_API_KEY" not in Path(f"/proc/{server.child.pid}/environ").read_bytes()
        server.complete("a secret", max_tokens=3)
        assert "data:" in server.post("/v1/completions", model="run", prompt="ab", max_tokens=2, stream=True).text
        server.client.request(f"X{KEY}", f"/v1/{KEY}/secret?key={KEY}")
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
            connection.sendall(KEY.encode() + b"\r\n\r\n")
            assert connection.recv(1 << 16)
    # A server that has to compile its kernels says so, too.
    logged = [line.split(" ", 1)[1] for line in server.out.splitlines() if "seconds=" in line]
    # A stream is logged after its last byte, perhaps behind a request that came then.
    assert sorted(re.sub(r"[\d.]+$", "", line) for line in logged) == sorted(
        [
            "127.0.0.1 GET /v1/models 401 in=- out=- seconds=",
            "127.0.0.1 GET /health 200 in=- out=- seconds=",
            "127.0.0.1 OPTIONS /v1/completions 200 in=- out=- seconds=",
            "127.0.0.1 GET /v1/models 401 in=- out=- seconds=",
            "127.0.0.1 GET /v1/models 403 in=- out=- seconds=",
            "127.0.0.1 GET /v1/models 200 in=- out=- seconds=",
            "127.0.0.1 GET /v1/models 403 in=- out=- seconds=",
            "127.0.0.1 GET /v1/models 403 in=- out=- seconds=",
            "127.0.0.1 POST /v1/completions 200 in=8 out=3 seconds=",
            "127.0.0.1 POST /v1/completions 200 in=2 out=2 seconds=",
            "127.0.0.1 other other 404 in=- out=- seconds=",
            "127.0.0.1 - - 400 in=- out=- seconds=",
        ]
    )
    assert KEY not in server.out and "secret" not in server.out


def test_the_key_of_the_environment_is_used_and_not_passed_on(run):
    with Served([run], env={**os.environ, "CLLM_SPHERES_API_KEY": KEY}) as server:
        assert server.client.get("/v1/models").status_code == 401
        assert KEY.encode() not in Path(f"/proc/{server.child.pid}/environ").read_bytes()
