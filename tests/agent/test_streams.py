"""Workers' output: kept in files, shown on the console as torchrun would."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_fit.launch.outlet import Outlet
from elastic_fit.launch.signals import SignalLatch
from elastic_fit.launch.streams import Route, Streams
from tests.agent.harness import largest_file, wait_until


def write_and_finish(streams: Streams, sink: int, *pieces: bytes) -> None:
    streams.start()
    for piece in pieces:
        os.write(sink, piece)
    os.close(sink)
    streams.finish()


def test_output_is_kept_and_shown_byte_for_byte(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    write_and_finish(streams, sink, b"half a li", b"ne\n\xff\x00 and no end")
    assert (tmp_path / "log").read_bytes() == b"half a line\n\xff\x00 and no end"
    assert os.read(reader, 100) == b"half a line\n\xff\x00 and no end"


def test_teed_lines_carry_the_ranks_prefix_and_the_log_does_not(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=writer, prefix="[default0]:"))
    write_and_finish(streams, sink, b"one\ntw", b"o\nlast")
    assert os.read(reader, 100) == b"[default0]:one\n[default0]:two\n[default0]:last\n"
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nlast"


def test_hidden_stream_is_kept_all_the_same(tmp_path: Path) -> None:
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=None))
    write_and_finish(streams, sink, b"quiet\n")
    assert (tmp_path / "log").read_bytes() == b"quiet\n"


def test_worker_sees_a_terminal_where_the_console_is_one(tmp_path: Path) -> None:
    master, console = pty.openpty()
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=console))
    assert os.isatty(sink)
    write_and_finish(streams, sink, b"\rstep 1\rstep 2\n")
    assert (tmp_path / "log").read_bytes() == b"\rstep 1\rstep 2\n"
    assert b"step 2" in os.read(master, 100)


def test_console_that_has_gone_away_does_not_end_the_training(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    write_and_finish(streams, sink, b"a\n", b"b\n")
    assert (tmp_path / "log").read_bytes() == b"a\nb\n"


def test_signals_wait_for_the_loop_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with SignalLatch() as latch:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: len(latch._arrived) == 2)
        assert sorted(latch.take()) == [signal.SIGUSR1, signal.SIGTERM]
        assert latch.take() == []
    assert signal.getsignal(signal.SIGUSR1) is before


def test_full_disk_under_the_logs_holds_no_worker_up(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    (tmp_path / "log").symlink_to("/dev/full")
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    write_and_finish(streams, sink, b"a\n", b"b\n" * 40_000)
    assert os.read(reader, 4) == b"a\nb\n"


def test_log_that_could_not_be_made_is_made_as_soon_as_it_can_be(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "later" / "log", console=writer))
    streams.start()
    os.write(sink, b"lost\n")
    assert os.read(reader, 100) == b"lost\n"
    (tmp_path / "later").mkdir()
    os.write(sink, b"kept\n")
    os.close(sink)
    streams.finish()
    assert (tmp_path / "later" / "log").read_bytes() == (
        b"\n[elastic-fit: 5 bytes are missing here: the disk refused them]\nkept\n"
    )


def test_log_says_what_it_lacks_when_the_disk_has_room_again(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    streams.start()
    with largest_file(1000):
        os.write(sink, b"k" * 900)
        os.write(sink, b"x" * 500)
        shown = b""
        while len(shown) < 1400:
            shown += os.read(reader, 100)
    os.write(sink, b"more\n")
    os.close(sink)
    streams.finish()
    kept, gap, more = (tmp_path / "log").read_bytes().split(b"\n", 2)
    assert kept == b"k" * 900 + b"x" * 100
    assert gap == b"[elastic-fit: 400 bytes are missing here: the disk refused them]"
    assert more == b"more\n"


BYTES = 300_000
"""More than the pipes on the way hold."""


def in_thread(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def write_all_and_close(sink: int) -> None:
    with open(sink, "wb") as file:
        file.write(b"x" * BYTES)


def is_full(writer: int) -> bool:
    return not select.select([], [writer], [], 0)[1]


def comes(reader: int, within_s: float = 10.0) -> bool:
    return bool(select.select([reader], [], [], within_s)[0])


def test_console_that_would_block_is_waited_for(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    streams.start()
    in_thread(lambda: write_all_and_close(sink))
    wait_until(lambda: is_full(writer))
    shown = 0
    while shown < BYTES and comes(reader):
        shown += len(os.read(reader, BYTES))
    assert shown == BYTES
    streams.finish()


def test_slow_reader_is_waited_for_at_the_end_while_it_reads(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    streams.start()
    seen = []

    def read_slowly() -> None:
        while data := os.read(reader, 4096):
            seen.append(data)
            time.sleep(0.01)  # so that all of it takes longer than a reader who doesn't read is waited for

    reading = in_thread(read_slowly)
    writing = in_thread(lambda: write_all_and_close(sink))
    writing.join()
    streams.finish(stalled_s=0.1)
    os.close(writer)
    reading.join()
    assert len(b"".join(seen)) == BYTES


@pytest.mark.parametrize("is_terminal", [False, True])
def test_console_that_nobody_reads_holds_no_worker_up_and_says_later_what_it_lacks(
    tmp_path: Path, is_terminal: bool
) -> None:
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    streams = Streams(patience_s=0.1)
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    with open(os.dup(sink), "wb", buffering=0) as worker:
        streams.start()
        in_thread(lambda: write_all_and_close(sink)).join(30)
        wait_until(lambda: (tmp_path / "log").stat().st_size == BYTES)
        shown = b""
        while comes(reader, within_s=0.2):
            shown += os.read(reader, BYTES)
        assert 0 < len(shown) < BYTES
        worker.write(b"here again\n")
        while b"here again" not in shown and comes(reader):
            shown += os.read(reader, BYTES)
    missing = BYTES - shown.count(b"x")
    assert f"[elastic-fit: {missing} bytes could not be shown here]" in shown.decode()
    streams.finish()


def test_pipe_that_another_writer_fills_just_then_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    _, writer = os.pipe()
    write = os.write

    def write_too_late(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"o" * 4096)
        os.set_blocking(writer, True)
        return os.write(descriptor, data)

    outlet = Outlet(writer, patience_s=0.1)
    monkeypatch.setattr(os, "write", write_too_late)
    writing = in_thread(lambda: outlet.write(b"mine"))
    writing.join(20)
    assert not writing.is_alive()


def test_end_does_not_wait_for_a_reader_who_does_not_read(tmp_path: Path) -> None:
    _, writer = os.pipe()
    streams = Streams(patience_s=60)
    sink = streams.open(Route(log=tmp_path / "log", console=writer))
    streams.start()
    in_thread(lambda: write_all_and_close(sink))
    wait_until(lambda: is_full(writer))
    began = time.monotonic()
    streams.finish(stalled_s=0.1)
    assert time.monotonic() - began < 20


def test_end_does_not_wait_for_one_who_outlives_the_workers_and_goes_on_writing(tmp_path: Path) -> None:
    streams = Streams()
    sink = streams.open(Route(log=tmp_path / "log", console=None))
    streams.start()
    ends = threading.Event()

    def write_on() -> None:
        while not ends.wait(0.01):
            os.write(sink, b"still here\n")

    writing = in_thread(write_on)
    began = time.monotonic()
    streams.finish(stalled_s=0.1, most_s=60)
    assert time.monotonic() - began < 20
    ends.set()
    writing.join()
    os.close(sink)
    streams.finish()
