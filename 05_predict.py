"""Lesson 5: use it. Pictures in; drawn pictures, JSON and LabelImg XML out. Or a page and a network interface.

    python 05_predict.py                                # the pictures of data/sample
    python 05_predict.py photo.jpg my_folder            # your own: any mix of pictures and folders
    python 05_predict.py my_folder --xml --out round_2  # labels to correct in LabelImg, then to train on
    python 05_predict.py --serve                        # a page on http://127.0.0.1:8000 to drop a picture on

Reads   data/weights.pt (else data/pretrained.pt) and the pictures that you name; --serve reads docs/page.html, too.
Writes  a drawn PNG of each picture to data/results/predictions/ (or --out); FILE with --json FILE; with --xml a copy of
        each picture and its LabelImg XML to the folder labelimg/ in there.
Time    about 20 pictures a second on two CPU cores, most of it for writing PNG; the service, which writes none, does 70.
See     a line a picture with class, score and place; where nothing was found, the best score of each class.
Next    python 06_model_analysis.py shows where the network's parameters, memory and time go.

Model-assisted labelling: label 100 pictures, train, let --xml label the others, correct them in LabelImg, and give the
labelimg/ folder to 01_prepare_data.py --source. The XML keeps two decimals. LabelImg shows them, but once you save a picture
there its boxes are cut to whole pixels: 0.5 px up and left on average. A picture that needs no correction: do not save it.
"""

import argparse
import http.server
import importlib
import io
import json
import queue
import re
import shutil
import signal
import socket
import socketserver
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import (COLOUR_LIST, DATA_FOLDER, IMAGE_SUFFIXES, Progress, UserError, draw_keypoints, pick_device, read_image,
                    replacing, run_main, write_labelimg_xml)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

QUEUE_SIZE = 4  # decoded pictures that may wait for the network; of the usual size they hold 1.8 MB each
LONG_RUN = 20  # pictures; from here on a progress bar runs below the lines
PNG_LEVEL = 1  # of 9; level 6, the usual one, takes twice the time for three quarters of the bytes
PAGE_PATH = Path(__file__).resolve().parent / "docs" / "page.html"
MAX_BODY = 12_000_000  # bytes of a picture that the service accepts
MAX_SERVED_PIXELS = 16_000_000  # px; a telephone's 4000x3000 and more; the network needs about 30 bytes of memory a pixel
FORMAT_LIST = ["JPEG", "PNG", "BMP", "WEBP"]  # what the service decodes; Pillow knows 40 more, some of which start programs
REQUEST_SECONDS = 30  # from the first byte to the last of a request; a slower client is sent away
LINGER_SECONDS = 2  # how long a refused client may go on sending before the connection is cut
MOST_CLIENTS = 32  # at a time, a thread each; more have to wait. Each may hold MAX_BODY bytes: 0.4 GB together
STOP_SECONDS = 5  # for the requests that are being answered when the service is told to stop
MOST_AT_WORK = 2  # pictures at a time that are decoded and looked at: 1 GB together where they are of the largest size


# ---------------------------------------------------------------- one picture

def predict(network, about_dict: dict, image_3d_array: np.ndarray, threshold: float) -> list[dict]:
    """Keypoints of a picture (class, x, y, score, box). The command line and the service both ask here, so they agree."""
    height, width = image_3d_array.shape[:2]
    keypoint_list = []
    for keypoint in model.find_keypoints(network, about_dict, image_3d_array, threshold):
        xmin, ymin, xmax, ymax = keypoint["box"]
        # Right of the picture and below it lies padding, up to 31 px. A keypoint whose whole box lies out there is dropped;
        # one just outside stays, as a label that the edge cuts would.
        if xmin < width - 1 and ymin < height - 1 and xmax > 1 and ymax > 1:
            keypoint_list.append(keypoint)
    return keypoint_list


def best_scores(network, about_dict: dict, image_3d_array: np.ndarray) -> dict[str, float]:
    """The best score of each class, however low: where nothing was found it tells "nearly" from "not at all"."""
    best_dict = dict.fromkeys(about_dict["category_list"][1:], 0.0)
    for keypoint in model.find_keypoints(network, {**about_dict, "max_per_class": 1}, image_3d_array, threshold=0):
        best_dict[keypoint["class"]] = max(best_dict[keypoint["class"]], keypoint["score"])
    return best_dict


def in_words(keypoint_list: list[dict], best_dict: dict[str, float], threshold: float) -> str:
    """One picture's result in words. `best_dict` is needed where nothing was found.

    >>> in_words([], {"keyPoint_1": 0.31, "keyPoint_2": 0.0231}, 0.5)
    'nothing reaches 0.5; best: keyPoint_1 0.310, keyPoint_2 0.023'
    """
    if keypoint_list:
        return "  ".join(f"{k['class']} {k['score']:.3f} at ({k['x']:.2f}, {k['y']:.2f})" for k in keypoint_list)
    return f"nothing reaches {threshold:g}; best: " + ", ".join(f"{name} {score:.3f}" for name, score in best_dict.items())


# ---------------------------------------------------------------- many pictures

def collect_pictures(given_list: list[Path]) -> tuple[list[Path], list[str]]:
    """The pictures that the user named, those of folders in order of name; and a sentence for each folder without any."""
    path_list, problem_list = [], []
    for given in given_list:
        if not given.is_dir():
            path_list.append(given)
            continue
        inside_list = sorted(path for path in given.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
                             and path.is_file() and not path.name.startswith("."))
        path_list += inside_list
        if not inside_list:
            problem_list.append(f"{given}: holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}); name a folder that does")
    return list(dict.fromkeys(path_list)), problem_list  # a picture that was named twice is looked at once


def unused_name(stem: str, used_set: set[str]) -> str:
    """A name for what is written about a picture: a/1.jpg and b/1.jpg must not overwrite each other. Adds it to the set.

    >>> used_set = set()
    >>> [unused_name(stem, used_set) for stem in ("1", "2", "1", "1_2")]
    ['1', '2', '1_2', '1_2_2']
    """
    name = stem = "".join(letter if letter.isprintable() else "_" for letter in stem)
    number = 1
    while name.casefold() in used_set:  # Windows and macOS take A.png and a.png for the same file
        number += 1
        name = f"{stem}_{number}"
    used_set.add(name.casefold())
    return name


class Reader(threading.Thread):
    """Reads pictures in a thread of its own, while the network is busy with those before; a bounded queue in between.

    Decoding is C code that lets go of the interpreter's lock, and so is the network: two cores work at once. Iterating
    gives (path, picture) or, where a file is bad, (path, UserError), in order.
    """

    def __init__(self, path_list: list[Path]):
        super().__init__(daemon=True)  # daemon: if the program ends by an error, this thread does not keep it alive
        self.path_list = path_list
        self.queue = queue.Queue(maxsize=QUEUE_SIZE)  # put sleeps while it is full, so memory stays flat

    def run(self) -> None:
        """What the thread does. An error travels through the queue, or the loop would wait for ever for a dead thread."""
        try:
            for path in self.path_list:
                try:
                    self.queue.put((path, read_image(path)))
                except UserError as error:  # of this one picture; the others go on
                    self.queue.put((path, error))
            self.queue.put(None)  # the end
        except BaseException as error:
            self.queue.put(error)

    def __iter__(self):
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def write_label(folder: Path, name: str, path: Path, image_3d_array: np.ndarray, keypoint_list: list[dict]) -> None:
    """A copy of the picture and LabelImg's XML side by side, as 01_prepare_data.py --source reads them."""
    suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".png"
    with replacing(folder / f"{name}{suffix}") as temporary:
        if suffix == path.suffix:
            shutil.copyfile(path, temporary)
        else:  # a format that 01 does not look for
            Image.fromarray(image_3d_array).save(temporary)
    height, width = image_3d_array.shape[:2]
    write_labelimg_xml(folder / f"{name}.xml", f"{name}{suffix}", width, height, keypoint_list)


def predict_files(network, about_dict: dict, options) -> None:
    """The command line's job: a line and a drawn picture for each picture; JSON and XML if asked for."""
    folder = options.out or options.data / "results" / "predictions"
    label_folder = folder / "labelimg"
    if options.json and options.json.is_dir():
        raise UserError(f"{options.json}: is a folder; --json needs the name of a file")
    if options.xml and label_folder.is_dir() and any(label_folder.iterdir()):
        raise UserError(f"{label_folder}: holds labels already, perhaps corrected by hand; choose another place with --out")
    given_list = options.pictures or [options.data / "sample"]
    if not options.pictures and not given_list[0].is_dir():
        raise UserError(f"{given_list[0]}: no such folder; name a picture or a folder: python 05_predict.py my_folder")
    path_list, problem_list = collect_pictures(given_list)
    for problem in problem_list:
        print(f"bad: {problem}")

    if any(path.resolve().parent == folder.resolve() for path in path_list):
        raise UserError(f"{folder}: holds the pictures themselves, which would be drawn over; choose another place with --out")

    colour_dict = {name: COLOUR_LIST[index % len(COLOUR_LIST)] for index, name in enumerate(about_dict["category_list"][1:])}
    progress = Progress(len(path_list), "predicting") if len(path_list) >= LONG_RUN else None
    entry_list, used_set, keypoint_count = [], set(), 0
    reader = Reader(path_list)
    reader.start()
    start_time = time.perf_counter()
    for done, (path, item) in enumerate(reader, start=1):
        if isinstance(item, UserError):
            problem_list.append(str(item))
            line = f"bad: {item}"
        else:
            image_3d_array = item
            keypoint_list = predict(network, about_dict, image_3d_array, options.threshold)
            best_dict = {} if keypoint_list else best_scores(network, about_dict, image_3d_array)
            entry_list.append({"image": str(path), "keypoints": keypoint_list})
            keypoint_count += len(keypoint_list)
            height, width = image_3d_array.shape[:2]
            line = f"{path}  {width} x {height} px  {in_words(keypoint_list, best_dict, options.threshold)}"
            name = unused_name(path.stem, used_set)
            coloured_list = [{**keypoint, "colour": colour_dict[keypoint["class"]]} for keypoint in keypoint_list]
            with replacing(folder / f"{name}.png") as temporary:
                draw_keypoints(Image.fromarray(image_3d_array), coloured_list).save(temporary, compress_level=PNG_LEVEL)
            if options.xml:
                write_label(label_folder, name, path, image_3d_array, keypoint_list)
        if progress and progress.in_place:  # the line takes the place of the bar, and the bar moves one line down
            line = "\r" + line.ljust(shutil.get_terminal_size().columns - 1)
        print(line)
        if progress:
            progress.show(done)
    seconds = time.perf_counter() - start_time
    if options.json:
        with replacing(options.json) as temporary:
            text = json.dumps(entry_list, indent=1, ensure_ascii=False)
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file's name need not be proper Unicode
        print(f"wrote {options.json}")
    if entry_list:
        rate = len(entry_list) / seconds
        print(f"{len(entry_list)} pictures, {keypoint_count} keypoints, {seconds:.1f} s ({rate:.0f} a second); look at {folder}")
    if options.xml and entry_list:
        print(f"next: correct {label_folder} in LabelImg; then python 01_prepare_data.py --source {label_folder} --data NEW")
    if problem_list:
        raise UserError(f"{len(problem_list)} of what you named could not be read, see the lines that begin with bad: above")


# ---------------------------------------------------------------- the service

class Refusal(Exception):
    """A request that cannot be answered: HTTP status and one sentence that says what to do."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class TimedSocket(io.RawIOBase):
    """Reads from a socket until a deadline. A time-out of each read alone would let one byte every few seconds go on for ever."""

    def __init__(self, connection: socket.socket):
        self.connection, self.deadline = connection, time.monotonic() + REQUEST_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        try:
            return self.connection.recv_into(buffer)
        except TimeoutError:
            sentence = f"the request did not arrive whole within {REQUEST_SECONDS} s; send it faster or make it smaller"
            raise Refusal(408, sentence) from None


def decode_upload(body: bytes) -> np.ndarray:
    """The picture in a request's body, uint8 `[height, width, 3]`. Its header is looked at before a pixel is decoded."""
    try:
        with Image.open(io.BytesIO(body), formats=FORMAT_LIST) as image:
            width, height = image.size
        if width * height > MAX_SERVED_PIXELS:
            raise Refusal(413, f"{width} x {height} px is more than {MAX_SERVED_PIXELS:,} px; shrink the picture")
        return read_image(io.BytesIO(body))
    except UserError as error:
        raise Refusal(415, str(error)) from None
    except (OSError, ValueError, SyntaxError):
        raise Refusal(415, f"this is no readable picture; send {', '.join(FORMAT_LIST[:-1])} or {FORMAT_LIST[-1]}") from None


class Server(http.server.ThreadingHTTPServer):
    """A thread for each client, so that a slow one keeps nobody waiting; all use one network.

    Nothing is read from the disk once it runs: page and sample pictures are in memory, so no request can reach a file.
    """

    request_queue_size = 64  # connections that the system holds until accept() takes them

    def __init__(self, address: tuple[str, int], network, about_dict: dict, threshold: float, sample_folder: Path):
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        if not PAGE_PATH.is_file():
            raise UserError(f"{PAGE_PATH}: no such file; get it back from the repository")
        self.page = PAGE_PATH.read_bytes()
        self.network, self.about_dict, self.threshold = network, about_dict, threshold
        self.sample_list = [path.read_bytes() for path in collect_pictures([sample_folder])[0]] if sample_folder.is_dir() else []
        self.client_places = threading.BoundedSemaphore(MOST_CLIENTS)
        # A client's own thread would do, but PyTorch works a third longer in a new thread than in one that it knows.
        self.workers = ThreadPoolExecutor(MOST_AT_WORK)
        try:
            super().__init__(address, Handler)
        except OSError as error:
            raise UserError(f"{address[0]}:{address[1]}: cannot serve there ({error.strerror}); try --serve {address[0]}:0, "
                            "which takes any free port") from None

    def server_bind(self) -> None:
        """As in http.server, but without asking the name service who we are: that can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address) -> None:
        self.client_places.acquire()  # with all places taken, new clients wait in the system's queue
        super().process_request(request, client_address)  # starts the thread

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.client_places.release()

    def handle_error(self, request, client_address) -> None:
        """http.server would print a traceback; what comes here is a client that went away in the middle of an answer."""
        self.say(f"{client_address[0]} went away")

    def say(self, line: str) -> None:
        print(line + "\n", end="", flush=True)  # written as one piece, so that the lines of two clients do not mix

    def predict(self, body: bytes, threshold: float) -> tuple[list[dict], float, float]:
        """Keypoints of an uploaded picture, and the milliseconds of decoding and of the network."""
        start_time = time.perf_counter()
        image_3d_array = decode_upload(body)
        decoded_time = time.perf_counter()
        keypoint_list = predict(self.network, self.about_dict, image_3d_array, threshold)
        return keypoint_list, (decoded_time - start_time) * 1e3, (time.perf_counter() - decoded_time) * 1e3


ROUTE_DICT = {"/": ("GET", "HEAD"), "/health": ("GET", "HEAD"), "/sample/": ("GET", "HEAD"), "/predict": ("POST",)}
HEAD_SENTENCE_DICT = {
    414: "the address is too long; send the picture in the body: POST /predict",
    431: "the request's head is too long; leave headers out",
    501: "this method is not understood; there are GET, HEAD and POST",
    505: "this version of HTTP is not understood; use HTTP/1.1",
}
# What the page may do: its own style and script, pictures from here or from the user's disk; nothing from another site.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:; "
               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Handler(http.server.BaseHTTPRequestHandler):
    """One request of one client: http.server parses its head, the rest is here. One request a connection keeps it simple."""

    # In HTTP/1.1 curl asks before it sends a large body ("Expect: 100-continue"); in 1.0 it would wait a second for nothing.
    protocol_version = default_request_version = request_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body of an answer waits until the client has confirmed its head
    command, path, requestline = "", "", ""  # for the answer to a request that never got so far

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(TimedSocket(self.connection))

    def handle(self) -> None:
        self.start_time = time.perf_counter()
        try:
            self.handle_one_request()  # of http.server; calls respond, below
        except Refusal as refusal:
            self.refuse(refusal.status, str(refusal))
        except ConnectionError:
            self.server.handle_error(self.request, self.client_address)
        except Exception as error:  # a mistake of ours: one client is told so, the others go on
            self.server.say(f"mistake in the service: {type(error).__name__}: {error}")
            self.refuse(500, "the service made a mistake; its terminal says which")

    def finish(self) -> None:
        """Read what a refused client is still sending: to close on unread bytes would cost it the answer."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + LINGER_SECONDS
            while (seconds_left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(seconds_left)
                if not self.connection.recv(65536):
                    break
        except OSError:
            pass  # it is gone, or too slow
        super().finish()

    # ---- answers

    def answer(self, status: int, content_type: str, body: bytes, header_dict: dict[str, str] | None = None) -> None:
        self.connection.settimeout(REQUEST_SECONDS)  # for a client that does not fetch its answer
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), "Connection": "close",
                            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(header_dict or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        milliseconds = (time.perf_counter() - self.start_time) * 1e3
        request = ascii(f"{self.command} {self.path[:60]}")[1:-1]  # a client could write on the terminal otherwise
        self.server.say(f"{self.client_address[0]} {request} {status} {milliseconds:.0f} ms")

    def answer_json(self, status: int, value: dict, header_dict: dict[str, str] | None = None) -> None:
        self.answer(status, "application/json", json.dumps(value, ensure_ascii=False).encode(), header_dict)

    def refuse(self, status: int, sentence: str) -> None:
        allow = {"Allow": ", ".join(ROUTE_DICT.get(self.route(), ()))} if status == 405 else None
        self.answer_json(status, {"error": sentence}, allow)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server calls this where it cannot even parse the head of a request."""
        sentence = HEAD_SENTENCE_DICT.get(code, "this is no HTTP request that can be understood; send GET / or POST /predict")
        self.refuse(code, sentence)

    def log_request(self, code="-", size="-") -> None:
        """answer() prints a line for each request, with the time taken."""

    def log_message(self, format: str, *args) -> None:
        """As above."""

    def version_string(self) -> str:
        return "keypoints"  # not which Python this is

    # ---- requests

    def route(self) -> str:
        """The path without what follows the question mark; all samples are one route."""
        path = self.path.split("?")[0]
        return "/sample/" if path.startswith("/sample/") else path

    def check_head(self) -> tuple[float, int]:
        """All that can be said before the body is read. Returns the threshold and the body's length; raises Refusal."""
        method_list = ROUTE_DICT.get(self.route())
        if method_list is None:
            raise Refusal(404, "there is nothing of this name; there are GET /, GET /health and POST /predict")
        if self.command not in method_list:
            raise Refusal(405, f"{self.route()} understands {' and '.join(method_list)} only")
        threshold = self.server.threshold
        for name, text in urllib.parse.parse_qsl(self.path.partition("?")[2], keep_blank_values=True):
            try:
                threshold = float(text)
            except ValueError:
                threshold = -1
            if name != "threshold" or not 0 <= threshold <= 1:
                raise Refusal(400, "after the question mark only threshold=NUMBER is understood, with a number from 0 to 1")
        if self.command != "POST":
            return threshold, 0
        if self.headers.get("Transfer-Encoding"):
            raise Refusal(411, "a body in chunks is not understood; say its length in Content-Length")
        length_list = self.headers.get_all("Content-Length", [])
        if not length_list:
            raise Refusal(411, "say in Content-Length how many bytes the picture has")
        if len(set(length_list)) > 1 or not re.fullmatch("[0-9]{1,15}", length_list[0].strip()):
            raise Refusal(400, "Content-Length must be one whole number: how many bytes the picture has")
        length = int(length_list[0])
        if length == 0:
            raise Refusal(400, "the body is empty; send the bytes of a picture")
        if length > MAX_BODY:
            raise Refusal(413, f"{length:,} bytes are more than {MAX_BODY:,}; shrink the picture or save it as JPEG")
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refusal(415, "a compressed body is not understood; send the picture's bytes as they are")
        if self.headers.get_content_maintype() == "multipart":
            raise Refusal(415, "a form is not understood; send the picture's bytes alone: curl --data-binary @picture.jpg")
        return threshold, length

    def handle_expect_100(self) -> bool:
        self.check_head()  # what is too large is refused before it is sent
        return super().handle_expect_100()

    def respond(self) -> None:
        threshold, length = self.check_head()
        route = self.route()
        if route == "/":
            self.answer(200, "text/html; charset=utf-8", self.server.page, {"Content-Security-Policy": PAGE_POLICY})
        elif route == "/health":
            self.answer_json(200, {"status": "ok", "classes": self.server.about_dict["category_list"][1:], "max_bytes": MAX_BODY,
                                   "threshold": self.server.threshold, "samples": len(self.server.sample_list)})
        elif route == "/sample/":
            number = self.path.split("?")[0].removeprefix("/sample/")
            if not re.fullmatch("[0-9]{1,4}", number) or int(number) >= len(self.server.sample_list):
                raise Refusal(404, f"there are {len(self.server.sample_list)} samples, counted from 0: GET /sample/0")
            self.answer(200, "application/octet-stream", self.server.sample_list[int(number)])
        else:
            body = self.rfile.read(length)
            if len(body) < length:
                raise Refusal(400, f"Content-Length says {length:,} bytes but only {len(body):,} came; send the whole picture")
            keypoint_list, decode_ms, network_ms = self.server.workers.submit(self.server.predict, body, threshold).result()
            self.answer_json(200, {"image": "upload", "keypoints": keypoint_list},
                             {"Server-Timing": f"decode;dur={decode_ms:.1f}, network;dur={network_ms:.1f}"})

    # http.server calls do_GET for a GET, and so on.
    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = respond


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT as host and port. Raises UserError.

    >>> parse_address("0.0.0.0:8000"), parse_address("[::1]:80")
    (('0.0.0.0', 8000), ('::1', 80))
    """
    match = re.fullmatch(r"\[?([^\[\]]+)\]?:([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise UserError(f"--serve {text}: not HOST:PORT; for example --serve 127.0.0.1:8000")
    return match[1], int(match[2])


def stop_by_signal(number, frame) -> None:
    raise KeyboardInterrupt  # as Ctrl-C does


def serve(network, about_dict: dict, options) -> None:
    """Serve until Ctrl-C or SIGTERM (what `docker stop` sends); answer who is being served, then end."""
    server = Server(parse_address(options.serve), network, about_dict, options.threshold, options.data / "sample")
    # The first picture takes longer; let it not be a client's, and look at it in the threads that will do the work.
    list(server.workers.map(lambda _: predict(network, about_dict, np.zeros((1920, 320, 3), np.uint8), 1), range(MOST_AT_WORK)))
    signal.signal(signal.SIGTERM, stop_by_signal)
    host, port = server.server_address[:2]
    print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port} - open it in a browser; Ctrl-C ends it", flush=True)
    if host in ("0.0.0.0", "::"):
        print("whoever can reach this machine can use it; there is no password", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    server.server_close()
    deadline = time.monotonic() + STOP_SECONDS
    for _ in range(MOST_CLIENTS):  # to have all places means that nobody is being served
        server.client_places.acquire(timeout=max(0, deadline - time.monotonic()))
    print("stopped", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Find keypoints in pictures, or serve a page that does.")
    parser.add_argument("pictures", type=Path, nargs="*", help="pictures and folders (default: DATA/sample)")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help="folder with the weights (default: data)")
    parser.add_argument("--out", type=Path, help="folder for the drawn pictures (default: DATA/results/predictions)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the keypoints to this file, too (default: do not)")
    parser.add_argument("--xml", action="store_true", help="write LabelImg XML and a copy of each picture, too (default: do not)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a keypoint, 0 to 1 (default: %(default)s)")
    parser.add_argument("--serve", nargs="?", const="127.0.0.1:8000", metavar="HOST:PORT",
                        help="serve a page and POST /predict there instead (default: do not; without a value: %(const)s)")
    options = parser.parse_args()
    if not 0 <= options.threshold <= 1:
        parser.error("--threshold must lie between 0 and 1")
    if options.serve and (options.pictures or options.out or options.json or options.xml):
        parser.error("--serve takes its pictures from clients; leave out pictures, --out, --json and --xml")
    # One core a picture; the others read the next one or serve other clients. And the sums come in one order: with several
    # threads the network's output differs in the sixth digit, and the service would now and then not agree with this.
    torch.set_num_threads(1)
    weights_path = model.find_weights(options.data)
    print(f"using {weights_path}")
    network, about_dict = model.load_weights(weights_path, pick_device())
    network = model.fold_batch_norm(network)
    if options.serve:
        serve(network, about_dict, options)
    else:
        predict_files(network, about_dict, options)


if __name__ == "__main__":
    run_main(main)
