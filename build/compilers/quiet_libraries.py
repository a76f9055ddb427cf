"""What the compilers' libraries print goes to the debug log; what they would send to their makers goes nowhere."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

log = logging.getLogger(__name__)

# Loggers with handlers of their own, which print whatever we do with the root logger.
LIBRARIES = ("transformers", "optimum", "nncf", "openvino", "huggingface_hub", "torch")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[list[str]]:
    """Yields the list that the libraries' log messages are collected in. Standard output and error are the process's,
    so this is for one thread at a time."""
    refuse_telemetry()
    messages: list[str] = []
    handler = _ToDebugLog(messages)
    stream = _LinesToDebugLog()
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        for name in LIBRARIES:
            stack.enter_context(_only_handler(logging.getLogger(name), handler))
        stack.enter_context(contextlib.redirect_stdout(stream))
        stack.enter_context(contextlib.redirect_stderr(stream))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        warnings.showwarning = _warning_to_debug_log
        try:
            yield messages
        finally:
            logging.disable(disabled)  # optimum-intel disables INFO while it works, and for ever if it fails then


def refuse_telemetry() -> None:
    """Call before `openvino` or `nncf` is imported: both report imports, conversions and compressions to Google
    Analytics unless somebody opted out, and both do without when the package that sends is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class _ToDebugLog(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._messages.append(message)
        log.debug("%s: %s", record.name, message)


class _LinesToDebugLog(io.TextIOBase):
    """A stand-in for standard error. Libraries imported meanwhile may keep it for ever."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        for line in text.replace("\r", "\n").split("\n"):
            if line.strip():
                log.debug("%s", line.rstrip())
        return len(text)


def _warning_to_debug_log(message, category, filename, lineno, file=None, line=None) -> None:
    log.debug("%s:%s: %s: %s", filename, lineno, category.__name__, message)


@contextlib.contextmanager
def _only_handler(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    handlers, propagate = logger.handlers[:], logger.propagate
    logger.handlers[:] = [handler]
    logger.propagate = False
    try:
        yield
    finally:
        added = [each for each in logger.handlers if each is not handler and each not in handlers]
        logger.handlers[:] = handlers + added
        if not added:  # else the library was imported meanwhile, and has set this as it wants it
            logger.propagate = propagate
