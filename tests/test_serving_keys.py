"""Keys: who comes in, how often, and that no token is ever kept or told."""

import hashlib
import logging
import re

import pytest
from serving_parts import service

from actors.serving.config import KeyConfig
from actors.serving.errors import ApiError
from actors.serving.keys import Keyring, new_token, openness


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def key(name, token, per_minute=None):
    digest = hashlib.sha256(token.encode()).hexdigest()
    return KeyConfig(name=name, sha256=digest, requests_per_minute=per_minute)


def refusal(keyring, authorization):
    with pytest.raises(ApiError) as caught:
        keyring.admit(authorization)
    return caught.value


def test_without_keys_everyone_is_let_in():
    for authorization in (None, "", "Bearer whatever", "nonsense"):
        assert Keyring(()).admit(authorization) == "open"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Api-Key", "api-key"])
def test_a_key_is_known_by_its_name_in_both_dialects(scheme):
    keyring = Keyring([key("ann", "secret-a"), key("bob", "secret-b")])
    assert keyring.admit(f"{scheme} secret-a") == "ann"
    assert keyring.admit(f" {scheme}  secret-b ") == "bob"


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", " ", "Bearer", "Bearer ", "Basic secret-a", "secret-a", "Bearersecret-a",
        "Bearer secret-a x",
        "Bearer SECRET-A", "Bearer secret-",
        "Bearer secret-aa", "Bearer \udcff", "Bearer \x00", "Bearer é",
        "Bearer " + hashlib.sha256(b"secret-a").hexdigest(),
    ],
)  # fmt: skip
def test_whatever_is_no_key_is_refused_and_not_repeated(authorization, caplog):
    with caplog.at_level(logging.DEBUG):
        error = refusal(Keyring([key("ann", "secret-a")]), authorization)
    assert (error.code, error.status) == ("invalid_api_key", 401)
    assert "Authorization: Bearer KEY" in error.message
    assert "secret" not in error.message.lower() + caplog.text.lower()


def test_every_key_is_compared_whichever_is_meant(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    keyring = Keyring([key(name, name) for name in "abc"])
    for token in "abc":
        assert keyring.admit(f"Bearer {token}") == token
    refusal(keyring, "Bearer d")
    assert [len(compared), len(set(compared))] == [12, 3]


def test_a_rate_lets_a_burst_in_and_then_as_many_as_it_says():
    clock = Clock()
    keyring = Keyring([key("ann", "a", per_minute=60), key("bob", "b")], clock)
    admitted = 0
    for _ in range(6):  # a tenth of a minute's 60
        assert keyring.admit("Bearer a") == "ann"
    error = refusal(keyring, "Bearer a")
    assert (error.code, error.status) == ("rate_limit_exceeded", 429)
    assert error.retry_after == pytest.approx(1.0)
    assert "'ann'" in error.message
    assert "60 requests a minute" in error.message
    keyring.admit("Bearer b")  # whose rate is another
    for _ in range(600):
        clock.now += 0.1
        try:
            keyring.admit("Bearer a")
            admitted += 1
        except ApiError:
            pass
    assert admitted == 60


@pytest.mark.parametrize("per_minute", [1, 7, 60, 1000])
def test_whoever_waits_as_long_as_told_is_let_in(per_minute):
    clock = Clock()
    keyring = Keyring([key("ann", "a", per_minute)], clock)
    for _ in range(max(1, per_minute // 10)):
        keyring.admit("Bearer a")
    for _ in range(100):
        clock.now += refusal(keyring, "Bearer a").retry_after
        keyring.admit("Bearer a")


def test_an_idle_key_saves_up_no_more_than_a_burst():
    clock = Clock()
    keyring = Keyring([key("ann", "a", per_minute=20)], clock)
    clock.now += 3600
    for _ in range(2):
        keyring.admit("Bearer a")
    refusal(keyring, "Bearer a")


def test_a_wrong_token_uses_up_nobody_s_rate():
    keyring = Keyring([key("ann", "a", per_minute=1)], Clock())
    for _ in range(10):
        refusal(keyring, "Bearer wrong")
    keyring.admit("Bearer a")


def test_a_new_token_opens_and_none_is_like_another():
    tokens = {new_token() for _ in range(100)}
    assert len({token for token, _ in tokens}) == 100
    for token, digest in tokens:
        assert digest == hashlib.sha256(token.encode()).hexdigest()
        assert re.fullmatch(r"cp-[A-Za-z0-9_-]{43}", token)  # 43 characters of 6 bits hold 256
    token, digest = tokens.pop()
    assert Keyring([KeyConfig(name="new", sha256=digest)]).admit(f"Bearer {token}") == "new"


@pytest.mark.parametrize(
    ("host", "keys", "said", "unsaid"),
    [
        ("127.0.0.1", (), ["open: http://127.0.0.1:8000 ", "other machines do not reach it"], []),
        ("localhost", (), ["open: http://localhost:8000 ", "other machines do not"], []),
        ("::1", (), ["open: http://[::1]:8000 ", "other machines do not"], []),
        ("0.0.0.0", (), ["OPEN: http://0.0.0.0:8000 ", "everyone", "other machines reach it", "keys"], []),
        ("::", (), ["OPEN: http://[::]:8000 ", "other machines reach it"], []),
        ("robots.example", (), ["OPEN", "other machines reach it"], []),
        ("0.0.0.0", ("ann",), ["closed: ", "one of 1 keys (ann)", "other machines reach it"], ["secret"]),
        ("127.0.0.1", ("ann", "bob"), ["closed: ", "(ann, bob)", "other machines do not"], []),
    ],
)
def test_the_first_line_says_who_is_let_in_and_from_where(host, keys, said, unsaid):
    keys = tuple(key(name, f"secret of {name}") for name in keys)
    line = openness(service(host=host, keys=keys))
    assert "\n" not in line
    assert all(text in line for text in said)
    assert not any(text in line for text in [*unsaid, *(one.sha256 for one in keys)])
