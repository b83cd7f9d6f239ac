"""deploy/ as a user takes it: export, container, requests, the page, the README's pieces of code.

The Dockerfile is parsed, its lines are done in an empty folder and a fresh virtual environment.
All servers listen on 127.0.0.1 and are ended by their own process id.
"""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ENVIRONMENT, REPOSITORY, call_main, load, noise_image, run_script, save_weights

for name in ("onnx", "onnxscript", "onnxruntime", "fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(name, reason=f"deploy/ needs {name}: pip install -r tests/requirements.txt")
sys.path.insert(0, str(REPOSITORY / "deploy"))
serve, export, model, common = map(load, ("serve", "export_onnx", "02_model", "common"))

DOCKERFILE = (REPOSITORY / "deploy" / "Dockerfile").read_text(encoding="utf-8")
README = (REPOSITORY / "deploy" / "README.md").read_text(encoding="utf-8")
SAMPLES = sorted((REPOSITORY / "data" / "sample").glob("*.jpg"))


def lines_of(word):
    """What follows a word at the beginning of a line of the Dockerfile, as lists of words.

    >>> lines_of("EXPOSE")
    [['8000']]
    """
    text = DOCKERFILE.replace("\\\n", " ")
    return [shlex.split(rest) for rest in re.findall(rf"^{word} +(.*)$", text, re.MULTILINE)]


def command_of(word):
    """The Dockerfile's command, or that of its health check, without "python"."""
    line, = re.findall(rf"^{word}\b.*?(\[.*\])$", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)
    python, *rest = json.loads(line)
    assert python == "python"
    return rest


def file_bytes(image, name="JPEG", **options):
    image.save(buffer := io.BytesIO(), name, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- what a user does

@pytest.fixture(scope="session")
def context(tmp_path_factory):
    """A copy of the repository in which the README's export command was typed."""
    folder = tmp_path_factory.mktemp("context") / "keypoints"
    for name in ("deploy", "data/sample"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for file in (*REPOSITORY.glob("*.py"), REPOSITORY / "data/pretrained.pt"):
        shutil.copy(file, folder / file.relative_to(REPOSITORY))
    assert "\npython deploy/export_onnx.py\n" in README
    result = subprocess.run([sys.executable, "deploy/export_onnx.py"], cwd=folder, env=ENVIRONMENT,
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "images are as PyTorch's" in result.stdout
    assert [path.name for path in folder.glob("data/*.onnx*")] == ["keypoints.onnx"]  # one file
    assert 0.8e6 < (folder / "data/keypoints.onnx").stat().st_size < 1.2e6
    return folder


@pytest.fixture(scope="session")
def container(context, tmp_path_factory):
    """The image, but no Docker: what COPY names, what RUN installs; its folder and Python."""
    folder = tmp_path_factory.mktemp("image")
    ignored_list = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for *source_list, target in lines_of("COPY"):
        for source in source_list:
            assert "*" in ignored_list and f"!{source.rstrip('/')}" in ignored_list, source
            into = folder / target
            into.mkdir(parents=True, exist_ok=True)  # targets are folders
            if source.endswith("/"):
                shutil.copytree(context / source, into, dirs_exist_ok=True)
            else:
                shutil.copy(context / source, into)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install, = (words for words in lines_of("RUN") if words[0] == "pip")
    result = subprocess.run([python, "-m", *install], cwd=folder, capture_output=True, text=True,
                            timeout=900)
    if re.search("Failed to establish|Temporary failure|timed out", result.stderr):
        pytest.skip("pip reaches no package index")
    assert result.returncode == 0, result.stderr
    return folder, python


class Service:
    """The Dockerfile's command in a process of its own, and what a client does with it."""

    def __init__(self, container, log="log.txt", *arguments):
        folder, python = container
        self.log = folder / log
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                [python, *command_of("CMD"), "--host", "127.0.0.1", "--port", "0", *arguments],
                cwd=folder, stdout=file, stderr=file, env=ENVIRONMENT)
        for _ in range(600):
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read_text()):
                break
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.address = "127.0.0.1", int(found[1])

    def ask(self, method="GET", path="/health", body=None, head={}):
        connection = HTTPConnection(*self.address, timeout=120)
        connection.request(method, path, body, head)
        answer = connection.getresponse()
        answer.content = answer.read()
        connection.close()
        return answer

    def predict(self, body, query="", head={}):
        answer = self.ask("POST", f"/predict{query}", body, head)
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(answer.content)

    def slow_client(self):
        """A client that promises a thousand bytes and sends one."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n.")
        return connection

    def end(self, number):
        """Seconds until the process has ended."""
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=60)
        return time.monotonic() - start


@pytest.fixture(scope="session")
def service(container):
    service = Service(container)
    yield service
    service.end(signal.SIGTERM)
    assert "Traceback" not in service.log.read_text()


# ---------------------------------------------------------------- good requests

def test_the_container_is_small_has_no_pytorch_and_runs_as_nobody(container):
    folder, python = container
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('torch', 'matplotlib')])"
    assert subprocess.check_output([python, "-c", code], text=True).strip() == "[None, None]"
    size = sum(path.stat().st_size for path in (folder / "venv").rglob("*") if path.is_file())
    assert size < 225e6  # beside the 125 MB of python:3.11-slim; 350 are the most
    assert lines_of("USER")[-1] not in ([], ["root"]) and lines_of("EXPOSE") == [["8000"]]


def test_health_page_and_samples(service, container):
    answer = service.ask()
    health = json.loads(answer.content)
    assert (answer.status, health["status"]) == (200, "ok") and health["max_bytes"] == 12_000_000
    assert health["classes"] == ["keyPoint_1", "keyPoint_2"]
    assert sorted(health["samples"]) == [file.name for file in SAMPLES]
    for file in SAMPLES:
        assert service.ask(path=f"/sample/{file.name}").content == file.read_bytes()
    page = (REPOSITORY / "deploy" / "page.html").read_bytes()
    assert service.ask(path="/?from=here").content == page
    for path in ("/", "/health"):
        assert service.ask("HEAD", path).status == 200 == service.ask("GET", path).status
    assert service.ask(path="/docs").status == 200 == service.ask(path="/openapi.json").status
    *check, code = command_of("HEALTHCHECK")
    code = code.replace(":8000/", f":{service.address[1]}/")
    subprocess.run([container[1], *check, code], check=True, timeout=60)


def assert_same(found_list, wanted_list):
    assert [found["class"] for found in found_list] == [wanted["class"] for wanted in wanted_list]
    for found, wanted in zip(found_list, wanted_list):
        assert list(found) == ["class", "x", "y", "score", "box"]
        for a, b in zip((found["x"], found["y"], *found["box"]),
                        (wanted["x"], wanted["y"], *wanted["box"])):
            assert abs(a - b) < 0.0015 and a == round(a, 3)  # 0.001, and half of the last digit
        assert abs(found["score"] - wanted["score"]) < 1e-4


def test_answers_are_those_of_05(service, drawn, tmp_path):
    file_list = [*SAMPLES, *sorted((drawn / "images").glob("*.jpg"))]
    result = run_script("05_predict.py", *file_list, "--json", tmp_path / "found.json")
    assert result.returncode == 0, result.stderr
    wanted_list = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    for file, wanted in zip(file_list, wanted_list, strict=True):
        status, answer = service.predict(file.read_bytes())
        assert status == 200 and list(answer) == list(wanted) == ["image", "keypoints"]
        assert answer["image"] == "upload"
        assert_same(answer["keypoints"], wanted["keypoints"])
    assert sum(len(wanted["keypoints"]) for wanted in wanted_list) > 5


TURNED = Image.Exif()
TURNED[0x112] = 6


@pytest.mark.parametrize("name, image, options", [
    ("JPEG", noise_image(1, 160, 96), {"exif": TURNED}),
    ("JPEG", noise_image(5, 96, 64).convert("CMYK"), {}),
    ("PNG", noise_image(2, 97, 50), {}),
    ("PNG", noise_image(6, 1, 1), {}),
    ("PNG", noise_image(7, 96, 64).convert("LA"), {}),
    ("BMP", noise_image(3, 32, 32), {}),
    ("WEBP", noise_image(4, 64, 64), {}),
    ("TIFF", noise_image(4, 64, 64), {}),
])
def test_images_of_all_kinds_are_read_as_by_05(name, image, options, service):
    """With threshold 0 the best cell of each class answers, unless it lies in the padding."""
    body = file_bytes(image, name, **options)
    network, about_dict = model.load_weights(common.DATA_FOLDER)
    image_3d_array = common.read_image(io.BytesIO(body))
    wanted_list, _ = model.find_keypoints(network, about_dict, image_3d_array, 0)
    status, answer = service.predict(body, "?threshold=0")
    assert status == 200
    assert_same(answer["keypoints"], wanted_list)


def test_a_form_and_chunks_are_taken(service):
    body = SAMPLES[-1].read_bytes()
    assert service.predict(iter([body[:500], body[500:]])) == service.predict(body)
    part = b'--b\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\n%b\r\n' % body
    text = b'--b\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n0.3\r\n'
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    assert service.predict(part + b"--b--\r\n", "", head) == service.predict(body)
    for parts in (text, part + text, part + part, b""):
        status, answer = service.predict(parts + b"--b--\r\n", "", head)
        assert (status, answer) == (400, {"error": "a form must hold one file and nothing else"})


# ---------------------------------------------------------------- refusals

SMALL = file_bytes(noise_image(0, 160, 96))


@pytest.mark.parametrize("body, query, head, status, words", [
    (b"", "", {}, 415, "not a readable"),
    (b"this is no image", "", {}, 415, "not a readable"),
    (file_bytes(noise_image(0), "GIF"), "", {}, 415, "not a readable"),
    (SMALL[:len(SMALL) // 2], "", {}, 415, "not a readable"),
    (bytes(12_000_000), "", {}, 415, "not a readable"),
    (bytes(36_000_000), "", {}, 413, "more than 12,000,000 bytes"),
    ([bytes(1_000_000)] * 40, "", {}, 413, "more than 12,000,000 bytes"),  # chunked, no length
    (file_bytes(Image.new("1", (20000, 20000)), "PNG"), "", {}, 415, "20000 x 20000"),  # a bomb
    (file_bytes(Image.new("I;16", (64, 64)), "PNG"), "", {}, 415, "8 bits"),
    (b"\x1f\x8b" + SMALL, "", {"Content-Encoding": "gzip"}, 415, "not a readable"),
    (SMALL, "", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
    (SMALL, "?conf=0.9", {}, 400, "conf: no such parameter"),
    (SMALL, "?threshold=0.5&Threshold=0.9", {}, 400, "Threshold: no such parameter"),
    (SMALL, "?threshold=1.1", {}, 400, "threshold: "),
    (SMALL, "?threshold=nan", {}, 400, "threshold: "),
    (SMALL, "?threshold=", {}, 400, "threshold: "),
])
def test_a_bad_request_gets_a_sentence(body, query, head, status, words, service):
    body = iter(body) if isinstance(body, list) else body
    got_status, answer = service.predict(body, query, head)
    assert got_status == status and words in answer["error"], answer
    assert len(answer["error"]) < 200 and "\n" not in answer["error"]
    assert not re.search(r"/(tmp|home|root|usr)/|\.py\b|<_io|0x[0-9a-f]{6}", answer["error"])


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/nowhere", 404), ("GET", "/sample/..%2f..%2fcommon.py", 404),
    ("GET", "/deploy/serve.py", 404), ("GET", "/predict", 405), ("OPTIONS", "/health", 405)])
def test_other_addresses_and_methods_are_refused_in_json(method, path, status, service):
    answer = service.ask(method, path)
    assert answer.status == status and json.loads(answer.content)["error"]


# ---------------------------------------------------------------- many clients, slow clients

def test_200_clients_at_once(service):
    body_list = [file.read_bytes() for file in SAMPLES]
    wanted_list = [service.predict(body) for body in body_list]
    with ThreadPoolExecutor(200) as pool:
        answer_list = list(pool.map(service.predict, (body_list * 200)[:200]))
    assert answer_list == (wanted_list * 200)[:200]
    if Path("/proc/self/status").exists():
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 1e6


def test_slow_clients_are_cut_off_and_too_many_are_sent_away(service):
    slow_list = [service.slow_client() for _ in range(20)]
    start_time = time.monotonic()
    assert all(service.predict(SMALL)[0] == 200 for _ in range(20))  # the others notice nothing
    more_list = [service.slow_client() for _ in range(180 + (os.cpu_count() or 1))]
    time.sleep(1)
    answer = service.ask("POST", "/predict", SMALL)
    assert answer.status == 503 and answer.headers["Retry-After"] and b"waiting" in answer.content
    assert service.ask().status == 200  # it is busy, not dead
    for connection in more_list:
        connection.close()
    time.sleep(1)
    assert service.predict(SMALL)[0] == 200
    while time.monotonic() - start_time < 27:
        time.sleep(1)  # a byte a second
        for connection in slow_list:
            connection.sendall(b".")
    for connection in slow_list:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # it comes to an end
        assert answer.startswith(b"HTTP/1.1 408") and b"too late" in answer
        connection.close()
    assert time.monotonic() - start_time < 45


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_within_5_s_while_clients_are_sending(number, container):
    service = Service(container, f"end{number}.txt")
    slow_list = [service.slow_client() for _ in range(20)]
    assert service.predict(SMALL)[0] == 200
    assert service.end(number) < 5
    for connection in slow_list:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        connection.close()
    assert "Traceback" not in service.log.read_text()


# ---------------------------------------------------------------- the page in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_the_page_shows_keypoints_and_fetches_nothing_from_elsewhere(service, tmp_path):
    source = (REPOSITORY / "deploy" / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|url\(|@import", source)
    health = json.loads(service.ask().content)
    sample = sorted(health["samples"])[0]
    for _ in range(5):  # the browser's clock jumps: on a busy machine it may be too early
        page = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={tmp_path}",
             "--virtual-time-budget=10000", "--dump-dom",
             f"http://127.0.0.1:{service.address[1]}/#sample"],
            capture_output=True, text=True, encoding="utf-8", timeout=180).stdout
        if shown := re.search(rf"sample {sample}, 320 × 1920 px: \d+ ms", page):
            break
    assert shown and "Looks for keyPoint_1, keyPoint_2 in a picture" in page
    body = (REPOSITORY / "data" / "sample" / sample).read_bytes()
    for found in service.predict(body)[1]["keypoints"]:
        assert f"{found['class']}  {found['score']:.3f}</b>" in page
        assert f"x {found['x']:.2f}, y {found['y']:.2f} px" in page


# ---------------------------------------------------------------- export

@pytest.mark.parametrize("max_per_class, scale", [(1, 1.0), (3, 1.0), (1, 0.5)])
def test_both_ways_of_decoding_and_scale(max_per_class, scale, tmp_path, monkeypatch):
    save_weights(tmp_path, max_per_class=max_per_class)
    weights_dict = torch.load(tmp_path / "weights.pt", weights_only=True)
    torch.save({**weights_dict, "scale": scale}, tmp_path / "weights.pt")
    assert call_main(export, monkeypatch, "--data", tmp_path) == (0, "")
    session, about_dict = serve.load_model(tmp_path / "keypoints.onnx")
    assert about_dict.items() >= {
        "category_list": ["background", "keyPoint_1", "keyPoint_2"], "box_size": [30, 30],
        "scale": scale, "max_per_class": max_per_class}.items()
    assert "00113.jpg" in about_dict["compared_on"]
    network, about_dict = model.load_weights(tmp_path)
    for height, width in ((160, 96), (97, 50), (1920, 320)):
        body = file_bytes(noise_image(height, height, width), "PNG")
        image_3d_array = common.read_image(io.BytesIO(body))
        wanted_list, _ = load("05_predict").find_in_image(network, about_dict, image_3d_array, 0.01)
        found_list = serve.find_keypoints(session, about_dict, io.BytesIO(body), 0.01)
        assert wanted_list
        assert_same(found_list, wanted_list)


def test_a_file_that_answers_otherwise_is_not_left(tmp_path, monkeypatch):
    save_weights(tmp_path)
    fold = model.fold_batch_norm

    def fold_badly(network):
        folded = fold(network)
        folded.head.bias.data[0] += 0.001  # half cells: 0.016 px
        return folded
    monkeypatch.setattr(model, "fold_batch_norm", fold_badly)
    code, sentence = call_main(export, monkeypatch, "--data", tmp_path)
    assert code == 1 and "other places than PyTorch" in sentence and "\n" not in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize("content, words", [(None, "No such file"), (b"no model", "not what")])
def test_a_model_that_is_none_gets_a_sentence(content, words, tmp_path, monkeypatch):
    if content:
        (tmp_path / "keypoints.onnx").write_bytes(content)
    code, sentence = call_main(serve, monkeypatch, "--model", tmp_path / "keypoints.onnx")
    assert code == 1 and words in sentence and "export_onnx.py --data" in sentence


# ---------------------------------------------------------------- the README

def block_with(word):
    """The README's piece of Python that holds a word."""
    block_list = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    block, = (block for block in block_list if word in block)
    return block


def test_15_lines_without_pytorch_find_what_the_service_finds(context, container, service):
    block = block_with("InferenceSession")
    assert len(block.splitlines()) <= 15 and not re.search("torch|common|serve", block)
    text = subprocess.check_output([container[1], "-c", block], cwd=context, text=True, timeout=60)
    found, = service.predict((context / "data/sample/00113.jpg").read_bytes())[1]["keypoints"]
    name, *number_list = text.split()
    assert name == found["class"]
    assert np.allclose(list(map(float, number_list)), [found[key] for key in ("x", "y", "score")])


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs pip install 'ray[data]'")
def test_20_lines_of_ray_find_what_the_service_finds(context, service):
    block = block_with("ray.data")
    assert len(block.splitlines()) <= 20 and '"images"' in block and "concurrency=2" in block
    shutil.copytree(context / "data/sample", context / "images")
    (context / "images" / "broken.jpg").write_bytes(SMALL[:500])
    subprocess.run([sys.executable, "-c", block], cwd=context, env=ENVIRONMENT, check=True,
                   timeout=300)
    row_list = [json.loads(line) for file in (context / "answers").glob("*.json")
                for line in file.read_text().splitlines()]
    found_dict = {Path(row["image"]).name: row for row in row_list}
    assert "readable" in found_dict.pop("broken.jpg")["error"]
    for file in SAMPLES:
        wanted_list = service.predict(file.read_bytes())[1]["keypoints"]
        assert_same(found_dict.pop(file.name)["keypoints"], wanted_list)
    assert not found_dict


def test_the_image_is_built_and_runs(context):
    at_work = (tool for tool in ("docker", "podman") if shutil.which(tool) and subprocess.run(
        [tool, "run", "--rm", "python:3.11-slim", "true"], capture_output=True).returncode == 0)
    if not (tool := next(at_work, None)):
        pytest.skip("no docker or podman that runs python:3.11-slim")
    shutil.copy(REPOSITORY / ".dockerignore", context)
    subprocess.run([tool, "build", "-f", "deploy/Dockerfile", "-t", "keypoints-test", "."],
                   cwd=context, check=True, timeout=1200)
    run = [tool, "run", "--rm", "-d", "--read-only", "--tmpfs", "/tmp", "keypoints-test"]
    name = subprocess.check_output(run, text=True).strip()
    try:
        time.sleep(10)
        check = [tool, "exec", name, "python", *command_of("HEALTHCHECK")]
        subprocess.run(check, check=True, timeout=60)
    finally:
        subprocess.run([tool, "stop", name], check=True, timeout=60)
