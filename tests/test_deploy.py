"""deploy/ as a user takes it: the Dockerfile's and the README's own lines are done, and asked."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ENVIRONMENT, REPOSITORY, load, noise_image, run_script, save_weights

NEEDED = ("onnx", "onnxscript", "onnxruntime", "fastapi", "uvicorn", "python_multipart")
if missing := [name for name in NEEDED if not find_spec(name)]:
    pytest.skip(f"no {missing}: pip install -r tests/requirements.txt", allow_module_level=True)
sys.path.insert(0, str(REPOSITORY / "deploy"))
serve, model, common = map(load, ("serve", "02_model", "common"))

DOCKERFILE, README, PAGE = ((REPOSITORY / "deploy" / name).read_text(encoding="utf-8")
                            for name in ("Dockerfile", "README.md", "page.html"))
SAMPLES = sorted((REPOSITORY / "data" / "sample").glob("*.jpg"))


def lines_of(word):
    """What follows a word at the beginning of a line of the Dockerfile."""
    return re.findall(rf"^{word} +(.*)$", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)


def arguments_of(word):
    """What follows "python" in the Dockerfile's command, or in that of its health check."""
    line, = lines_of(word)
    return json.loads(line[line.index("["):])[1:]


def run(command, folder=REPOSITORY):
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, timeout=900, capture_output=True,
                          encoding="utf-8")


def file_bytes(image, name="JPEG"):
    image.save(buffer := io.BytesIO(), name)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def context(tmp_path_factory):
    """A copy of the repository in which the README's export command was typed."""
    folder = tmp_path_factory.mktemp("context") / "keypoints"
    ignored = shutil.ignore_patterns(".*", "*.npy", "*.onnx", "images", "weights.pt", "venv")
    shutil.copytree(REPOSITORY, folder, ignore=ignored)
    assert "\npython deploy/export_onnx.py\n" in README
    result = run([sys.executable, "deploy/export_onnx.py"], folder)
    assert not result.returncode and not result.stderr, result.stderr
    assert [path.name for path in folder.glob("data/*.onnx*")] == ["keypoints.onnx"]  # one file
    assert 0.8e6 < (folder / "data/keypoints.onnx").stat().st_size < 1.2e6
    return folder


@pytest.fixture(scope="session")
def container(context, tmp_path_factory):
    """The image, but no Docker: what COPY names, what RUN installs; its folder and Python."""
    folder = tmp_path_factory.mktemp("image")
    ignored_list = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for *source_list, target in map(str.split, lines_of("COPY")):
        (folder / target).mkdir(parents=True, exist_ok=True)  # targets are folders
        for source in source_list:
            assert "*" in ignored_list and f"!{source.rstrip('/')}" in ignored_list, source
            if source.endswith("/"):
                shutil.copytree(context / source, folder / target, dirs_exist_ok=True)
            else:
                shutil.copy(context / source, folder / target)
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install, = (line for line in lines_of("RUN") if line.startswith("pip"))
    result = run([python, "-m", *install.split()], folder)
    assert result.returncode == 0, result.stderr
    return folder, python


class Service:
    """The Dockerfile's command in a process of its own, and what a client does with it."""

    def __init__(self, container, log="log.txt"):
        folder, python = container
        self.log = folder / log
        command = [python, *arguments_of("CMD"), "--host", "127.0.0.1", "--port", "0"]
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(command, cwd=folder, stderr=file, stdout=file,
                                            env=ENVIRONMENT)
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read_text())):
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
        return answer.status, json.loads(answer.content)

    def slow_client(self):
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n.")
        return connection


@pytest.fixture(scope="session")
def service(container):
    service = Service(container)
    yield service
    service.process.terminate()
    service.process.wait(timeout=60)
    assert "Traceback" not in service.log.read_text()


def test_container_health_page_and_samples(container, service):
    folder, python = container
    file_list = [path for path in (folder / "venv").rglob("*") if path.is_file()]
    assert not {"torch", "matplotlib"} & {path.parent.name for path in file_list}
    assert sum(path.stat().st_size for path in file_list) < 225e6  # beside 125 MB of Python
    assert lines_of("USER")[-1] != "root" and lines_of("EXPOSE") == ["8000"]
    health = json.loads(service.ask().content)
    assert health["status"] == "ok" and health["max_bytes"] == 12_000_000
    assert health["classes"] == ["keyPoint_1", "keyPoint_2"]
    assert sorted(health["samples"]) == [file.name for file in SAMPLES]
    assert service.ask("GET", f"/sample/{SAMPLES[0].name}").content == SAMPLES[0].read_bytes()
    assert service.ask("GET", "/?from=here").content == PAGE.encode()
    for line in ("HEAD / 200", "HEAD /health 200", "GET /docs 200", "OPTIONS / 405",
                 "GET /predict 405", "GET /sample/..%2f..%2fcommon.py 404"):
        method, path, status = line.split()
        answer = service.ask(method, path)
        assert answer.status == int(status)
        assert status == "200" or json.loads(answer.content)["error"]
    *check, code = arguments_of("HEALTHCHECK")
    code = code.replace(":8000/", f":{service.address[1]}/")
    assert run([python, *check, code]).returncode == 0


def assert_same(found_list, wanted_list):
    assert [found["class"] for found in found_list] == [wanted["class"] for wanted in wanted_list]
    for found, wanted in zip(found_list, wanted_list):
        place_list, wanted_place_list = ([k["x"], k["y"], *k["box"]] for k in (found, wanted))
        # 0.001 px, and half of the last digit.
        assert np.allclose(place_list, wanted_place_list, rtol=0, atol=0.0015)
        assert place_list == np.round(place_list, 3).tolist() and list(found) == list(wanted)
        assert abs(found["score"] - wanted["score"]) < 1e-4


def test_answers_are_those_of_05(context, service, drawn, tmp_path):
    file_list = [*SAMPLES, *sorted((drawn / "images").glob("*.jpg"))]
    found = tmp_path / "found.json"
    result = run([sys.executable, "05_predict.py", *file_list, "--json", found], context)
    assert result.returncode == 0, result.stderr
    wanted_list = json.loads(found.read_text(encoding="utf-8"))
    for file, wanted in zip(file_list, wanted_list, strict=True):
        _, answer = service.predict(file.read_bytes())
        assert list(answer) == list(wanted) == ["image", "keypoints"]
        assert_same(answer["keypoints"], wanted["keypoints"])
    assert sum(len(wanted["keypoints"]) for wanted in wanted_list) > 5


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


SMALL = file_bytes(noise_image(0, 160, 96))
NONE_LIST = [b"", b"this is no image", SMALL[:len(SMALL) // 2], bytes(12_000_000),
             b"\x1f\x8b" + SMALL, file_bytes(noise_image(0), "GIF")]


@pytest.mark.parametrize("body, query, head, status, words", [
    *((body, "", {}, 415, "the picture: not a readable picture") for body in NONE_LIST),
    (bytes(36_000_000), "", {}, 413, "more than 12,000,000 bytes"),
    (iter([bytes(1_000_000)] * 40), "", {}, 413, "more than 12,000,000 bytes"),  # chunks
    (file_bytes(Image.new("1", (20000, 20000)), "PNG"), "", {}, 415, "20000 x 20000"),  # a bomb
    (file_bytes(Image.new("I;16", (64, 64)), "PNG"), "", {}, 415, "8 bits"),
    (SMALL, "", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
    (SMALL, "?conf=0.9", {}, 400, "conf: no such parameter"),
    (SMALL, "?threshold=1.1", {}, 400, "threshold: "),
    (SMALL, "?threshold=nan", {}, 400, "threshold: ")], ids=range(14))
def test_a_bad_request_gets_a_sentence(body, query, head, status, words, service):
    got_status, answer = service.predict(body, query, head)
    assert got_status == status and words in answer["error"] and "\n" not in answer["error"]


def test_200_clients_at_once(service):
    body_list = [file.read_bytes() for file in SAMPLES]
    wanted_list = [service.predict(body) for body in body_list]
    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(service.predict, body_list * 34)) == wanted_list * 34
    if (status := Path(f"/proc/{service.process.pid}/status")).exists():
        assert int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) < 1e6


def test_slow_clients_are_cut_off_and_too_many_are_sent_away(service):
    slow_list = [service.slow_client() for _ in range(20)]
    assert all(service.predict(SMALL)[0] == 200 for _ in range(20))  # the others notice nothing
    more_list = [service.slow_client() for _ in range(180 + (os.cpu_count() or 1))]
    time.sleep(1)
    answer = service.ask("POST", "/predict", SMALL)
    assert answer.status == 503 and answer.headers["Retry-After"] and b"waiting" in answer.content
    assert service.ask().status == 200  # busy, not dead
    for connection in more_list:
        connection.close()
    for _ in range(25):
        time.sleep(1)  # a byte a second
        for connection in slow_list:
            connection.sendall(b".")
    assert service.predict(SMALL)[0] == 200
    for connection in slow_list:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # it comes to an end
        assert answer.startswith(b"HTTP/1.1 408") and b"too late" in answer


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_within_5_s_while_clients_are_sending(number, container):
    service = Service(container, f"end{number}.txt")
    slow_list = [service.slow_client() for _ in range(20)]
    assert service.predict(SMALL)[0] == 200
    service.process.send_signal(number)
    service.process.wait(timeout=5)
    for connection in slow_list:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert "Traceback" not in service.log.read_text()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_the_page_shows_keypoints_and_fetches_nothing_from_elsewhere(service, tmp_path):
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|url\(|@import", PAGE)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", f"--user-data-dir={tmp_path}", "--dump-dom",
               "--virtual-time-budget=10000", f"http://127.0.0.1:{service.address[1]}/#sample"]
    for _ in range(15):  # the browser's clock jumps: on a busy machine it may be too early
        page = run(command).stdout
        if f"sample {SAMPLES[0].name}, 320" in page and re.search(r"px: \d+ ms", page):
            break
    assert re.search(r"px: \d+ ms", page) and "Looks for keyPoint_1, keyPoint_2 in a" in page
    for found in service.predict(SAMPLES[0].read_bytes())[1]["keypoints"]:
        assert f"{found['class']}  {found['score']:.3f}</b>" in page
        assert f"x {found['x']:.2f}, y {found['y']:.2f} px" in page


BODY_LIST = [
    file_bytes(noise_image(2, 97, 50), "PNG"), file_bytes(noise_image(3, 1, 1), "PNG"),
    file_bytes(noise_image(5).convert("CMYK"), "TIFF"), file_bytes(noise_image(6, 1920, 320))]


@pytest.mark.parametrize("max_per_class, scale", [(1, 1.0), (3, 1.0), (1, 0.5)])
def test_export_of_both_ways_to_decode_and_scale(max_per_class, scale, tmp_path):
    save_weights(tmp_path, max_per_class=max_per_class)
    weights_dict = torch.load(tmp_path / "weights.pt", weights_only=True)
    torch.save({**weights_dict, "scale": scale}, tmp_path / "weights.pt")
    result = run_script("deploy/export_onnx.py", "--data", tmp_path)
    assert result.returncode == 0, result.stderr
    session, served_dict = serve.load_model(tmp_path / "keypoints.onnx")
    network, about_dict = model.load_weights(tmp_path)
    assert served_dict.pop("compared_on") and served_dict == {**about_dict, "checksum_list": []}
    for body in BODY_LIST:  # untrained: each has keypoints, but for the padding
        image_3d_array = common.read_image(io.BytesIO(body))
        wanted_list, _ = load("05_predict").find_in_image(network, about_dict, image_3d_array, 0.01)
        assert_same(serve.find_keypoints(session, served_dict, io.BytesIO(body), 0.01), wanted_list)
    assert wanted_list


def test_no_other_answers_are_exported_and_no_other_file_is_served(tmp_path):
    save_weights(tmp_path)
    code = f"""
import copy, sys; sys.argv[1:], sys.path[:0] = ["--data", {str(tmp_path)!r}], [".", "deploy"]
import common, export_onnx
fold = export_onnx.model.fold_batch_norm
export_onnx.model.fold_batch_norm = lambda network: fold(copy.deepcopy(network).half().float())
common.run_main(export_onnx.main)"""
    result = run([sys.executable, "-c", code])
    assert result.returncode == 1 and "other places than PyTorch" in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    for name, words in (("none.onnx", "No such file"), ("weights.pt", "not what export_onnx.py")):
        result = run_script("deploy/serve.py", "--model", tmp_path / name)
        assert result.returncode == 1 and words in result.stderr and "--data" in result.stderr


def block_with(word):
    """The README's piece of Python that holds a word."""
    return next(block for block in re.findall(r"(?ms)^```python\n(.*?)^```$", README)
                if word in block)


def test_15_lines_without_pytorch_find_what_the_service_finds(context, container, service):
    block = block_with("InferenceSession")
    assert len(block.splitlines()) <= 15 and not re.search("torch|common|serve", block)
    text = run([container[1], "-c", block], context).stdout
    image = context / re.search(r'"(data/sample/.*?)"', block)[1]
    wanted_list = service.predict(image.read_bytes())[1]["keypoints"]
    for line, wanted in zip(text.splitlines(), wanted_list, strict=True):
        name, x, y, score = line.split()
        assert name == wanted["class"] and abs(float(x) - wanted["x"]) < 0.0015


@pytest.mark.skipif(not find_spec("ray"), reason="needs pip install 'ray[data]'")
def test_20_lines_of_ray_find_what_the_service_finds(context, service):
    block = block_with("ray.data")
    assert len(block.splitlines()) <= 20 and "concurrency=2" in block
    shutil.copytree(context / "data/sample", context / "images")
    (context / "images" / "broken.jpg").write_bytes(SMALL[:500])
    assert run([sys.executable, "-c", block], context).returncode == 0
    text = "".join(file.read_text() for file in (context / "answers").glob("*.json"))
    row_dict = {Path(row["image"]).name: row for row in map(json.loads, text.splitlines())}
    assert "readable" in row_dict["broken.jpg"]["error"] and len(row_dict) == len(SAMPLES) + 1
    for file in SAMPLES:
        wanted_list = service.predict(file.read_bytes())[1]["keypoints"]
        assert_same(row_dict[file.name]["keypoints"], wanted_list)


def test_the_image_is_built_and_runs(context):
    tool = next(filter(shutil.which, ("docker", "podman")), None)
    if not tool or run([tool, "pull", "python:3.11-slim"]).returncode:
        pytest.skip("no docker or podman that reaches python:3.11-slim")
    shutil.copy(REPOSITORY / ".dockerignore", context)
    result = run([tool, "build", "-f", "deploy/Dockerfile", "-t", "keypoints-test", "."], context)
    assert result.returncode == 0, result.stderr
    command = ["python", "deploy/serve.py", "--help"]
    assert run([tool, "run", "--rm", "--read-only", "keypoints-test", *command]).returncode == 0
