"""What is kept of a stream, and what of it reaches an answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ash_recipes.general.answers import fitting
from ash_recipes.runner.output import Capture, JobLog, json_size


@given(st.lists(st.binary(max_size=40)), st.integers(0, 60), st.integers(0, 60))
def test_a_capture_keeps_both_ends_and_counts_the_rest(pieces: list[bytes], limit: int, shown: int) -> None:
    capture = Capture(limit)
    for piece in pieces:
        capture.append(piece)
    whole, bound = b"".join(pieces), min(limit, shown)
    clipped = capture.clip(shown)
    assert len(clipped.data) + clipped.left_out == len(whole) == capture.total
    if len(whole) <= bound:
        assert clipped.head == whole
    else:
        assert len(clipped.data) == bound
        assert whole.startswith(clipped.head) and whole.endswith(clipped.tail)


@given(st.text(), st.integers(0, 50))
def test_a_cut_never_makes_good_text_bad(text: str, limit: int) -> None:
    raw = text.encode("utf-8", "replace")
    capture = Capture(limit)
    capture.append(raw)
    clipped = capture.clip()
    assert clipped.utf8
    if "\ufffd" not in text:
        assert "\ufffd" not in clipped.text()


@given(st.lists(st.tuples(st.sampled_from(("stdout", "stderr")), st.binary(min_size=1, max_size=30))), st.data())
def test_a_log_gives_every_byte_that_it_still_holds(pieces: list[tuple[str, bytes]], data: st.DataObject) -> None:
    log = JobLog(limit=50)
    for stream, piece in pieces:
        log.append("stdout" if stream == "stdout" else "stderr", piece)
    whole = b"".join(piece for _, piece in pieces)
    offset, found = data.draw(st.integers(0, len(whole) + 5)), bytearray()
    at = max(offset, log.dropped)
    while True:
        chunks, after = log.read(at, data.draw(st.integers(1, 40)))
        for chunk in chunks:
            assert chunk.offset == at
            at += len(chunk.data)
            found += chunk.data
        assert after == min(at, log.total)
        if not chunks:
            break
    assert bytes(found) == whole[max(offset, log.dropped) :]


@given(st.text(max_size=300), st.integers(10, 500))
def test_a_text_is_cut_to_what_it_takes_on_the_wire(text: str, budget: int) -> None:
    fitted = fitting(text, budget)
    assert text.startswith(fitted) and json_size(fitted) <= budget
