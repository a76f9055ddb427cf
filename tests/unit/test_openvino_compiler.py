"""OpenVINO engines of tiny random checkpoints, one of each architecture, compared with transformers token by token."""

import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_checkpoints
import tiny_engines
import verify
from checkpoint import Checkpoint
from compilers import openvino_compiler
from compilers.quiet_libraries import refuse_telemetry
from errors import CheckpointError, CompileError, UnsupportedError, UsageError
from plan import BuildRequest
from tiny_engines import TinyEngine

refuse_telemetry()
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
openvino = pytest.importorskip("openvino")
openvino_genai = pytest.importorskip("openvino_genai")
pytest.importorskip("optimum.intel")
pytest.importorskip("nncf")
Tokenizer = pytest.importorskip("tokenizers").Tokenizer

ARCHITECTURES = tuple(tiny_checkpoints.RECIPES)
LONG_PROMPT = "Nobody had asked for more than 100 of them, and the queue is short. " * 3
PROMPTS = ("The capital of France is", "日本語 and русский 🙂", "def greet(name):\n    return", LONG_PROMPT)
MAX_TOKENS = 16

TEXTS = (
    "",
    " ",
    "Hello",
    " Hello  world ",
    "The quick brown fox's 1234 jumps, isn't it?\n\n\tYes.\r\n",
    "Größe: señor, café, e\u0301",
    "日本語のテキスト, русский, नमस्ते, مرحبا",
    "🙂 👩‍🚀 🇫🇷",
    "<s>markers</s> <|im_end|> <|endoftext|> <bos> <|end|> \n x",
    "\u0000\u00a0\u200b",
)

Build = Callable[..., TinyEngine]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`tiny_engines.build`, once for the same arguments."""
    built: dict[str, TinyEngine] = {}

    def build(name: str, **options) -> TinyEngine:
        key = repr((name, sorted(options.items())))
        if key not in built:
            built[key] = tiny_engines.build(name, tmp_path_factory.mktemp(name), **options)
        return built[key]

    return build


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """torch's threads wait for each other, and OpenVINO's are in the way; tiny models need one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(name: str, **changes) -> Checkpoint:
        path = tiny_checkpoints.make(name, tmp_path, **changes)
        return Checkpoint(model=str(path), revision=None, path=path, digest="0" * 64, files=())

    return make


def compare_in_float32(engine: TinyEngine, prompts=PROMPTS) -> verify.VerifyReport:
    """Whatever the engine's dtype is: exact arithmetic on the weights as they are stored."""
    manifest = replace(engine.manifest, dtype="float32", quantization="none")
    answers = verify.reference(engine.checkpoint, engine.folder, manifest, prompts, max_tokens=MAX_TOKENS)
    generate = verify.load_openvino(engine.folder, manifest, answers)
    return verify.compare(answers, generate, engine.folder, manifest, started=0.0)


def auto_tokenizer(checkpoint: Checkpoint):
    return transformers.AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)


def constants(folder: Path, kind: str) -> list[tuple[int, ...]]:
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    found = [operation for operation in model.get_ops() if operation.get_type_name() == "Constant"]
    return [tuple(each.shape) for each in found if each.get_element_type().get_type_name() == kind]


# --- answers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_says_what_transformers_says(name: str, build: Build):
    engine = build(name)
    report = verify.verify(engine.folder, engine.checkpoint, PROMPTS, max_tokens=MAX_TOKENS)
    assert report.exact
    assert not report.ties
    assert report.num_tokens > MAX_TOKENS


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_sliding_window_decides_the_answer_to_the_long_prompt(name: str, make_checkpoint):
    """Else the test above would not see a window that is ignored."""
    checkpoint = make_checkpoint(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path)
    ids = auto_tokenizer(checkpoint)(LONG_PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        windowed = model(ids).logits[0, -1].argmax()
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        config = model.config
        config.sliding_window = 100_000
        unlimited = model(ids).logits[0, -1].argmax()
    assert ids.shape[1] > 16
    assert windowed != unlimited


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"head_dim": 12}),  # no multiple of any vector width
        ("llama", {"head_dim": 4}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 40}),
        ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),  # as opt-350m
        ("phi3", {"sliding_window": 16}),  # as Phi-3 mini
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ],
    ids=str,
)
def test_variants_of_a_config_say_what_transformers_says(name: str, config: dict, build: Build):
    engine = build(name, config=config)
    assert verify.verify(engine.folder, engine.checkpoint, PROMPTS[2:], max_tokens=MAX_TOKENS).exact


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "bfloat16"), ("llama", "float16"), ("gemma3", "bfloat16")])
def test_16_bit_engine_of_a_16_bit_checkpoint_loses_nothing(name: str, dtype: str, build: Build):
    engine = build(name, stored_dtype=dtype, dtype=dtype)
    assert compare_in_float32(engine).exact


def test_16_bit_engine_is_half_as_large_and_keeps_rotary_frequencies_in_float32(build: Build):
    engine = build("llama", stored_dtype="float16", dtype="float16")
    full_size, half_size = ((e.folder / "openvino_model.bin").stat().st_size for e in (build("llama"), engine))
    assert half_size < 0.51 * full_size
    assert (1, 8, 1) in constants(engine.folder, "f32")  # half of head size 16


@pytest.mark.parametrize(("quantization", "least_share"), [("int8", 0.8), ("int4", 0.3)])
def test_quantized_engine_answers_much_like_transformers(
    quantization: str, least_share: float, build: Build, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(verify.LEAST_SHARES, quantization, least_share)  # random weights are the worst case
    engine = build("gpt2", quantization=quantization)
    report = verify.verify(engine.folder, engine.checkpoint, PROMPTS, max_tokens=MAX_TOKENS)
    assert report.share >= least_share
    assert not report.exact


def test_quantized_engine_is_smaller(build: Build):
    sizes = [
        (build("gpt2", **options).folder / "openvino_model.bin").stat().st_size
        for options in ({}, {"quantization": "int8"}, {"quantization": "int4"})
    ]
    assert sizes[0] > 3.5 * sizes[1] > 3.5 * sizes[2]


def test_int4_groups_shrink_to_what_divides_a_layer(build: Build, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "compilers"):
        engine = build("gpt2", config={"n_embd": 40}, quantization="int4")  # 40 has no divisor from 32 on but itself
    [line] = [message for message in caplog.messages if "bits" in message]
    assert re.search(r"of the weights \d+ % in 4 bits \(groups of [\d and]+\), \d+ % in 8 bits", line)
    sizes = [int(size) for size in re.findall(r"\d+", line.partition("groups of ")[2].partition(")")[0])]
    assert all(160 % size == 0 or 40 % size == 0 for size in sizes)
    assert constants(engine.folder, "u4")


# --- facts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kv_bytes_per_token_is_what_the_pipeline_takes(name: str, build: Build):
    engine = build(name)
    assert _kv_bytes_per_token(engine) == engine.compiled.kv_bytes_per_token


def test_kv_bytes_per_token_of_a_16_bit_engine_is_half(build: Build):
    engine = build("llama", stored_dtype="float16", dtype="float16")
    assert _kv_bytes_per_token(engine) == engine.compiled.kv_bytes_per_token
    assert engine.compiled.kv_bytes_per_token * 2 == build("llama").compiled.kv_bytes_per_token


def _kv_bytes_per_token(engine: TinyEngine) -> float:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 0
    scheduler.num_kv_blocks = 8
    properties = openvino_compiler.runtime_properties(engine.plan.dtype)
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(engine.folder), scheduler, "CPU", properties)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = 1
    pipeline.add_request(0, openvino.Tensor([[5, 6, 7]]), config)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return pipeline.get_metrics().kv_cache_size_in_bytes / 8 / verify.TOKENS_PER_KV_BLOCK


@pytest.mark.parametrize(
    ("name", "bos", "eos", "pad"),
    [
        ("gpt2", 0, (0,), None),
        ("opt", 2, (2,), 1),
        ("llama", 1, (2,), None),
        ("llama3", 640, (641, 642), None),  # a list in config.json
        ("qwen2", None, (642, 640), 640),  # config.json knows one, generation_config.json two
        ("gemma", 2, (1,), 0),
        ("phi3", 1, (640,), 640),
    ],
)
def test_special_token_ids(name: str, bos: int | None, eos: tuple[int, ...], pad: int | None, build: Build):
    engine = build(name)
    compiled = engine.compiled
    assert (compiled.bos_token_id, compiled.eos_token_ids, compiled.pad_token_id) == (bos, eos, pad)
    assert json.loads((engine.folder / "generation_config.json").read_text())["eos_token_id"] == list(eos)
    tokenizer = Tokenizer.from_file(str(engine.folder / "tokenizer.json"))
    special = json.loads((engine.folder / "special_tokens.json").read_text())
    assert [each["id"] for each in special["eos"]] == list(eos)
    assert all(tokenizer.token_to_id(each["token"]) == each["id"] for each in special["eos"])


def test_vocab_size_is_the_width_of_the_logits(build: Build):
    assert build("llama3").compiled.vocab_size == 656  # padded: the tokenizer has 643


def test_folder_holds_the_engine_and_the_tokenizer_and_nothing_else(build: Build):
    names = {path.name for path in build("gemma").folder.iterdir()}
    assert names == {
        *("openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens.json", "chat_template.jinja"),
        "engine.json",  # written by tiny_engines
    }


# --- the tokenizer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokenizer_json_gives_the_ids_of_transformers(name: str, build: Build):
    engine = build(name)
    ours = Tokenizer.from_file(str(engine.folder / "tokenizer.json"))
    theirs = auto_tokenizer(engine.checkpoint)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text).ids == ids
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize(
    ("name", "first"),
    [
        *(("gpt2", None), ("opt", "</s>"), ("llama", "<s>"), ("llama3", "<|begin_of_text|>")),
        *(("qwen3", None), ("mistral", "<s>"), ("gemma", "<bos>"), ("phi3", None)),
    ],
)
def test_prompt_begins_with_the_begin_token_where_transformers_puts_one(name: str, first: str | None, build: Build):
    tokens = Tokenizer.from_file(str(build(name).folder / "tokenizer.json")).encode("Hello").tokens
    assert (tokens[0] if tokens[0][0] == "<" else None) == first


@pytest.mark.parametrize(
    ("name", "has_template"), [("gemma", True), ("mistral", True), ("qwen3", True), ("llama", False)]
)
def test_chat_template_is_a_file(name: str, has_template: bool, build: Build):
    engine = build(name)
    path = engine.folder / "chat_template.jinja"
    assert path.exists() == has_template
    if has_template:
        assert path.read_text() == auto_tokenizer(engine.checkpoint).chat_template


def test_truncation_and_padding_of_a_training_run_are_left_out(make_checkpoint, tmp_path: Path):
    checkpoint = make_checkpoint("llama")
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(checkpoint.path / "tokenizer.json"))
    engine = tiny_engines.compile(checkpoint, tmp_path / "engine")
    assert len(Tokenizer.from_file(str(engine.folder / "tokenizer.json")).encode("one two three four five").ids) > 4
    assert Tokenizer.from_file(str(engine.folder / "tokenizer.json")).encode("one").ids[-1] != 0


# --- what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tensor_parallel": 2}, "--tp 2 splits a model over GPUs, and an OpenVINO engine runs in one process"),
        ({"pipeline_parallel": 3}, "--pp 3 splits a model over GPUs"),
        ({"gpu": "NVIDIA-A10G"}, "--gpu NVIDIA-A10G is for engines that run on a GPU"),
    ],
)
def test_options_for_gpus_are_refused(options: dict, sentence: str):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        openvino_compiler.check_request(BuildRequest(model="gpt2", **options))


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_goes_with_every_quantization(dtype, quantization):
    openvino_compiler.check_request(BuildRequest(model="gpt2", dtype=dtype, quantization=quantization))


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ("GPTNeoForCausalLM", "which OpenVINO's continuous batching does not run: its answers go wrong"),
        ("MambaForCausalLM", "it has no attention"),
        ("T5ForConditionalGeneration", "engines are built from causal language models"),
        ("Gemma3ForConditionalGeneration", "if it has a text-only sibling, name that"),
        ("BertForMaskedLM", "engines are built from causal language models"),
    ],
)
def test_architectures_that_cannot_run_are_refused(architecture: str, sentence: str, make_checkpoint):
    plan = replace(tiny_engines.plan_for(make_checkpoint("gpt2")), architecture=architecture)
    with pytest.raises(UnsupportedError, match=re.escape(sentence)):
        openvino_compiler.check(plan, {})


def test_untested_architecture_is_named(make_checkpoint, caplog: pytest.LogCaptureFixture):
    plan = replace(tiny_engines.plan_for(make_checkpoint("gpt2")), architecture="OlmoForCausalLM")
    with caplog.at_level(logging.INFO, "compilers"):
        openvino_compiler.check(plan, {})
    assert "OlmoForCausalLM is not one of those tested here; compare it with --verify" in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized already (awq)"),
        ({"model_type": "helium"}, "(model_type 'helium'), which optimum-intel 2.1.0 cannot export"),
        ({"model_type": "t5"}, "cannot export as a language model"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}, "allow it with --trust-remote-code"),
        (
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64},
            "beyond 64 tokens one long request would change the answers of the others beside it; "
            "build with --max-seq-len 64 or less",
        ),
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes: dict, sentence: str, make_checkpoint, tmp_path: Path):
    checkpoint = make_checkpoint("llama")
    plan = tiny_engines.plan_for(checkpoint)
    _change_config(checkpoint, **changes)
    with pytest.raises(UnsupportedError, match=re.escape(sentence)):
        openvino_compiler.compile(plan, checkpoint, _empty(tmp_path), tmp_path / "kept")


def test_longrope_within_its_first_length_says_what_transformers_says(build: Build):
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    config = {"original_max_position_embeddings": 64, "rope_scaling": scaling}
    engine = build("phi3", config=config, max_seq_len=64)
    assert verify.verify(engine.folder, engine.checkpoint, PROMPTS, max_tokens=MAX_TOKENS).exact


def test_missing_weights_are_not_filled_with_random_numbers(make_checkpoint, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint("llama")
    weights = load_file(checkpoint.path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompileError, match=r"lacks 1 of the weights .* 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        openvino_compiler.compile(tiny_engines.plan_for(checkpoint), checkpoint, _empty(tmp_path), tmp_path / "kept")


def test_weights_of_another_shape_are_one_sentence(make_checkpoint, tmp_path: Path):
    checkpoint = make_checkpoint("llama")
    plan = tiny_engines.plan_for(checkpoint)
    _change_config(checkpoint, vocab_size=700)
    folder = _empty(tmp_path)
    with pytest.raises(CompileError, match="cannot be compiled for OpenVINO") as caught:
        openvino_compiler.compile(plan, checkpoint, folder, tmp_path / "kept")
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert not list(folder.glob(".*"))  # no leftovers


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: (path / "tokenizer.json").write_text("{}"), "transformers cannot load the tokenizer of"),
        (lambda path: [each.unlink() for each in path.glob("tokenizer*")], "has no tokenizer; put tokenizer.json"),
    ],
)
def test_tokenizer_that_cannot_be_loaded_is_one_sentence(spoil, sentence: str, make_checkpoint, tmp_path: Path):
    checkpoint = make_checkpoint("llama")
    spoil(checkpoint.path)
    with pytest.raises((CheckpointError, UnsupportedError), match=sentence) as caught:
        openvino_compiler.compile(tiny_engines.plan_for(checkpoint), checkpoint, _empty(tmp_path), tmp_path / "kept")
    assert "\n" not in str(caught.value)


def test_tokenizer_that_exists_only_in_python_is_refused(make_checkpoint, tmp_path: Path):
    checkpoint = make_checkpoint("gpt2")
    (checkpoint.path / "tokenizer.json").unlink()
    (checkpoint.path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UnsupportedError, match="ByT5Tokenizer, exists only as Python code"):
        openvino_compiler.compile(tiny_engines.plan_for(checkpoint), checkpoint, _empty(tmp_path), tmp_path / "kept")


def _change_config(checkpoint: Checkpoint, **changes) -> None:
    path = checkpoint.path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _empty(tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    return folder


# --- manners


def test_compiling_prints_nothing_and_needs_no_network(
    make_checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    connections = []

    def refuse(*arguments):
        connections.append(arguments)  # an error alone could be lost in a thread
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    checkpoint = make_checkpoint("opt")
    capfd.readouterr()
    tiny_engines.compile(checkpoint, tmp_path / "engine", quantization="int8")
    assert capfd.readouterr() == ("", "")
    assert not connections


def test_what_the_libraries_print_is_in_the_debug_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "compilers"):
        tiny_engines.build("opt", tmp_path)
    assert {record.levelname for record in caplog.records if "TracerWarning" in record.message} == {"DEBUG"}


def test_failed_compilation_leaves_logging_as_it_was(make_checkpoint, tmp_path: Path):
    checkpoint = make_checkpoint("llama")
    (checkpoint.path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CompileError):
        openvino_compiler.compile(tiny_engines.plan_for(checkpoint), checkpoint, _empty(tmp_path), tmp_path / "kept")
    assert logging.root.manager.disable == logging.NOTSET


def test_versions_import_nothing_heavy():
    program = """if True:
        import sys
        from compilers import openvino_compiler
        print(sorted(openvino_compiler.versions()))
        print([name for name in ("torch", "transformers", "openvino", "optimum", "nncf") if name in sys.modules])
    """
    assert _run(program) == [str(sorted(openvino_compiler.PACKAGES)), "[]"]


def test_libraries_report_to_nobody():
    program = """if True:
        import sys
        from compilers.quiet_libraries import quiet_libraries
        with quiet_libraries():
            import nncf, openvino
            from nncf.telemetry import telemetry
            from openvino.tools.ovc import telemetry_utils
        print(sys.modules["openvino_telemetry"], type(telemetry).__name__, telemetry_utils.tm.__name__)
    """
    assert _run(program) == ["None MagicMock openvino.tools.ovc.telemetry_stub"]


def _run(program: str) -> list[str]:
    build_folder = Path(openvino_compiler.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=build_folder, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()
