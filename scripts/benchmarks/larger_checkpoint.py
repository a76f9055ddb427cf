"""A GPT-2 of the usual size (12 layers of 768) with random weights and the demo model's tokenizer: 92M parameters.

What an engine computes costs the same with any weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.repositories import DEMO_CHECKPOINT

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def make(folder: Path) -> Path:
    import torch  # seconds, which other benchmarks need not wait for
    import transformers

    torch.manual_seed(0)
    demo = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    same = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    config = transformers.GPT2Config(
        n_layer=12, n_head=12, n_embd=768, n_positions=1024, **{name: demo[name] for name in same if name in demo}
    )
    path = folder / "checkpoint-gpt2-92m"
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    for name in _TOKENIZER:
        if (DEMO_CHECKPOINT / name).exists():
            shutil.copy(DEMO_CHECKPOINT / name, path)
    return path
