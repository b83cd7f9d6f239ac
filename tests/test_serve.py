"""05_predict.py --serve over real sockets: page, answers, refusals that a user meets, the end.

Hostile, slow and many clients stand in hardening/test_serve_hardening.py.
"""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from conftest import (ENVIRONMENT, REPOSITORY, call_main, load, noise_image, save_weights,
                      sentence_of)
from test_predict import odd_exif_bytes

model, predict = load("02_model"), load("05_predict")

THRESHOLD = 0.01  # the weights are untrained: their scores are low


def file_bytes(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


PICTURE = file_bytes(noise_image(0, 160, 96), "JPEG")


def start_server(data_folder, sample_folder):
    """The service in this process. What it would print is collected in its said_list."""
    network, about_dict = model.load_weights(data_folder)
    server = predict.make_server(("127.0.0.1", 0), model.fold_batch_norm(network), about_dict,
                                 THRESHOLD, sample_folder)
    server.said_list = []  # pytest replaces stdout between tests: no thread may print there

    class QuietHandler(predict.Handler):
        def log_message(self, format, *arguments):
            self.server.said_list.append(format % arguments)

    def handle_error(request, client_address):
        server.said_list.append(f"mistake in the service: {sys.exc_info()[1]!r}")
    server.RequestHandlerClass, server.handle_error = QuietHandler, handle_error
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
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


def talk(server, raw: bytes, close: bool = True) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes, end (or not), and read the whole answer: status, headers, body."""
    with socket.create_connection(server.server_address, timeout=10) as connection:
        connection.sendall(raw)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *line_list = head.decode("latin-1").split("\r\n")
    header_dict = {name.lower(): value for name, value in (x.split(": ", 1) for x in line_list)}
    return int(first.split()[1]), header_dict, body


def request(server, method: str = "POST", path: str = "/predict", body: bytes = b"", length=True,
            head: str = ""):
    if length is True:
        length = f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
    text = f"{method} {path} HTTP/1.1\r\nHost: here\r\n{head}{length or ''}\r\n"
    return talk(server, text.encode("latin-1") + body)


def check_refusal(answer, status: int, words: str) -> None:
    got_status, header_dict, body = answer
    sentence = json.loads(body)["error"]
    assert got_status == status and words in sentence, (got_status, sentence)
    assert header_dict["content-type"] == "application/json"
    assert len(sentence) < 200 and "\n" not in sentence and "Traceback" not in sentence
    assert not re.search(r"/(tmp|home|root|usr)/|\.py\b|<_io|0x[0-9a-f]{6}", sentence)


# ---------------------------------------------------------------- good requests

def test_health_says_what_the_network_knows(server):
    status, header_dict, body = request(server, "GET", "/health")
    assert status == 200 and header_dict["content-type"] == "application/json"
    assert json.loads(body) == {"status": "ok", "classes": ["keyPoint_1", "keyPoint_2"],
                                "threshold": THRESHOLD, "samples": 1,
                                "max_bytes": predict.MAX_BODY}


def test_page_and_samples_are_sent(server):
    status, header_dict, body = request(server, "GET", "/")
    assert status == 200 and body == predict.PAGE_PATH.read_bytes()
    assert header_dict["content-type"].startswith("text/html")
    assert request(server, "GET", "/?from=here")[2] == body
    assert request(server, "GET", "/sample/0")[2] == PICTURE


def test_the_page_fetches_nothing_from_elsewhere():
    page = predict.PAGE_PATH.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|url\(|@import", page)
    assert set(re.findall(r"https?://[^'\"\s]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name, image, options", [
    ("JPEG", noise_image(1, 160, 96), {}),
    ("JPEG", noise_image(1, 160, 96), {"exif": odd_exif_bytes()}),
    ("JPEG", noise_image(5, 96, 64).convert("CMYK"), {}),
    ("PNG", noise_image(2, 97, 50), {}),
    ("PNG", noise_image(6, 1, 1), {}),
    ("PNG", noise_image(7, 96, 64).convert("RGBA"), {}),
    ("PNG", noise_image(8, 96, 64).convert("P"), {}),
    ("BMP", noise_image(3, 32, 32), {}),
    ("WEBP", noise_image(4, 64, 64), {}),
    ("TIFF", noise_image(4, 64, 64), {}),
])
def test_answers_equal_those_of_the_command_line(name, image, options, server, tmp_path,
                                                 monkeypatch):
    body = file_bytes(image, name, **options)
    picture, found = tmp_path / f"picture.{name.lower()}", tmp_path / "found.json"
    picture.write_bytes(body)
    save_weights(tmp_path)
    assert call_main(predict, monkeypatch, picture, "--data", tmp_path, "--json", found,
                     "--threshold", THRESHOLD)[0] == 0
    wanted, = json.loads(found.read_text(encoding="utf-8"))
    status, _, answer = request(server, body=body)
    answer = json.loads(answer)
    assert status == 200 and list(answer) == ["image", "keypoints"]
    assert answer["keypoints"] == wanted["keypoints"]
    # What is found beside a picture of one pixel does not count.
    assert wanted["keypoints"] or image.size == (1, 1)


def test_the_threshold_of_one_request(server):
    for threshold, count in ((0, 2), (1, 0)):
        body = request(server, path=f"/predict?threshold={threshold}", body=PICTURE)[2]
        assert len(json.loads(body)["keypoints"]) == count


# ---------------------------------------------------------------- refusals, mistakes

@pytest.mark.parametrize("arguments, status, words", [
    (dict(method="GET", path="/nowhere"), 404, "POST /predict"),
    (dict(method="GET"), 404, "POST /predict"),
    (dict(method="GET", path="/../../../../etc/passwd"), 404, "POST /predict"),
    (dict(method="GET", path="/sample/..%2f..%2fweights.pt"), 404, "POST /predict"),
    (dict(method="GET", path="/05_predict.py"), 404, "POST /predict"),
    (dict(method="GET", path="/sample/1"), 404, "POST /predict"),
    (dict(path="/upload", body=PICTURE), 404, "POST /predict"),
    (dict(path="/predict?threshold=high", body=PICTURE), 400, "threshold must be 0 to 1"),
    (dict(path="/predict?threshold=1.1", body=PICTURE), 400, "threshold must be 0 to 1"),
    (dict(path="/predict?threshold=nan", body=PICTURE), 400, "threshold must be 0 to 1"),
    (dict(body=b""), 400, "Content-Length"),
    (dict(body=PICTURE, length=None), 400, "Content-Length"),
    (dict(body=b"x" * (predict.MAX_BODY + 1)), 413, "12,000,001 bytes are more than"),
    (dict(body=file_bytes(Image.new("1", (5000, 4000)), "PNG")), 415, "5000 x 4000 px is more"),
    (dict(body=b"this is no picture"), 415, "not a readable picture"),
    (dict(body=file_bytes(noise_image(0), "GIF")), 415, "not a readable picture"),
    (dict(body=PICTURE[:len(PICTURE) // 2]), 415, "not a readable picture"),
    (dict(head="Content-Type: multipart/form-data; boundary=x\r\n",
          body=b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n" + PICTURE), 415,
     "curl --data-binary"),
])
def test_a_bad_request_gets_a_sentence(arguments, status, words, server):
    server.said_list.clear()
    check_refusal(request(server, **arguments), status, words)
    assert not any("mistake" in line for line in server.said_list)  # a refusal, not an accident


def test_the_size_is_looked_at_before_a_pixel_is_decoded(server, monkeypatch):
    body = file_bytes(Image.new("1", (5000, 4000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda image: 1 / 0)
    check_refusal(request(server, body=body), 415, "5000 x 4000 px")


def test_a_mistake_of_ours_is_told_to_one_client_only(server, monkeypatch):
    server.said_list.clear()
    monkeypatch.setattr(model, "find_keypoints", lambda *arguments: 1 / 0)
    check_refusal(request(server, body=PICTURE), 500, "mistake of the service")
    monkeypatch.undo()
    for _ in range(100):  # the answer comes first, then the line in the terminal
        if any("ZeroDivisionError" in line for line in server.said_list):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(server.said_list)
    assert request(server, body=PICTURE)[0] == 200


def test_no_more_pictures_are_at_work_than_memory_allows(server, monkeypatch):
    at_work, most, lock = 0, 0, threading.Lock()

    def look(*arguments):
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.1)
        with lock:
            at_work -= 1
        return []
    monkeypatch.setattr(model, "find_keypoints", look)
    thread_list = [threading.Thread(target=request, args=[server], kwargs={"body": PICTURE})
                   for _ in range(8)]
    for thread in thread_list:
        thread.start()
    for thread in thread_list:
        thread.join(timeout=10)
    assert most == predict.MOST_AT_WORK and at_work == 0


def test_a_silent_client_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(predict.Handler, "timeout", 0.3)
    head = b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc"
    for raw in (b"", b"POST /pre", head):
        with socket.create_connection(server.server_address, timeout=5) as connection:
            connection.sendall(raw)
            assert request(server, body=PICTURE)[0] == 200  # nobody waits for it
            assert connection.recv(1000) == b""


def test_a_taken_port_gets_a_sentence(server, tmp_path, monkeypatch):
    save_weights(tmp_path)
    address = f"127.0.0.1:{server.server_port}"
    assert address in sentence_of(predict, monkeypatch, "--data", tmp_path, "--serve", address)


# ---------------------------------------------------------------- the end

def start_process(data_folder, code=None):
    """The service as a user starts it, or `code` that ends in main(); returns process and port."""
    start = [str(REPOSITORY / "05_predict.py")] if code is None else ["-c", code]
    process = subprocess.Popen(
        [sys.executable, *start, "--data", str(data_folder), "--serve", "127.0.0.1:0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        cwd=REPOSITORY, env=ENVIRONMENT)
    assert "weights.pt" in process.stdout.readline()
    port = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1]
    return process, int(port)


SLOW = """
import importlib, time, common
predict, model = importlib.import_module("05_predict"), importlib.import_module("02_model")
look = model.find_keypoints
def slow(*arguments):
    print("looking", flush=True)
    time.sleep(1)
    return look(*arguments)
model.find_keypoints = slow
common.run_main(predict.main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_0_after_it_has_answered_who_is_being_served(number, tmp_path):
    save_weights(tmp_path)
    process, port = start_process(tmp_path, SLOW)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            head = f"POST /predict HTTP/1.1\r\nContent-Length: {len(PICTURE)}\r\n\r\n"
            connection.sendall(head.encode() + PICTURE)
            assert process.stdout.readline() == "looking\n"
            process.send_signal(number)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        output, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert b" 200 OK" in answer and b'"keypoints"' in answer
    assert process.returncode == 0 and output.endswith("stopped\n"), log
    assert '"POST /predict HTTP/1.1" 200' in log and "Traceback" not in log


# ---------------------------------------------------------------- the page in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")


def page_after_sample(server, profile_folder, expected: str) -> str:
    """The page's HTML after the link to #sample was opened and its script has run.

    The browser's clock jumps while it waits, so on a busy machine it may hand the page over too
    early: then it is asked again.
    """
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
               "--no-first-run", "--disable-background-networking", "--disable-component-update",
               "--disable-sync", f"--user-data-dir={profile_folder}",
               "--virtual-time-budget=10000", "--dump-dom",
               f"http://127.0.0.1:{server.server_port}/#sample"]
    for _ in range(5):
        page = subprocess.run(command, capture_output=True, text=True, encoding="utf-8",
                              timeout=180).stdout
        if re.search(expected, page):
            break
    return page


@needs_chromium
def test_the_page_shows_keypoints_scores_and_time(server, tmp_path):
    status = r'role="status"[^>]*>sample 1, 96 × 160 px: \d+ ms'
    page = page_after_sample(server, tmp_path, status)
    assert "Looks for keyPoint_1, keyPoint_2 in a picture" in page
    assert re.search(status, page)
    body = request(server, path="/predict?threshold=0.05", body=PICTURE)[2]
    keypoint_list = json.loads(body)["keypoints"]
    item_list = re.findall(r"<li .*?</li>", page, re.DOTALL)
    assert len(item_list) == len(keypoint_list) == 2
    for keypoint in keypoint_list:
        text = f"{keypoint['class']}  {keypoint['score']:.3f}"
        assert sum(text in item for item in item_list) == 1
    assert page.count('<path d="M') == 4  # each box twice, dark below bright


@needs_chromium
def test_the_page_shows_errors_in_words(tmp_path):
    save_weights(tmp_path)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "broken.jpg").write_bytes(PICTURE[:300])
    broken = start_server(tmp_path, tmp_path / "sample")
    status = r'(?i)role="status"[^>]*class="bad"[^>]*>[^<]*(no|readable) picture'
    try:
        page = page_after_sample(broken, tmp_path / "profile", status)
    finally:
        broken.shutdown()
        broken.server_close()
    assert re.search(status, page)
    assert '<main id="result" hidden' in page
