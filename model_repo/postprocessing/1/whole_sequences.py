"""NVIDIA's use of `postprocessing`, without CHUNK_HEADER: every row is a whole sequence. Knows nothing of Triton."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer


class SequenceError(Exception):
    """These token ids cannot be decoded: one sentence for the client."""


def decode_sequences(tokenizer: Tokenizer, vocab_size: int, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Token ids [prompts, beams, tokens] and their numbers [prompts, beams] to texts [prompts, beams], as bytes."""
    if lengths.shape != ids.shape[:2]:
        raise SequenceError(
            f"SEQUENCE_LENGTH has shape {list(lengths.shape)}; it must have one number for each of TOKENS_BATCH's "
            f"sequences, {list(ids.shape[:2])}"
        )
    texts = np.full(lengths.shape, b"", np.object_)
    for index, length in np.ndenumerate(lengths):
        if not 0 <= length <= ids.shape[2]:
            raise SequenceError(f"SEQUENCE_LENGTH holds {length}; TOKENS_BATCH has {ids.shape[2]} tokens a sequence")
        sequence = ids[index][:length]
        wrong = sequence[(sequence < 0) | (sequence >= vocab_size)]
        if wrong.size:
            raise SequenceError(
                f"TOKENS_BATCH holds {wrong[0]} within SEQUENCE_LENGTH; token ids are 0 to {vocab_size - 1}"
            )
        texts[index] = tokenizer.decode(sequence.tolist(), skip_special_tokens=True).encode()
    return texts
