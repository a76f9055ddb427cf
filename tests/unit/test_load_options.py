"""The command line of the load client."""

from __future__ import annotations

import math
from pathlib import Path

import load
import pytest
from failures import LoadError, UsageError
from load_options import parse
from triton_service import choose_model

READY = ["demo-gpt2", "demo-gpt2_infer", "ensemble", "postprocessing", "preprocessing", "tensorrt_llm"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "which load? give --rate, --concurrency or --trace; --help has an example of each"),
        (["--rat", "5"], "there is no option '--rat'; perhaps you meant '--rate'; --help lists the options"),
        (["--rate", "5", "--duratoin=3"], "there is no option '--duratoin'; perhaps you meant '--duration'"),
        (["--rate", "5", "5"], "'5' belongs to no option"),
        (["--rate", "5", "--concurrency", "5"], "--concurrency: not allowed with argument --rate"),
        (["--rate", "5..9"], "argument --rate: the ramp '5..9' needs a duration"),
        (["--concurrency", "1.5"], "argument --concurrency: '1.5' is no whole number"),
        (["--rate", "5@3s", "--duration", "9"], "--duration 9 s is longer than the 3 s of --rate 5@3s; leave"),
        (
            ["--trace", "t.jsonl", "--repeat"],
            "--repeat repeats the schedule of --rate or --concurrency, and --tr",
        ),
        (["--trace", "t.jsonl", "--prompt", "x"], "--trace brings its own prompts, so leave out --prompt"),
        (
            ["--rate", "5", "--prompt", "x", "--input-tokens", "5"],
            "--input-tokens is the length of random prompts",
        ),
        (["--rate", "5", "--prompts", "missing.txt"], "missing.txt cannot be read: No such file or directory"),
        (
            ["--rate", "5", "--no-stream", "--cancel-ratio", "0.1"],
            "--cancel-ratio cancels streams, and --no-stream",
        ),
        (["--rate", "5", "--cancel-ratio", "2"], "--cancel-ratio: '2' is not a number from 0 to 1"),
        (["--rate", "5", "--temperature", "-1"], "--temperature: '-1' is not a number from 0"),
        (["--rate", "5", "--output-tokens", "0"], "--output-tokens: '0' has a length below 1"),
        (["--rate", "5", "--end-id", "-2"], "--end-id: '-2' is no token id; use -1 for none, or 0 to 2147483647"),
        (["--rate", "5", "--prompt", "a\udcff"], "--prompt: 'a\\udcff' is no UTF-8 text"),
        (["--rate", "5", "--timeout", "0"], "--timeout: '0' is not a duration above 0"),
        (["--rate", "5", "--requests", "0"], "--requests: '0' is not a whole number of at least 1"),
        (["--rate", "5", "--retries", "-1"], "--retries: '-1' is not a whole number of at least 0"),
        (["--rate", "5", "--url", "http://x:8000"], "--url: 'http://x:8000' is a URL of HTTP; give HOST:PORT"),
        (["--rate", "5", "--url", "x"], "--url: 'x' has no port; give HOST:PORT of the server's gRPC port, as x:8001"),
        (["--rate", "5", "--grpc-option", "a=1"], "--grpc-option: 'a=1' is no channel argument of gRPC"),
        (["--rate", "5", "--prometheus-port", "70000"], "--prometheus-port: '70000' is not a port; use 0 to 65535"),
        (
            ["--rate", "5", "--json", "/no/such/folder/x"],
            "--json /no/such/folder/x: there is no folder /no/such",
        ),
        (["--rate", "5", "--csv", "/"], "--csv / is a folder; name a file"),
        (["--rate", "5", "--plot", "x.gif"], "--plot x.gif has no known kind of image; call it .png, .svg or .pdf"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"time": 0, "prompt": "a"}\n')
    assert load.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("load: ")
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_the_defaults():
    options = parse(["--rate", "5"])
    assert (options.target.url, options.target.model, options.target.streams) == ("localhost:8001", None, True)
    assert (options.duration_seconds, options.requests, options.grace_seconds) == (math.inf, None, 10.0)
    assert options.prompts.input_tokens.numbers == (64,)
    assert options.prompts.output_tokens.numbers == (128,)
    assert parse(["--rate", "5"]).seed != options.seed


def test_options_become_what_is_asked():
    line = (
        "--concurrency 4 --no-stream --temperature 0.5 --stop-word a --stop-word b --chat --end-id -1 --timeout 5s "
        "--retries 2 --round-robin --url triton:8001 --grpc-option grpc.keepalive_time_ms=60000"
    )
    options = parse(line.split())
    assert options.shape.users is not None and options.shape.rate is None
    assert (options.sampling.temperature, options.sampling.stop_words, options.sampling.end_id) == (0.5, ("a", "b"), -1)
    assert options.sampling.chat and not options.target.streams
    assert (options.patience.timeout_seconds, options.patience.retries) == (5.0, 2)
    assert options.target.url == "dns:///triton:8001"
    assert options.target.channel_options[1:] == (("grpc.keepalive_time_ms", 60000),)


def test_grace_may_be_nothing():
    assert parse(["--rate", "5", "--grace", "0"]).grace_seconds == 0.0


# ---- the model -------------------------------------------------------------------------------------------------------


def test_the_only_served_model_needs_no_name():
    assert choose_model(READY, None, streams=True) == "demo-gpt2"
    assert choose_model(READY, None, streams=False) == "demo-gpt2_infer"


def test_plain_infer_asks_the_model_that_does_not_stream():
    assert choose_model(READY, "demo-gpt2", streams=False) == "demo-gpt2_infer"
    assert choose_model(READY, "demo-gpt2_infer", streams=False) == "demo-gpt2_infer"


@pytest.mark.parametrize(
    ("ready", "wanted", "sentence"),
    [
        (
            READY,
            "demo-gtp2",
            "the server has no model 'demo-gtp2' ready; perhaps you meant 'demo-gpt2'; ready",
        ),
        (READY, "llama", "the server has no model 'llama' ready; ready are: demo-gpt2, demo-gpt2_infer, ensemble"),
        ([], "llama", "the server has no model 'llama' ready; ready are: none"),
        (["ensemble", "x"], None, "name the model with --model; ready are: ensemble, x"),
        (["a", "a_infer", "b", "b_infer"], None, "name the model with --model; ready are: a, a_infer, b, b_infer"),
    ],
)
def test_a_model_that_is_not_there_is_refused_with_those_that_are(ready: list[str], wanted: str | None, sentence: str):
    with pytest.raises(LoadError) as refusal:
        choose_model(ready, wanted, streams=True)
    assert sentence in str(refusal.value)


def test_wrong_options_are_a_usage_error():
    with pytest.raises(UsageError):
        parse(["--rate"])
    assert UsageError.exit_code == 2
