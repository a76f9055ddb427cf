"""Of which kind a failed request is."""

from __future__ import annotations

import pytest
from failures import kind_of

NOBODY = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host"


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        ("UNAVAILABLE", "Exceeds maximum queue size", "refused"),
        (None, "in ensemble 'gpt2', Exceeds maximum queue size", "refused"),
        ("UNAVAILABLE", "in ensemble 'gpt2', Request timeout expired", "refused"),
        ("INTERNAL", "Request timeout expired", "refused"),
        ("INTERNAL", "Internal error from Core", "unavailable"),
        (
            None,
            "in ensemble 'gpt2', the server is busy: 9 requests wait, which is all that may; send it again",
            "refused",
        ),
        ("UNAVAILABLE", "the engine failed and must be restarted", "unavailable"),
        ("UNAVAILABLE", "the model is warming up", "refused"),
        ("RESOURCE_EXHAUSTED", "rate limit", "refused"),
        ("INVALID_ARGUMENT", "in ensemble 'gpt2', temperature is -1; it must be at least 0", "bad_request"),
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", "bad_request"),
        (None, "Request for unknown model: 'x' is not found", "bad_request"),
        (None, "in ensemble 'gpt2', temperature is -1; it must be at least 0", "bad_request"),
        (None, "in ensemble 'gpt2', the prompt has 2000 tokens; this engine takes at most 1023", "bad_request"),
        (None, "in ensemble 'gpt2', the server is shutting down; send the request again", "unavailable"),
        (None, "Failed to process the request(s) for model instance 'x', message: KeyError: 'y'", "failed"),
        (None, "unexpected inference output 'finish_reason' for model 'preprocessing'", "bad_request"),
        (None, "[request id: <id_unknown>] expected 3 inputs but got 5 inputs for model 'x'", "bad_request"),
        ("UNAVAILABLE", NOBODY, "unavailable"),
        ("UNAVAILABLE", "Socket closed", "unavailable"),
        ("UNAVAILABLE", "Stream removed (Socket closed (GOAWAY received; Error code: 0; Debug Text: ))", "unavailable"),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", "unavailable"),
        ("UNAVAILABLE", "errors resolving nohost.example:8001: [Domain name not found]", "unavailable"),
        ("UNAVAILABLE", "Server is stopping, scheduler for model has stopped accepting new requests", "unavailable"),
        (None, "Request for unknown model: 'demo-gpt2' has no available versions", "unavailable"),
        ("DEADLINE_EXCEEDED", "Stream removed (Deadline Exceeded)", "timeout"),
        ("INTERNAL", "Socket closed", "failed"),
        ("CANCELLED", "the server cancelled", "failed"),
        (None, "the model's stub process died", "failed"),
    ],
)
def test_the_kind_follows_from_status_and_message(status: str | None, message: str, kind: str):
    assert kind_of(status, message) == kind


def test_a_connection_that_broke_at_the_deadline_is_a_timeout():
    broken = "Internal error from Core"
    assert kind_of("INTERNAL", broken, is_overdue=True) == "timeout"
    assert kind_of("UNAVAILABLE", "failed to connect to all addresses", is_overdue=True) == "unavailable"
