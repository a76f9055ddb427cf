"""NVIDIA's ensemble, preprocessing and postprocessing around the same engine, under the same load, in the same run.

They are the files of the folder triton_backend/all_models/inflight_batcher_llm of the repository NVIDIA/TensorRT-LLM,
which whoever measures has to bring. `tensorrt_llm` is ours on both sides: the maps of NVIDIA's ensemble are cut down to
the tensors that it has, and get its `finish_reason`. With NVIDIA's backend each token of a stream is a response, so
what theirs carries is told in responses: our engine, told to send as fast as it can, still sends those tokens together
that came while it could not.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from benchmarks.repositories import DEMO_CHECKPOINT, BenchmarkError, build_synthetic, served
from benchmarks.results import Result
from benchmarks.streams import LIMITS, NUM_STREAMS, RATES, load
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

# A closed loop, so that at most so many responses of each stream are behind when the ensemble cannot keep up.
_OUTPUT_TOKENS = "256"
_WARM_UP_SECONDS = 8.0
_FILES = (
    "ensemble/config.pbtxt",
    "preprocessing/config.pbtxt",
    "preprocessing/1/model.py",
    "postprocessing/config.pbtxt",
    "postprocessing/1/model.py",
)
_VALUES = {
    "triton_max_batch_size": "64",
    "logits_datatype": "TYPE_FP32",
    "tokenizer_dir": str(DEMO_CHECKPOINT),
    "skip_special_tokens": "True",
    "preprocessing_instance_count": "1",
    "postprocessing_instance_count": "1",
    "add_special_tokens": "True",
    "multimodal_model_path": "",
    "engine_dir": "",
    "max_queue_delay_microseconds": "0",
    "max_queue_size": "0",
}


def measure(folder: Path, seconds: float, official: Path) -> Result:
    """Raises BenchmarkError when `official` is not that folder."""
    ours = build_synthetic(folder, "ours", RATES, *LIMITS)
    theirs = assemble(build_synthetic(folder, "theirs", RATES, *LIMITS), official)
    reports = {}
    for name, repository in (("NVIDIA's", theirs), ("this one", ours)):
        with served(repository) as server:
            load(server, folder, _WARM_UP_SECONDS, _OUTPUT_TOKENS)
            reports[name] = load(server, folder, seconds, _OUTPUT_TOKENS)
    result = Result(name="official", title=f"NVIDIA's ensemble and this one, {NUM_STREAMS} streams of {_OUTPUT_TOKENS}")
    theirs_per_second = reports["NVIDIA's"]["rates"]["responses_per_second"]
    ours_per_second = reports["this one"]["while_sending"]["tokens_per_second"]
    result.add("NVIDIA's, responses/s, each a token", theirs_per_second)
    result.add("this one, tokens/s", ours_per_second)
    result.add("this one, responses/s", reports["this one"]["rates"]["responses_per_second"])
    result.add("this one / NVIDIA's", ours_per_second / theirs_per_second)
    result.add("requests that failed", sum(report["requests"]["failed"] for report in reports.values()), at_most=0)
    result.data = {"tokens_per_second": {"NVIDIA's": theirs_per_second, "this one": ours_per_second}}
    return result


def assemble(repository: Path, official: Path) -> Path:
    """Puts NVIDIA's three models in place of ours."""
    if missing := [file for file in _FILES if not (official / file).is_file()]:
        raise BenchmarkError(
            f"--official {official} has no {missing[0]}; give the folder "
            "triton_backend/all_models/inflight_batcher_llm of a clone of NVIDIA/TensorRT-LLM"
        )
    for model in ("preprocessing", "postprocessing"):
        shutil.rmtree(repository / model)
        shutil.copytree(official / model, repository / model)
        (repository / model / "config.pbtxt").write_text(_filled(official / model / "config.pbtxt"))
    served_name = json.loads((repository / "repository.json").read_text())["served_name"]
    shutil.rmtree(repository / "ensemble")
    (repository / served_name / "config.pbtxt").write_text(_cut_down(repository, official, served_name))
    settings = repository / "tensorrt_llm/1/settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"responses_per_second": 1e9}))
    return repository


def _filled(template: Path) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda hole: _VALUES.get(hole[1], ""), template.read_text())


def _cut_down(repository: Path, official: Path, name: str) -> str:
    """NVIDIA's ensemble, less the tensors that its steps do not have."""
    ensemble = text_format.Parse(_filled(official / "ensemble/config.pbtxt"), ModelConfig())
    ensemble.name = name
    made, used = set(), set()
    for step in ensemble.ensemble_scheduling.step:
        config = text_format.Parse((repository / step.model_name / "config.pbtxt").read_text(), ModelConfig())
        for tensors, kept in ((step.input_map, config.input), (step.output_map, config.output)):
            for unknown in set(tensors) - {tensor.name for tensor in kept}:
                del tensors[unknown]
        if step.model_name == "tensorrt_llm":
            step.output_map["finish_reason"] = "finish_reason"
            ensemble.output.add(name="finish_reason", data_type="TYPE_STRING", dims=[-1])
        made |= set(step.output_map.values())
        used |= set(step.input_map.values())
    for tensors, known in ((ensemble.input, used), (ensemble.output, made)):
        for tensor in [tensor for tensor in tensors if tensor.name not in known]:
            tensors.remove(tensor)
    # What a step makes and nobody uses is an error to Triton.
    for step in ensemble.ensemble_scheduling.step:
        outputs = {tensor.name for tensor in ensemble.output}
        for key, tensor in list(step.output_map.items()):
            if tensor not in used | outputs:
                del step.output_map[key]
    return text_format.MessageToString(ensemble)
