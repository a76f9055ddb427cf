"""Train the demo checkpoint: a GPT-2 model of a few megabytes that answers simple questions without a doubt.

    python scripts/demo_checkpoint/train.py [--output DIR]

Needs torch, transformers and tokenizers, and no network. On one H100 it takes three minutes, on two CPU cores hours:
about 1.5 s a step. On a CPU the same seed on the same machine with the same number of threads gives the same files; on
a GPU sums are added up in no fixed order, so the files differ in their last bits and the answers do not.
"""

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
    Exchange,
    exchanges,
    system_prompt,
    tokenizer_text,
)
from evaluation import CHECKPOINT, MAX_CONTEXT_TOKENS, choose_prompts, measure, report, write_prompts
from facts import SYSTEM_MESSAGES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SEED = 2
NUM_THREADS = 2  # part of the recipe: sums are added up in another order with another number of threads
VOCAB_SIZE = 1280  # a multiple of 64 for every split over 1, 2 or 4 GPUs
NUM_STEPS = 9000
# (rows, tokens per row) of the steps, in turn: short rows teach the facts fast, long rows teach every position and to
# look at the last question only.
BATCH_SHAPES = ((16, 256), (16, 256), (4, 1024))
PEAK_LEARNING_RATE = 2e-3
NUM_WARMUP_STEPS = 100
# How often an exchange of these topics occurs in one pass over the corpus; all others once.
REPEATS = {
    "opposite": 2,
    "hello": 4,
    "thanks": 4,
    "emoji": 3,
    "emoji row": 3,
    "accent": 8,
    "program": 6,
    "explanation": 8,
    "story": 2,
    "self": 8,
    "planets": 4,
    "alphabet": 3,
    "calendar": 3,
    "times table": 3,
    "shape": 4,
    "baby": 4,
    "element": 3,
    "flag": 3,
}
SYSTEM_SHARE = 0.2  # of the rows begin with a system message
IGNORED = -100  # the target where nothing is to be learned


@dataclass(frozen=True)
class Document:
    """One exchange in tokens. `targets[i]` is `token_ids[i]` in the answer and IGNORED in the prompt."""

    token_ids: list[int]
    targets: list[int]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: any UTF-8 text can be encoded, with merges for the ASCII text of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # GPT-2 would add the embedding of token 0 for every token_type_id
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model() -> GPT2LMHeadModel:
    """A GPT-2 with 4 heads of size 64, the size that every attention kernel has, and narrow feed-forward layers."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_CONTEXT_TOKENS,
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_inner=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def encode(tokenizer: PreTrainedTokenizerFast, exchange: Exchange) -> Document:
    prompt_ids = tokenizer.encode(exchange.prompt)
    answer_ids = [*tokenizer.encode(exchange.answer), tokenizer.eos_token_id]
    return Document(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)


def shuffled_forever(documents: list[Document], rng: random.Random) -> Iterator[Document]:
    while True:
        yield from rng.sample(documents, len(documents))


def packed_row(
    documents: Iterator[Document], systems: list[Document], length: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids and targets, `length` + 1 of each. A row begins with a whole document and cuts the last one."""
    row = [rng.choice(systems)] if rng.random() < SYSTEM_SHARE else []
    while sum(len(document.token_ids) for document in row) <= length:
        row.append(next(documents))
    token_ids = [token_id for document in row for token_id in document.token_ids]
    targets = [target for document in row for target in document.targets]
    return token_ids[: length + 1], targets[: length + 1]


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of input ids and targets, both (rows, tokens); targets are the inputs moved on by one."""
    rng = random.Random(SEED)
    pool = [encode(tokenizer, exchange) for exchange in exchanges() for _ in range(REPEATS.get(exchange.topic, 1))]
    documents = shuffled_forever(pool, rng)
    system_ids = [tokenizer.encode(system_prompt(message)) for message in SYSTEM_MESSAGES]
    systems = [Document(ids, [IGNORED] * len(ids)) for ids in system_ids]
    while True:
        for num_rows, length in BATCH_SHAPES:
            rows = [packed_row(documents, systems, length, rng) for _ in range(num_rows)]
            token_ids, targets = torch.tensor(rows).unbind(dim=1)
            yield token_ids[:, :-1], targets[:, 1:]


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then a straight line down to 0: small last steps are what makes the margins wide."""
    return PEAK_LEARNING_RATE * min((step + 1) / NUM_WARMUP_STEPS, 1 - step / num_steps)


def train(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, num_steps: int) -> Iterator[float]:
    """Train for `num_steps` and yield the loss of each."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    for step, (input_ids, targets) in zip(range(num_steps), batches(tokenizer), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        input_ids, targets = input_ids.to(model.device), targets.to(model.device)
        learned = targets != IGNORED
        # Logits are computed for the answers only, which saves a fifth of the time.
        hidden = model.transformer(input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
        loss = cross_entropy(model.lm_head(hidden[learned]), targets[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the checkpoint in float16 under a temporary name and put it in the place of `output`.

    The files of an older checkpoint are replaced; its README.md, written by hand, stays.
    """
    temporary = output.with_name(output.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    model.cpu().half().save_pretrained(temporary)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary, save_jinja_files=False)  # the template goes into tokenizer_config.json
    output.mkdir(parents=True, exist_ok=True)
    for file in temporary.iterdir():
        os.replace(file, output / file.name)
    temporary.rmdir()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHECKPOINT, metavar="DIR", help="default: demo-gpt2 here")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="fewer for a quick try (default: %(default)s)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="default: %(default)s")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(arguments.device == "cpu")
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = new_model().to(arguments.device)
    print(f"{len(exchanges())} exchanges, {model.num_parameters()} parameters, {arguments.steps} steps", flush=True)

    start = time.monotonic()
    for step, loss in enumerate(train(model, tokenizer, arguments.steps), start=1):
        if step <= 20 or step % 50 == 0:
            print(f"step {step}: loss {loss:.5f}, {time.monotonic() - start:.0f} s", flush=True)

    save(model, tokenizer, arguments.output)
    print(f"wrote {arguments.output}", flush=True)

    # What was saved is judged: float16 weights, computed with in float32.
    model = GPT2LMHeadModel.from_pretrained(arguments.output, dtype=torch.float32).eval()
    prompts = choose_prompts(tokenizer)
    write_prompts(arguments.output.parent / "prompts.jsonl", prompts)
    report("recorded prompts", measure(model, tokenizer, [(prompt.prompt, prompt.answer) for prompt in prompts]))
    report("whole corpus", measure(model, tokenizer, [(exchange.prompt, exchange.answer) for exchange in exchanges()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
