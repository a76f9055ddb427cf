"""What happens while it runs: a line for a terminal, lines for a log, and the CSV file, from one row per second."""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tallies import COLUMNS, ERROR_KINDS, Tally

LOG_EVERY_SECONDS = 10
LOOP_DELAY_EVERY_SECONDS = 0.05


class Progress:
    """Closes a row of the tally each second and shows it. `offered`: the load at a time after the start."""

    def __init__(self, tally: Tally, offered: Callable[[float], float | None], csv: Path | None):
        self._tally = tally
        self._offered = offered
        self._csv = None if csv is None else csv.open("w", buffering=1)  # line by line, for those who follow the file
        self._is_terminal = sys.stderr.isatty()
        self._second, self._next_log_second = 0, LOG_EVERY_SECONDS
        self._write_csv(",".join(COLUMNS))

    async def every_second(self) -> None:
        """Until it is cancelled."""
        while True:
            elapsed = time.monotonic() - self._tally.started
            self._tally.offered = self._offered_now(elapsed)
            # Whole seconds; those that pass while this program is held up become one wide row.
            self._second = max(self._second + 1, int(elapsed) + 1)
            await asyncio.sleep(self._second - elapsed)
            self._close_row()

    def _offered_now(self, elapsed_seconds: float) -> float | None:
        offered = self._offered(elapsed_seconds)
        is_sending = self._tally.sending_seconds is None
        return offered if is_sending or offered is None else 0.0

    async def watch_loop(self) -> None:
        """How late this program gets its turn, until it is cancelled."""
        while True:
            due = time.monotonic() + LOOP_DELAY_EVERY_SECONDS
            await asyncio.sleep(LOOP_DELAY_EVERY_SECONDS)
            self._tally.loop_delay.record(time.monotonic() - due)

    def _close_row(self) -> None:
        row = self._write_row()
        if self._is_terminal:
            line = progress_line(row, self._tally)[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif self._second >= self._next_log_second:
            self._next_log_second += LOG_EVERY_SECONDS
            print(progress_line(row, self._tally), file=sys.stderr, flush=True)

    def _write_row(self) -> dict[str, float]:
        row = self._tally.close_row()
        self._write_csv(csv_line(row))
        return row

    def _write_csv(self, line: str) -> None:
        if self._csv is None:
            return
        try:
            print(line, file=self._csv)
        except OSError as error:  # a full disk does not end a load that runs for days
            self.say(f"--csv {self._csv.name} ends here, it cannot be written: {error.strerror}")
            with suppress(OSError):
                self._csv.close()
            self._csv = None

    def say(self, sentence: str) -> None:
        """A line of its own."""
        print(f"\r\x1b[K{sentence}" if self._is_terminal else sentence, file=sys.stderr, flush=True)

    def close(self) -> None:
        """With what happened since the last whole second; that is not shown, its rates would be those of a blink."""
        self._write_row()
        if self._is_terminal:
            print(file=sys.stderr)
        if self._csv is not None:
            self._csv.close()


def csv_line(row: dict[str, float]) -> str:
    """An empty cell where there was nothing to measure."""
    return ",".join("" if math.isnan(row[name]) else f"{row[name]:.9g}" for name in COLUMNS)


def progress_line(row: dict[str, float], tally: Tally) -> str:
    width = row["width_seconds"]
    parts = [f"{row['time_seconds']:.0f} s", f"in flight {row['in_flight']}", f"{row['tokens'] / width:,.0f} tokens/s"]
    if not math.isnan(row["offered"]):
        parts.insert(1, f"offered {row['offered']:.3g}{'/s' if tally.offers_rate else ' users'}")
    parts.append(f"answered {row['ok'] / width:.1f}/s")
    if not math.isnan(row["time_to_first_token_p50_seconds"]):
        p50, p99 = (row[f"time_to_first_token_{name}_seconds"] * 1000 for name in ("p50", "p99"))
        parts.append(f"first token p50 {p50:.0f} p99 {p99:.0f} ms")
    if tally.failed or tally.not_sent:
        kinds = ", ".join(f"{kind} {tally.errors[kind]}" for kind in ERROR_KINDS if tally.errors[kind])
        parts.append(f"failed {kinds}")
    return "  ".join(parts)
