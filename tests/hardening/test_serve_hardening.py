"""05_predict.py --serve under hostile requests, odd pictures, clients that vanish, and load."""

import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest

from conftest import load, noise_image
from test_serve import PICTURE, check_refusal, file_bytes, request, server, talk  # noqa: F401

predict = load("05_predict")

# Warnings of Pillow about odd pictures; what matters is the answer.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning",
                                        "ignore::PIL.Image.DecompressionBombWarning")


def png(width: int, height: int, *chunk_list: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand: its header may promise what does not follow."""
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(chunk(*pair) for pair in chunk_list)
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def asking(**arguments):
    return lambda server: request(server, **{"body": PICTURE, **arguments})


def sending(raw: bytes):
    return lambda server: talk(server, raw)


OURS_DICT = {  # what: (request, status, words): these reach our own code, which answers in JSON
    "a negative sample": (asking(method="GET", path="/sample/-1"), 404, "GET /health"),
    "negative length": (asking(length="Content-Length: -5\r\n"), 400, "Content-Length"),
    "length in words": (asking(length="Content-Length: five\r\n"), 400, "Content-Length"),
    "length of 5,000 digits": (asking(length=f"Content-Length: {'9' * 5000}\r\n"), 400,
                               "Content-Length"),
    "absurd length": (asking(length="Content-Length: 999999999999999\r\n"), 413, "more than"),
    "chunks": (asking(length=None, head="Transfer-Encoding: chunked\r\n",
                      body=b"3\r\nabc\r\n0\r\n\r\n"), 400, "Content-Length"),
    "body too short": (asking(length="Content-Length: 100000\r\n", body=PICTURE[:-500]), 415,
                       "not a readable picture"),
    "zeros": (asking(body=bytes(10000)), 415, "not a readable picture"),
    "JPEG head alone": (asking(body=PICTURE[:20]), 415, "not a readable picture"),
    "broken PNG": (asking(body=png(64, 64, (b"IDAT", b"no zlib stream"))), 415, "not a readable"),
    "PNG without pixels": (asking(body=png(64, 64)), 415, "not a readable picture"),
    "PNG of size 0": (asking(body=png(0, 9, (b"IDAT", zlib.compress(b"")))), 415, "picture"),
    "a bomb": (asking(body=png(30000, 30000, (b"IDAT", zlib.compress(bytes(100000))))), 415,
               "30000 x 30000 px"),
    "a text bomb": (asking(body=png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20))))),
                    415, "picture"),
    "PostScript, a program": (asking(body=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
                              415, "not a readable picture"),
    "an SVG": (asking(body=b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 415,
               "not a readable picture"),
}
THEIRS_DICT = {  # what: (request, status): http.server itself refuses these, in HTML
    "put": (asking(method="PUT"), 501),
    "delete": (asking(method="DELETE", path="/health"), 501),
    "invented method": (asking(method="FETCH", path="/health"), 501),
    "address too long": (asking(method="GET", path="/" + "a" * 70000), 414),
    "a header too long": (asking(head="X: " + "a" * 70000 + "\r\n"), 431),
    "too many headers": (asking(head="X: a\r\n" * 200), 431),
    "noise": (sending(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), 400),
    "one word": (sending(b"hello\r\n\r\n"), 400),
    "a false version": (sending(b"GET /health HTTP/one\r\n\r\n"), 400),
    "a version to come": (sending(b"GET /health HTTP/3.0\r\n\r\n"), 505),
}


@pytest.fixture(scope="module")
def good_client(server):  # noqa: F811
    """Asks for keypoints for as long as the bad requests go on; each answer must be right."""
    wanted = request(server, body=PICTURE)
    wrong_list, done, stopping = [], [], threading.Event()

    def ask():
        while not stopping.wait(0.05):
            status, _, body = request(server, body=PICTURE)
            done.append(status)
            if (status, body) != (200, wanted[2]):
                wrong_list.append((status, body))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield
    stopping.set()
    thread.join(timeout=10)
    assert done and not wrong_list


@pytest.mark.parametrize("what", OURS_DICT)
def test_a_hostile_request_gets_its_sentence_while_good_ones_go_on(what, server,  # noqa: F811
                                                                   good_client):
    send, status, words = OURS_DICT[what]
    check_refusal(send(server), status, words)
    assert not any("mistake" in line for line in server.said_list)


@pytest.mark.parametrize("what", THEIRS_DICT)
def test_what_is_no_request_is_refused_while_good_ones_go_on(what, server,  # noqa: F811
                                                             good_client):
    send, wanted_status = THEIRS_DICT[what]
    status, header_dict, body = send(server)
    assert status == wanted_status and header_dict["connection"] == "close"
    assert b"Traceback" not in body and b"/work" not in body and b".py" not in body
    assert not any("mistake" in line for line in server.said_list)


def test_curl_may_ask_before_it_sends(server):  # noqa: F811
    """Expect: 100-continue: the service says "go on" before the body comes."""
    head = f"POST /predict HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {len(PICTURE)}\r\n"
    with socket.create_connection(server.server_address, timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n")
        assert b"100 Continue" in connection.recv(1000)
        connection.sendall(PICTURE)
        assert b"200 OK" in connection.recv(1000)


def test_a_client_that_sends_too_much_is_heard_out_and_gets_the_sentence(server):  # noqa: F811
    """It reads the answer only after it has sent all, as most do: a reset would lose it."""
    body = bytes(3 * predict.MAX_BODY)
    check_refusal(request(server, body=body), 413, "36,000,000 bytes are more than")


def test_clients_that_go_away_do_no_harm(server):  # noqa: F811
    server.said_list.clear()
    half = b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc"
    for raw in (b"", half, b"GET / HTTP/1.1\r\n\r\n"):
        connection = socket.create_connection(server.server_address, timeout=10)
        connection.sendall(raw)
        # Ends with a reset, as in a crash.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert request(server, body=PICTURE)[0] == 200
    assert not any("mistake" in line for line in server.said_list)


def test_eight_clients_at_once_get_the_right_answers(server):  # noqa: F811
    body_list = [file_bytes(noise_image(seed, 320, 160), "PNG") for seed in range(8)]
    wanted_list = [request(server, body=body)[2] for body in body_list]
    assert len(set(wanted_list)) == 8
    wrong_list = []

    def client(number):
        for turn in range(5):
            index = (number + turn) % 8
            status, _, body = request(server, body=body_list[index])
            if status != 200 or body != wanted_list[index]:
                wrong_list.append((number, turn, status, body))
    thread_list = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in thread_list:
        thread.start()
    for thread in thread_list:
        thread.join(timeout=30)
    assert not wrong_list and not any(thread.is_alive() for thread in thread_list)


def test_thirty_idle_connections_keep_nobody_waiting(server):  # noqa: F811
    idle_list = []
    try:
        for _ in range(30):
            idle_list.append(socket.create_connection(server.server_address, timeout=10))
            time.sleep(0.01)  # or they wait in the system's queue
        assert [request(server, "GET", "/health")[0] for _ in range(5)] == [200] * 5
    finally:
        for connection in idle_list:
            connection.close()


def test_random_requests_get_an_answer_and_harm_nobody(server):  # noqa: F811
    """Heads and pictures with a few bytes changed, and noise; seeded, so always the same."""
    server.said_list.clear()
    rng = np.random.default_rng(0)
    head = ("POST /predict?threshold=0.01 HTTP/1.1\r\nHost: here\r\nContent-Type: image/jpeg\r\n"
            f"Content-Length: {len(PICTURE)}\r\n\r\n").encode()
    get = b"GET /sample/0 HTTP/1.1\r\nHost: here\r\n\r\n"
    sign_list = np.frombuffer(b"\r\n :;/?%=.-0123456789\0\xff", np.uint8)
    wanted, status_list = request(server, body=PICTURE)[2], []
    for turn in range(200):
        if turn % 4 == 3:
            raw = rng.bytes(int(rng.integers(1, 400))) + (b"\r\n\r\n" if turn % 8 == 3 else b"")
        else:  # the head, the picture, or a request without a body is changed
            changed = bytearray((head, PICTURE, get)[turn % 4])
            for place in rng.integers(0, len(changed), rng.integers(1, 6)):
                any_byte, sign = rng.integers(256), rng.choice(sign_list)
                changed[place] = any_byte if rng.random() < 0.5 else sign
            changed = changed[:rng.integers(len(changed))] if turn % 9 == 0 else changed
            raw = (bytes(changed) + PICTURE, head + bytes(changed), bytes(changed))[turn % 4]
        with socket.create_connection(server.server_address, timeout=10) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        if answer:
            first_line = answer.split(b"\r\n", 1)[0].split()
            assert first_line[0] == b"HTTP/1.1", (raw, answer)
            status_list.append(int(first_line[1]))
        else:  # as http.server does where the first line is blank
            assert not raw.split(b"\n")[0].strip(), raw
    assert request(server, body=PICTURE)[2] == wanted
    assert set(status_list) <= {100, 200, 400, 404, 413, 414, 415, 431, 501, 505}
    assert len(set(status_list)) >= 4
    assert not any("mistake" in line for line in server.said_list)
