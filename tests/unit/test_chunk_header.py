"""The row of numbers that goes from tensorrt_llm to postprocessing says what was put in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from chunk_header import ChunkHeader, ChunkHeaderError, read_headers

HEADERS = [
    ChunkHeader(
        key=key,
        is_first=is_first,
        is_last=is_last,
        keep_special_tokens=keep,
        trim_characters=trim,
        listener_pid=2**31 - 1 if trim else 0,
        number=2**40 if trim else 0,
        context=[5, 0, 50256] if is_first else [],
    )
    for key, is_first, is_last, keep, trim in itertools.product(
        (0, 1, 2**48 + 7, 2**48 - 1 | 127 << 56), (True, False), (True, False), (True, False), (0, 1, 4000)
    )
]


def test_a_row_is_read_as_it_was_written():
    for header in HEADERS:
        assert ChunkHeader.from_row(header.to_row()) == header


def test_rows_survive_the_tensor():
    rows = [header.to_row() for header in HEADERS if header.is_first]
    tensor = np.array([rows], np.int64)
    assert tensor.shape == (1, len(rows), 5 + 3)
    assert read_headers(tensor) == [header for header in HEADERS if header.is_first]


@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (1, 0, 5), (2, 1, 5), (1, 1, 4), (1, 1, 1, 5)])
def test_what_is_no_header_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ChunkHeaderError, match="CHUNK_HEADER has shape"):
        read_headers(np.zeros(shape, np.int64))


def test_a_row_is_as_long_as_its_context():
    assert len(ChunkHeader(key=1).to_row()) == 5
    assert len(ChunkHeader(key=1, context=range(8)).to_row()) == 13


def test_a_header_alone_is_a_whole_sequence():
    header = ChunkHeader(key=1)
    assert header.is_first
    assert header.is_last
    assert not header.keep_special_tokens
    assert header.trim_characters == 0
