"""Messages between our processes: whole, in time, and nonsense is nothing else."""

import os
import socket

import pytest

import notebooks
from notebooks import Channel, CopyReport, Done, Exited, Ready


def test_a_message_arrives_as_it_was_sent_with_its_descriptors() -> None:
    ours, theirs = Channel.pair()
    read_fd, write_fd = os.pipe()
    with ours, theirs, notebooks.closing(read_fd), notebooks.closing(write_fd):
        report = CopyReport(new=3, first_failure="a\udcff\x1b")
        ours.send_message(Done(report), [write_fd])
        message, (fd,) = theirs.receive_message()
        assert message == Done(report)
        assert not os.get_inheritable(fd)
        with notebooks.closing(fd):
            os.write(fd, b"x")
        assert os.read(read_fd, 1) == b"x"


def test_who_does_not_read_is_not_waited_for() -> None:
    """A stopped helper must not stop the launcher, nor a suspended command a worker."""
    ours, theirs = Channel.pair()
    with ours, theirs, pytest.raises(BlockingIOError):
        for _ in range(1_000_000):
            ours.send_message(Ready(), wait=False)


def test_what_is_too_long_is_refused_by_the_sender() -> None:
    ours, theirs = Channel.pair()
    with ours, theirs:
        with pytest.raises(OSError, match="Message too long"):
            ours.send_message(Done("x" * notebooks.MAX_MESSAGE_BYTES))
        longest = Done("x" * (notebooks.MAX_MESSAGE_BYTES - 100))
        ours.send_message(longest)
        assert theirs.receive_message() == (longest, [])


NONSENSE = {
    "nothing": b"\x00",
    "no JSON": b"{",
    "no object": b"[1]",
    "no message": b'{"pid": 1}',
    "an unknown one": b'{"@message": "Reboot"}',
    "not a name": b'{"@message": ["Ready"]}',
    "other fields": b'{"@message": "Ready", "\\u001b]0;title\\u0007": 1}',
    "deep": b"[" * 100_000,
    "a long number": b"9" * 10_000,
}


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_without_a_word_of_it(data: bytes) -> None:
    """Who has taken the webserver over could write to the teacher's terminal."""
    ours, theirs = Channel.pair()
    with ours, theirs:
        before = os.listdir("/proc/self/fd")
        socket.send_fds(ours, [data], [0, 1, 2])
        with pytest.raises(ValueError, match="^it does not send messages$"):
            theirs.receive_message()
        assert os.listdir("/proc/self/fd") == before


def test_the_end_of_a_channel_is_told_and_leaves_no_descriptor() -> None:
    ours, theirs = Channel.pair()
    with theirs:
        with ours:
            before = os.listdir("/proc/self/fd")
            socket.send_fds(ours, [b""], [0, 1, 2])
            with pytest.raises(EOFError):
                theirs.receive_message()
            assert os.listdir("/proc/self/fd") == before
        with pytest.raises(EOFError):
            theirs.receive_message()


def test_messages_within_messages_are_messages_again() -> None:
    message = Done([Exited(1, -9), {"a": Ready(), "message": 1}])
    ours, theirs = Channel.pair()
    with ours, theirs:
        ours.send_message(message)
        assert theirs.receive_message() == (message, [])
