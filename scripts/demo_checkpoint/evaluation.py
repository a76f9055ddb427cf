"""The recorded prompts of the demo checkpoint, and how sure a checkpoint is of its answers to them.

Greedy text is the same in float32, bfloat16 and in every engine only where the best token wins by more than the
rounding of the weaker format. So the measure is the margin: the best logit minus the second best, at every step.

    python scripts/demo_checkpoint/evaluation.py [--checkpoint DIR] [--dtype bfloat16]
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import Exchange, conversation, exchanges
from facts import SYSTEM_MESSAGES
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
CHECKPOINT = HERE / "demo-gpt2"
PROMPTS = HERE / "prompts.jsonl"

SEED = 20  # any other number chooses other prompts
MAX_CONTEXT_TOKENS = 1024
NUM_CHAT_PER_TOPIC = 3
NUM_PLAIN_PER_TOPIC = 3
# Lengths of the conversations in front of a question, in tokens: five prompts near each of them.
CONVERSATION_LENGTHS = (60, 120, 250, 500, 600, 750, 900)
NUM_PER_LENGTH = 5
MAX_TURN_TOKENS = 120  # no stories among earlier turns, so that a conversation comes close to its length


@dataclass(frozen=True)
class Prompt:
    """One line of prompts.jsonl. `answer` is the greedy text without special tokens."""

    prompt: str
    answer: str
    num_prompt_tokens: int


@dataclass(frozen=True)
class Margins:
    """`smallest[i]` is the smallest margin in answer i; negative where the model would say something else."""

    smallest: list[float]

    @property
    def accuracy(self) -> float:
        return sum(margin > 0 for margin in self.smallest) / len(self.smallest)


def choose_prompts(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """About 200 prompts of 1 to 900 tokens from all topics, the same ones at every call."""
    rng = random.Random(SEED)
    by_topic: dict[tuple[str, str], list[Exchange]] = defaultdict(list)
    for exchange in exchanges():
        by_topic[exchange.form, exchange.topic].append(exchange)

    chosen: list[tuple[str, Exchange]] = []
    for (form, _), candidates in by_topic.items():
        num_chosen = NUM_CHAT_PER_TOPIC if form == "chat" else NUM_PLAIN_PER_TOPIC
        chosen += [(exchange.prompt, exchange) for exchange in rng.sample(candidates, min(num_chosen, len(candidates)))]
    chosen += [
        (exchange.prompt, exchange) for exchange in exchanges() if exchange.prompt in ("one", "A", "January", "Monday")
    ]

    chat = [exchange for exchange in exchanges() if exchange.form == "chat"]
    topics = sorted({exchange.topic for exchange in chat})
    for length in CONVERSATION_LENGTHS:
        for _ in range(NUM_PER_LENGTH):
            topic = rng.choice(topics)
            question = rng.choice([exchange for exchange in chat if exchange.topic == topic])
            system = rng.choice(SYSTEM_MESSAGES)
            turns = [question]
            while len(tokenizer.encode(conversation(turns, system))) < length:
                turn = rng.choice(chat)
                if len(tokenizer.encode(turn.prompt + turn.answer)) <= MAX_TURN_TOKENS:
                    turns.insert(0, turn)
            chosen.append((conversation(turns, system), question))

    prompts = [Prompt(text, exchange.answer, len(tokenizer.encode(text))) for text, exchange in dict.fromkeys(chosen)]
    too_long = [p for p in prompts if p.num_prompt_tokens + len(tokenizer.encode(p.answer)) >= MAX_CONTEXT_TOKENS]
    return [prompt for prompt in prompts if prompt not in too_long]


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    lines = [json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")


def read_prompts(path: Path) -> list[Prompt]:
    # split("\n"), not splitlines(): JSON strings may hold U+2028, which the latter takes for the end of a line
    return [Prompt(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str]],
    max_batch_tokens: int = 8192,
) -> Margins:
    """The smallest margin of each (prompt, answer), the closing end token included.

    The whole answer is scored in one pass. Where every expected token has a positive margin it is also the one that
    greedy decoding picks, so this is greedy decoding without the loop.
    """
    encoded = [
        (tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_token_id]) for prompt, answer in texts
    ]
    smallest = [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: sum(map(len, encoded[index])))
    while order:
        longest = sum(map(len, encoded[order[-1]]))
        batch = [order.pop() for _ in range(min(len(order), max(1, max_batch_tokens // longest)))]
        input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        for row, index in enumerate(batch):
            prompt_ids, answer_ids = encoded[index]
            # Padding follows the answer, where causal attention cannot see it: a mask of ones is enough.
            input_ids[row, : len(prompt_ids) + len(answer_ids)] = torch.tensor(prompt_ids + answer_ids)
        logits = model(
            input_ids, attention_mask=torch.ones_like(input_ids)
        ).logits.float()  # (rows, longest, vocabulary)
        for row, index in enumerate(batch):
            prompt_ids, answer_ids = encoded[index]
            steps = logits[row, len(prompt_ids) - 1 : len(prompt_ids) + len(answer_ids) - 1]  # (answer, vocabulary)
            expected = torch.tensor(answer_ids)[:, None]
            others = steps.scatter(1, expected, -torch.inf).amax(dim=1)
            smallest[index] = (steps.gather(1, expected)[:, 0] - others).min().item()
    return Margins(smallest)


def report(name: str, margins: Margins) -> None:
    print(
        f"{name}: {len(margins.smallest)} prompts, accuracy {margins.accuracy:.2%}, "
        f"smallest margin {min(margins.smallest):.2f}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="default: demo-gpt2 here")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    arguments = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype), local_files_only=True
    ).eval()
    prompts = read_prompts(PROMPTS)
    margins = measure(model, tokenizer, [(prompt.prompt, prompt.answer) for prompt in prompts])
    report(f"recorded prompts in {arguments.dtype}", margins)
    every = measure(model, tokenizer, [(exchange.prompt, exchange.answer) for exchange in exchanges()])
    report(f"whole corpus in {arguments.dtype}", every)
    return 0 if margins.accuracy == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
