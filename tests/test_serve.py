"""05_predict.py --serve over real sockets of 127.0.0.1: good, bad, slow and many clients, and the page in a real browser."""

import importlib
import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from test_predict import noise_image, save_weights

model = importlib.import_module("02_model")
predict = importlib.import_module("05_predict")

SCRIPT = Path(predict.__file__)
THRESHOLD = 0.01  # the weights are untrained: their scores are low


def file_bytes(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


PICTURE = file_bytes(noise_image(0, 160, 96), "JPEG")


def start_server(data_folder: Path, sample_folder: Path):
    network, about_dict = model.load_weights(data_folder / "weights.pt")
    server = predict.Server(("127.0.0.1", 0), model.fold_batch_norm(network), about_dict, THRESHOLD, sample_folder)
    # Its threads may not print here: pytest replaces sys.stdout between two tests, and print() in a thread can crash on that.
    server.said_list = []
    server.say = server.said_list.append
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    torch.set_num_threads(1)  # as the script does
    folder = tmp_path_factory.mktemp("serve")
    save_weights(folder)
    (folder / "sample").mkdir()
    (folder / "sample" / "first.jpg").write_bytes(PICTURE)
    server = start_server(folder, folder / "sample")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """The service as it is, but in a hurry, so that a test of slow clients is quick."""
    monkeypatch.setattr(predict, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(predict, "LINGER_SECONDS", 0.2)


def talk(server, raw: bytes, close: bool = True) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes, end (or not), and read the whole answer: status, headers, body."""
    with socket.create_connection(server.server_address, timeout=10) as connection:
        connection.sendall(raw)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while block := connection.recv(65536):
            answer += block
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *line_list = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, value in (line.split(": ", 1) for line in line_list)}, body


def request(server, method: str = "POST", path: str = "/predict", body: bytes = b"", length=True, head: str = ""):
    if length is True:
        length = f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
    return talk(server, f"{method} {path} HTTP/1.1\r\nHost: here\r\n{head}{length or ''}\r\n".encode("latin-1") + body)


def png(width: int, height: int, *chunk_list: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand: its header may promise what does not follow."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunk_list) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- good requests

def test_health_says_what_the_network_knows(server):
    status, header_dict, body = request(server, "GET", "/health")
    assert status == 200 and header_dict["content-type"] == "application/json"
    assert json.loads(body) == {"status": "ok", "classes": ["keyPoint_1", "keyPoint_2"], "threshold": THRESHOLD,
                                "samples": 1, "max_bytes": predict.MAX_BODY}


def test_page_and_sample_come_from_memory(server):
    status, header_dict, body = request(server, "GET", "/")
    assert status == 200 and body == predict.PAGE_PATH.read_bytes()
    assert "default-src 'none'" in header_dict["content-security-policy"]
    assert header_dict["server"] == "keypoints"  # no version of anything
    assert request(server, "GET", "/sample/0")[2] == PICTURE
    status, header_dict, body = request(server, "HEAD", "/health")
    assert status == 200 and body == b"" and int(header_dict["content-length"]) > 0


def test_the_page_fetches_nothing_from_elsewhere():
    page = predict.PAGE_PATH.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|url\(|@import", page)
    assert set(re.findall(r"https?://[^'\"\s]+", page)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name, image, options", [
    ("JPEG", noise_image(1, 160, 96), {}), ("PNG", noise_image(2, 97, 33), {}), ("BMP", noise_image(3, 32, 32), {}),
    ("WEBP", noise_image(4, 64, 64), {}), ("JPEG", noise_image(5, 96, 64).convert("CMYK"), {}), ("PNG", noise_image(6, 1, 1), {}),
    ("PNG", noise_image(7, 96, 64).convert("RGBA"), {}), ("PNG", noise_image(8, 96, 64).convert("P"), {})])
def test_answers_equal_those_of_the_command_line(name, image, options, server, tmp_path, monkeypatch, capsys):
    body = file_bytes(image, name, **options)
    (tmp_path / f"picture.{name.lower()}").write_bytes(body)
    save_weights(tmp_path)
    monkeypatch.setattr(sys, "argv", ["05", str(tmp_path / f"picture.{name.lower()}"), "--data", str(tmp_path), "--json",
                                      str(tmp_path / "found.json"), "--threshold", str(THRESHOLD)])
    predict.main()
    wanted, = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    status, header_dict, answer = request(server, body=body)
    answer = json.loads(answer)
    assert status == 200 and list(answer) == ["image", "keypoints"] and answer["keypoints"] == wanted["keypoints"]
    assert wanted["keypoints"] or image.size == (1, 1)  # what is found beside so small a picture does not count
    assert re.fullmatch(r"decode;dur=[\d.]+, network;dur=[\d.]+", header_dict["server-timing"])


def test_the_threshold_of_one_request(server):
    many = json.loads(request(server, path="/predict?threshold=0", body=PICTURE)[2])["keypoints"]
    assert len(many) == 2 and json.loads(request(server, path="/predict?threshold=1", body=PICTURE)[2])["keypoints"] == []


def test_curl_may_ask_before_it_sends(server):
    """Expect: 100-continue: the service says "go on" before the body comes, or refuses it before it comes."""
    for length, wanted in ((len(PICTURE), b"100 Continue"), (predict.MAX_BODY + 1, b"413 ")):
        with socket.create_connection(server.server_address, timeout=10) as connection:
            connection.sendall(f"POST /predict HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n".encode())
            assert wanted in connection.recv(1000)
            if b"100" in wanted:
                connection.sendall(PICTURE)
                assert b"200 OK" in connection.recv(1000)


# ---------------------------------------------------------------- bad requests and bad pictures

GOOD_LENGTH = f"Content-Length: {len(PICTURE)}\r\n"
BAD_DICT = {  # what: (request, status, words of its sentence)
    "unknown path": (dict(method="GET", path="/nowhere"), 404, "nothing of this name"),
    "a file of the machine": (dict(method="GET", path="/../../../../etc/passwd"), 404, "nothing of this name"),
    "a file, encoded": (dict(method="GET", path="/sample/..%2f..%2fweights.pt"), 404, "counted from 0"),
    "a script": (dict(method="GET", path="/05_predict.py"), 404, "nothing of this name"),
    "no such sample": (dict(method="GET", path="/sample/7"), 404, "there are 1 samples"),
    "a negative sample": (dict(method="GET", path="/sample/-1"), 404, "counted from 0"),
    "post to an unknown path": (dict(path="/upload", body=PICTURE), 404, "nothing of this name"),
    "get of predict": (dict(method="GET"), 405, "/predict understands POST only"),
    "post to the page": (dict(path="/", body=PICTURE), 405, "understands GET and HEAD only"),
    "put": (dict(method="PUT", body=PICTURE, length=GOOD_LENGTH), 405, "understands POST only"),
    "delete": (dict(method="DELETE", path="/health"), 405, "understands GET and HEAD only"),
    "options": (dict(method="OPTIONS", path="/health"), 405, "understands GET and HEAD only"),
    "invented method": (dict(method="FETCH", path="/health"), 501, "method is not understood"),
    "threshold no number": (dict(path="/predict?threshold=high", body=PICTURE), 400, "threshold=NUMBER"),
    "threshold too high": (dict(path="/predict?threshold=1.1", body=PICTURE), 400, "from 0 to 1"),
    "threshold nan": (dict(path="/predict?threshold=nan", body=PICTURE), 400, "from 0 to 1"),
    "misspelt parameter": (dict(path="/predict?treshold=0.5", body=PICTURE), 400, "only threshold"),
    "no length": (dict(body=PICTURE, length=None), 411, "Content-Length"),
    "chunks": (dict(length=None, head="Transfer-Encoding: chunked\r\n", body=b"3\r\nabc\r\n0\r\n\r\n"), 411, "in chunks"),
    "chunks and a length": (dict(head="Transfer-Encoding: chunked\r\n", body=PICTURE), 411, "in chunks is not understood"),
    "negative length": (dict(length="Content-Length: -5\r\n", body=PICTURE), 400, "one whole number"),
    "length in words": (dict(length="Content-Length: five\r\n", body=PICTURE), 400, "one whole number"),
    "length with underscore": (dict(length="Content-Length: 1_0\r\n", body=PICTURE), 400, "one whole number"),
    "two lengths": (dict(length=GOOD_LENGTH + "Content-Length: 4\r\n", body=PICTURE), 400, "one whole number"),
    "empty body": (dict(body=b""), 400, "the body is empty"),
    "body too large": (dict(body=b"x" * (predict.MAX_BODY + 1)), 413, "bytes are more than"),
    "absurd length": (dict(length="Content-Length: 999999999999999\r\n", body=PICTURE), 413, "bytes are more than"),
    "body too short": (dict(length="Content-Length: 100000\r\n", body=PICTURE[:500]), 400, "only 500 came"),
    "a form": (dict(head="Content-Type: multipart/form-data; boundary=x\r\n", body=PICTURE), 415, "a form is not understood"),
    "compressed": (dict(head="Content-Encoding: gzip\r\n", body=PICTURE), 415, "compressed body is not understood"),
    "text": (dict(body=b"this is no picture"), 415, "no readable picture"),
    "zeros": (dict(body=bytes(10000)), 415, "no readable picture"),
    "half a JPEG": (dict(body=PICTURE[:len(PICTURE) // 2]), 415, "not a readable picture"),
    "JPEG head alone": (dict(body=PICTURE[:20]), 415, "readable picture"),
    "broken PNG": (dict(body=png(64, 64, (b"IDAT", b"no zlib stream"))), 415, "not a readable picture"),
    "PNG without pixels": (dict(body=png(64, 64)), 415, "not a readable picture"),
    "PNG of size 0": (dict(body=png(0, 10, (b"IDAT", zlib.compress(b"")))), 415, "readable picture"),
    "a bomb": (dict(body=png(30000, 30000, (b"IDAT", zlib.compress(bytes(100000))))), 413, "shrink"),
    "a small bomb": (dict(body=png(5000, 4000, (b"IDAT", zlib.compress(bytes(100000))))), 413, "5000 x 4000 px is more than"),
    "a text bomb": (dict(body=png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))))), 415, "readable picture"),
    "a GIF": (dict(body=file_bytes(noise_image(0), "GIF")), 415, "send JPEG, PNG, BMP or WEBP"),
    "PostScript, a program": (dict(body=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"), 415, "no readable"),
    "an SVG": (dict(body=b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 415, "no readable picture"),
    "address too long": (dict(method="GET", path="/" + "a" * 70000), 414, "address is too long"),
    "a header too long": (dict(method="GET", path="/health", head="X: " + "a" * 70000 + "\r\n"), 431, "head is too long"),
    "too many headers": (dict(method="GET", path="/health", head="X: a\r\n" * 200), 431, "head is too long"),
}
BAD_RAW_DICT = {  # what is no HTTP at all
    "noise": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "no HTTP request"),
    "one word": (b"hello\r\n\r\n", 400, "no HTTP request"),
    "a false version": (b"GET /health HTTP/one\r\n\r\n", 400, "no HTTP request"),
    "a version to come": (b"GET /health HTTP/3.0\r\n\r\n", 505, "version of HTTP"),
}


def check_refusal(answer, status: int, words: str) -> None:
    got_status, header_dict, body = answer
    sentence = json.loads(body)["error"]
    assert got_status == status and words in sentence and header_dict["content-type"] == "application/json"
    assert len(sentence) < 200 and "\n" not in sentence and "Traceback" not in sentence
    assert not re.search(r"/(tmp|home|root|usr)/|\.py\b|<_io|0x[0-9a-f]{6}", sentence)  # no path, no insides
    if status == 405:
        assert header_dict["allow"] in ("POST", "GET, HEAD")


@pytest.fixture(scope="module")
def good_client(server):
    """Asks for keypoints again and again, as long as the bad requests go on; each answer must be the right one."""
    wanted = request(server, body=PICTURE)[2]
    wrong_list, stopping, done = [], threading.Event(), []

    def ask():
        while not stopping.wait(0.05):
            status, _, body = request(server, body=PICTURE)
            done.append(status)
            if status != 200 or body != wanted:
                wrong_list.append((status, body))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield done
    stopping.set()
    thread.join(timeout=10)
    assert done and not wrong_list


@pytest.mark.parametrize("what", [*BAD_DICT, *BAD_RAW_DICT])
def test_each_bad_request_gets_its_sentence_while_good_ones_go_on(what, server, good_client):
    server.said_list.clear()
    if what in BAD_DICT:
        arguments, status, words = BAD_DICT[what]
        check_refusal(request(server, **arguments), status, words)
    else:
        raw, status, words = BAD_RAW_DICT[what]
        check_refusal(talk(server, raw), status, words)
    assert not any("mistake in the service" in line for line in server.said_list)  # a refusal, not an accident


def test_a_mistake_of_ours_is_told_to_one_client_only(server, monkeypatch):
    server.said_list.clear()
    monkeypatch.setattr(model, "find_keypoints", lambda *arguments: 1 / 0)
    check_refusal(request(server, body=PICTURE), 500, "made a mistake")
    monkeypatch.undo()
    assert any("mistake" in line and "ZeroDivisionError" in line for line in server.said_list)  # the terminal says which
    assert request(server, body=PICTURE)[0] == 200


# ---------------------------------------------------------------- slow clients, and many

def drip(server, piece_list, pause: float) -> bytes:
    """Send one piece after another; returns the answer."""
    with socket.create_connection(server.server_address, timeout=10) as connection:
        try:
            for piece in piece_list:
                connection.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass  # cut off while it was still sending
        answer = b""
        try:
            while block := connection.recv(65536):
                answer += block
        except OSError:
            pass
        return answer


@pytest.mark.parametrize("what, piece_list", [
    ("says nothing", []),
    ("stops in its first line", [b"POST /pre"]),
    ("stops in its head", [b"POST /predict HTTP/1.1\r\nContent-Le"]),
    ("stops in its body", [b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc"]),
    ("a header every 0.1 s", [b"POST /predict HTTP/1.1\r\n"] + [b"X: a\r\n"] * 8),
    ("a byte every 0.1 s", [b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"] + [b"a"] * 8),
])
def test_a_slow_client_is_sent_away_and_nobody_waits_for_it(what, piece_list, server, impatient):
    answer_list = []
    slow = threading.Thread(target=lambda: answer_list.append(drip(server, piece_list, 0.1)))
    start_time = time.monotonic()
    slow.start()
    assert request(server, body=PICTURE)[0] == 200
    slow.join(timeout=10)
    assert time.monotonic() - start_time < 5
    assert b" 408 " in answer_list[0] and b"did not arrive whole within 0.5 s" in answer_list[0]


def test_clients_that_go_away_do_no_harm(server):
    server.said_list.clear()
    for raw in (b"", b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc", b"GET / HTTP/1.1\r\n\r\n"):
        connection = socket.create_connection(server.server_address, timeout=10)
        connection.sendall(raw)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset, as in a crash
        connection.close()
    assert request(server, body=PICTURE)[0] == 200
    assert not any("mistake in the service" in line for line in server.said_list)


def test_eight_clients_at_once_get_the_right_answers(server):
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


def test_more_clients_than_places_wait_their_turn(server):
    """Idle connections take all places but a few; those who come then are served in turn, and none is turned away."""
    idle_list = [socket.create_connection(server.server_address, timeout=10) for _ in range(predict.MOST_CLIENTS - 1)]
    try:
        assert [request(server, "GET", "/health")[0] for _ in range(5)] == [200] * 5
    finally:
        for connection in idle_list:
            connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a single process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_clean(number, server, tmp_path):
    save_weights(tmp_path)
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--data", str(tmp_path), "--serve", "127.0.0.1:0"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        assert "weights.pt" in process.stdout.readline()
        port = int(re.search(r"serving on http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
        process.send_signal(number)
        output, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and error == "" and output.endswith("stopped\n") and "GET /health 200" in output


def test_a_taken_port_gets_a_sentence(server, tmp_path):
    with pytest.raises(predict.UserError, match="cannot serve there"):
        predict.Server(server.server_address, None, {}, 0.5, tmp_path)


# ---------------------------------------------------------------- the page in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_after_sample(server, profile_folder: Path) -> str:
    """The page's HTML after the link to #sample was opened and its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={profile_folder}", "--virtual-time-budget=10000", "--dump-dom",
               f"http://127.0.0.1:{server.server_port}/#sample"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60).stdout


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
def test_the_page_shows_keypoints_scores_and_time(server, tmp_path):
    page = page_after_sample(server, tmp_path)
    assert "Looks for keyPoint_1, keyPoint_2 in a picture" in page
    assert re.search(r'role="status"[^>]*>sample 1, 96 × 160 px: \d+ ms \(decode [\d.]+ ms, network [\d.]+ ms\)', page)
    asked = {k["class"]: k for k in json.loads(request(server, path="/predict?threshold=0.05", body=PICTURE)[2])["keypoints"]}
    item_list = re.findall(r"<li .*?</li>", page, re.DOTALL)
    assert len(item_list) == 2 and len(asked) == 2
    for keypoint in asked.values():
        assert sum(f"{keypoint['class']}  {keypoint['score']:.3f}" in item for item in item_list) == 1
    assert page.count('<path d="M') == 4  # each box twice, dark below bright


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
def test_the_page_shows_errors_in_words(server, tmp_path):
    save_weights(tmp_path)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "broken.jpg").write_bytes(PICTURE[:300])
    broken = start_server(tmp_path, tmp_path / "sample")
    try:
        page = page_after_sample(broken, tmp_path / "profile")
    finally:
        broken.shutdown()
        broken.server_close()
    assert re.search(r'role="status"[^>]*class="bad"[^>]*>[^<]*readable picture', page) and '<main id="result" hidden' in page
