"""Offer load to an LLM service on NVIDIA Triton, and measure it.

    python clients/load.py --url localhost:8001 --rate 5 --duration 60s
    python clients/load.py --url localhost:8001 --concurrency 16 --duration 60s --json result.json

`run()` reads as the steps: find the service; send until the schedule, a limit or a signal ends it; let what is in
flight end; report. Requests are asked in senders.py, over the gRPC of triton_service.py, and counted in tallies.py.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import islice, takewhile
from random import Random

from failures import LoadError
from load_options import Options, parse
from load_report import Run, document, table, write_json
from progress import Progress
from questions import Question
from request_log import RequestLog
from schedules import poisson_times
from senders import Asker, Crowd, Tasks, send_closed, send_open
from tallies import Tally
from triton_service import TritonService


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        return asyncio.run(run(options))
    except LoadError as error:
        print(f"load: {error}", file=sys.stderr)
        return error.exit_code


async def run(options: Options) -> int:
    """Returns the exit code. Raises LoadError."""
    stop = Stop()
    service = TritonService(options.target, options.sampling)
    try:
        await first_of(service.start(say=partial(print, file=sys.stderr, flush=True)), stop.asked.wait())
        if stop.asked.is_set():
            return 0
        tally = Tally(offers_rate=options.shape.rate is not None)
        progress = Progress(tally, options.shape.offered, options.outputs.csv)
        with metrics_served(options, tally, progress):
            began, cpu_seconds = datetime.now(UTC), time.process_time()
            await offer(options, service, tally, progress, stop)
            seconds, cpu_seconds = time.monotonic() - tally.started, time.process_time() - cpu_seconds
        progress.close()
    finally:
        await service.close()
    result = Run(
        options=options,
        model=service.model,
        began=began,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        ended_by_signal=stop.asked.is_set(),
    )
    report(result, tally)
    return exit_code(result, tally)


class Stop:
    """SIGINT or SIGTERM: the first one ends the sending, the next one the waiting for answers."""

    def __init__(self) -> None:
        self.asked, self.asked_twice = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.ask)

    def ask(self) -> None:
        (self.asked_twice if self.asked.is_set() else self.asked).set()


async def offer(options: Options, service: TritonService, tally: Tally, progress: Progress, stop: Stop) -> None:
    """The load, from its first request to the end of the last answer."""
    gc.collect()
    gc.freeze()  # else Python goes through all that the imports made now and then: 20 ms in which no answer is read
    tally.begin()
    tasks = Tasks(on_defect=stop.ask)
    watches = [asyncio.create_task(progress.every_second()), asyncio.create_task(progress.watch_loop())]
    await first_of(send(options, service, tasks, tally), stop.asked.wait(), *watches)
    tally.sending_over()
    if tally.in_flight and stop.asked.is_set():
        progress.say(
            f"stopping: {tally.in_flight} requests in flight have {options.grace_seconds:g} s to end; "
            "another signal cuts them off"
        )
    await first_of(tasks.wait(), stop.asked_twice.wait(), *watches, seconds=options.grace_seconds)
    await tasks.cancel()
    for watch in watches:
        watch.cancel()
    if tasks.defect is not None:
        raise tasks.defect


async def send(options: Options, service: TritonService, tasks: Tasks, tally: Tally) -> None:
    """Until the schedule or the trace ends, or --duration or --requests."""
    log = None if options.outputs.request_log is None else RequestLog(options.outputs.request_log)
    asker = Asker(
        service, tally, options.patience, random_for(options, "retries"), streams=options.target.streams, log=log
    )
    if options.shape.users is not None:
        questions = islice(options.prompts.questions(random_for(options, "questions")), options.requests)
        crowd = Crowd(questions, asker, random_for(options, "users"))
        await send_closed(options.shape.users, options.duration_seconds, crowd, tasks, tally)
    else:
        number = await send_open(arrivals(options), asker, tasks, tally, options.max_in_flight)
        if options.shape.rate is not None and number != options.requests:  # the schedule goes on after its last arrival
            end_seconds = min(options.shape.rate.seconds, options.duration_seconds)
            await asyncio.sleep(tally.started + end_seconds - time.monotonic())


def arrivals(options: Options) -> Iterator[tuple[float, Question]]:
    """Of an open loop: seconds after the start, and what is asked then."""
    random = random_for(options, "questions")
    if options.shape.trace is not None:
        found = ((request.seconds, options.prompts.traced(request, random)) for request in options.shape.trace)
    else:
        times = poisson_times(options.shape.rate, random_for(options, "arrivals"))
        found = zip(times, options.prompts.questions(random), strict=False)
    return islice(takewhile(lambda arrival: arrival[0] < options.duration_seconds, found), options.requests)


def random_for(options: Options, use: str) -> Random:
    """Independent of each other: another distribution of lengths leaves the arrivals as they are."""
    return Random(f"{options.seed} {use}")


@contextmanager
def metrics_served(options: Options, tally: Tally, progress: Progress) -> Iterator[None]:
    if options.outputs.prometheus_port is None:
        yield
        return
    from load_metrics import serve_metrics  # prometheus-client is needed for nothing else

    url, stop = serve_metrics(tally, options.outputs.prometheus_address, options.outputs.prometheus_port)
    progress.say(f"metrics: {url}")
    try:
        yield
    finally:
        stop()


def report(result: Run, tally: Tally) -> None:
    """Raises LoadError when a file cannot be written, once all that can be is."""
    outputs = result.options.outputs
    problems = []
    writers: list[tuple[str, object, Callable[[], None]]] = [
        ("--json", outputs.json, lambda: write_json(document(result, tally), outputs.json)),
        ("--plot", outputs.plot, lambda: plot(result, tally)),
    ]
    for option, path, write in writers:
        try:
            if path is not None:
                write()
        except OSError as error:
            problems.append(f"{option} {path} cannot be written: {error.strerror}")
    try:
        print(table(result, tally), flush=True)
    except BrokenPipeError:  # whoever read the table has gone; Python must not try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if problems:
        raise LoadError("; ".join(problems))


def plot(result: Run, tally: Tally) -> None:
    from load_plot import write_plot  # matplotlib takes a second to import

    title = f"{result.model}, {result.options.shape.words}, {result.began:%Y-%m-%d %H:%M:%S} UTC"
    write_plot(tally, title, result.options.outputs.plot)


def exit_code(result: Run, tally: Tally) -> int:
    """Raises LoadError for a load that came to nothing."""
    if result.ended_by_signal:
        return 0
    if not (tally.ok or tally.cancelled or tally.tokens):  # tokens: of answers that the end cut off
        raise LoadError("no request was answered" if tally.sent else "no request was sent; offer more, or for longer")
    if tally.error_ratio > result.options.max_error_ratio:
        raise LoadError(
            f"{tally.error_ratio:.2%} of the requests failed, and --max-error-ratio allows "
            f"{result.options.max_error_ratio:.2%}"
        )
    return 0


async def first_of(*waits: Awaitable[object], seconds: float | None = None) -> None:
    """Waits until one of them ends, and cancels those that are no tasks yet. Raises what one of them raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    ours = [task for task, wait in zip(tasks, waits, strict=True) if task is not wait and task not in done]
    for task in ours:
        task.cancel()
    await asyncio.gather(*ours, return_exceptions=True)
    for task in done:
        task.result()


if __name__ == "__main__":
    sys.exit(main())
