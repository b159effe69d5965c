import asyncio
import socket
import threading

import msgspec
import pytest

from server.core import Sampling
from server.engine import frames
from server.engine.messages import Abort, FromEngine, Submit, ToEngine

DECODER: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
LARGE = Submit("r", "t", list(range(300_000)), Sampling(logit_bias={5: -1.5}), 1.0, 2.0)


def test_frames_arrive_whole_and_in_order() -> None:
    """Small and large messages written at once are read one by one, and the end of the connection is None."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=lambda: ours.sendall(frames.encode(LARGE) + frames.encode(Abort("r"))))
        writer.start()
        assert frames.read(theirs, DECODER) == LARGE
        assert frames.read(theirs, DECODER) == Abort("r")
        writer.join()
        ours.shutdown(socket.SHUT_WR)
        assert frames.read(theirs, DECODER) is None


@pytest.mark.parametrize("kept", [1, 4, 9])
def test_connection_that_ends_within_a_frame_is_an_end(kept: int) -> None:
    """A frame that is cut off is never a message."""
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(frames.encode(Abort("r"))[:kept])
        assert frames.read(theirs, DECODER) is None

    async def main() -> object:
        reader = asyncio.StreamReader()
        reader.feed_data(frames.encode(Abort("r"))[:kept])
        reader.feed_eof()
        return await frames.read_async(reader, DECODER)

    assert asyncio.run(main()) is None


def test_frame_that_is_too_large_is_refused() -> None:
    """A length beyond the limit is refused before anything is read or kept for it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(frames.FrameError, match="4294967295"):
            frames.read(theirs, DECODER)


def test_message_of_the_wrong_direction_is_refused() -> None:
    """A message that only the API process may send is none of the engine's."""
    body = frames.encode(Abort("r"))[4:]
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(body, type=FromEngine)
