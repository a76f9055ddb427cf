"""For all tests."""

from __future__ import annotations

import signal

# A shell that starts pytest in the background lets it ignore SIGINT, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
