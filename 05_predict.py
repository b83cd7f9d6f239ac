"""Lesson 5: use it. Pictures in; drawn pictures, JSON and LabelImg's XML out. Or a service.

    python 05_predict.py                                # the pictures of data/sample
    python 05_predict.py photo.jpg my_folder            # your own: pictures and folders
    python 05_predict.py photo.jpg --map                # how sure each cell is of each class
    python 05_predict.py my_folder --xml --out round_2  # labels to correct in LabelImg
    python 05_predict.py --serve                        # a page on http://127.0.0.1:8000

Reads   data/weights.pt (else data/pretrained.pt) and the pictures.
Writes  to data/results/predictions (or --out, a new folder): NAME.png, drawn; with --map
        NAME_map.png; with --xml labelimg/, a copy of each picture with its XML. --json FILE: all
        keypoints, to a new FILE. It overwrites nothing but its own data/results/predictions.
Time    about 20 pictures a second on two CPU cores, most of it to write PNG.
See     a line a picture with class, score and place; where nothing was found, the best scores.
Next    python 06_model_analysis.py shows where parameters, memory and time go.
"""

import contextlib
import http.server
import importlib
import io
import json
import math
import shutil
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from common import (CELL, IMAGE_SUFFIXES, UserError, colour_of, command, files_in, make_parser,
                    names_to_draw, read_image, replacing, run_main, save_figure, write_json,
                    write_labelimg_xml)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

PNG_LEVEL = 1  # of 9; the usual 6 takes twice the time for three quarters of the bytes
MAP_CLASSES = 6  # the most on a map: the likeliest
PAGE_PATH = Path(__file__).resolve().parent / "docs" / "page.html"
MAX_BODY = 12_000_000  # bytes of a picture that the service takes
MAX_SERVED_PIXELS = 16_000_000  # px, as a telephone's 4000x3000; each costs 30 bytes of memory
MOST_AT_WORK = 2  # pictures that the service looks at at the same time: 1 GB at most
PATIENCE = 5  # s; for a client that is silent


# ---------------------------------------------------------------- one picture

def draw_keypoints(image: Image.Image, keypoint_list: list[dict], category_list: list[str],
                   name_list: list[str]) -> Image.Image:
    """A copy of the picture with each keypoint's box, cross, name (of name_list) and score."""
    image = image.convert("RGB")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for number, keypoint in enumerate(keypoint_list):
        class_id = category_list.index(keypoint["class"])
        xmin, ymin, xmax, ymax = box = [value - 0.5 for value in keypoint["box"]]
        x, y = keypoint["x"] - 0.5, keypoint["y"] - 0.5  # pixel c covers [c, c + 1)
        for width, ink in ((4, "black"), (2, colour_of(class_id))):  # to be seen on any ground
            canvas.rectangle(box, outline=ink, width=width)
            canvas.line([x - 5, y, x + 5, y], fill=ink, width=width - 1)
            canvas.line([x, y - 5, x, y + 5], fill=ink, width=width - 1)
        text = f"{name_list[class_id]} {keypoint['score']:.2f}"
        _, _, width, height = canvas.textbbox((0, 0), text, font=font, stroke_width=2)
        # Above its box, but every second below, so that neighbours' texts keep apart.
        top = ymax + 2 if number % 2 or ymin < height + 2 else ymin - height - 2
        place = max(0, min(xmin, image.width - width)), min(top, image.height - height)
        canvas.text(place, text, colour_of(class_id), font, stroke_width=2, stroke_fill="black")
    return image


def class_maps(output_4d) -> np.ndarray:
    """The probability of each class in each cell, float32 `[2, 60, 10]`: what decode sees."""
    score_3d = output_4d[0, 2:]  # [3, 60, 10]; channels 0 and 1 are dx and dy
    return score_3d.softmax(dim=0)[1:].cpu().numpy()  # without background


def in_words(keypoint_list: list[dict], best_dict: dict[str, float], threshold: float) -> str:
    """What was found; else the best cell of each class: "nearly", or "not at all"?

    >>> in_words([], {"keyPoint_1": 0.31, "keyPoint_2": 0.99998}, threshold=1)
    'nothing found with threshold 1; best cells: keyPoint_1 0.310, keyPoint_2 0.999'
    """
    if keypoint_list:
        form = "{class} {score:.3f} at ({x:.2f}, {y:.2f})"
        return "  ".join(form.format(**keypoint) for keypoint in keypoint_list)
    # Cut, not rounded: 0.99998 would read 1.000, as if it had reached the threshold.
    best_list = [f"{name} {math.floor(best * 1e3) / 1e3:.3f}" for name, best in best_dict.items()]
    return f"nothing found with threshold {threshold:g}; best cells: " + ", ".join(best_list)


def draw_map(path: Path, drawn: Image.Image, image_3d_array: np.ndarray,
             map_3d_array: np.ndarray, name_list: list[str]) -> None:
    """The drawn picture, and beside it under each class's map: bright cells are likely ones."""
    _, rows, columns = map_3d_array.shape
    best_1d_array = map_3d_array.max(axis=(1, 2))
    shown_list = sorted(np.argsort(-best_1d_array)[:MAP_CLASSES])
    px_per_inch = max(150, drawn.height / 15, drawn.width / 5)
    height, width = drawn.height / px_per_inch, drawn.width / px_per_inch
    panels = 1 + len(shown_list)
    figure = Figure((1 + panels * (width + 0.6), height + 1), layout="compressed")
    first, *axes_list = figure.subplots(1, panels, sharey=True)
    first.imshow(drawn)
    for axes, index in zip(axes_list, shown_list):
        axes.imshow(image_3d_array)
        mappable = axes.imshow(map_3d_array[index], cmap="inferno", vmin=0, vmax=1, alpha=0.6,
                               extent=(0, columns * CELL, rows * CELL, 0))
        axes.set(xlim=(0, drawn.width), ylim=(drawn.height, 0))
        axes.set_title(f"{name_list[index + 1]}\nbest {best_1d_array[index]:.3f}", parse_math=False)
    figure.colorbar(mappable, ax=axes_list, label="probability", aspect=40, pad=0.01)
    save_figure(figure, path)


# ---------------------------------------------------------------- many pictures

def predict_files(network, about_dict: dict, options) -> None:
    """The command line's job: a line and a drawn picture each; maps, XML and JSON if asked."""
    folder = options.out or options.data / "results" / "predictions"
    path_list = collect_pictures(options)
    name_list = output_names(path_list)
    refuse_to_overwrite(folder, path_list, options)
    category_list = about_dict["category_list"]
    drawn_name_list = names_to_draw(category_list)
    entry_list = []
    start_time = time.perf_counter()
    for number, (path, name) in enumerate(zip(path_list, name_list), start=1):
        try:
            image_3d_array = read_image(path)
        except UserError as error:  # of this picture; the others go on
            print(f"bad: {error}")
            continue
        height, width = image_3d_array.shape[:2]
        output_4d = model.run_network(network, image_3d_array)  # [1, 5, 60, 10]
        keypoint_list = model.to_dicts(output_4d, about_dict, height, width, options.threshold)
        entry_list.append({"image": str(path), "keypoints": keypoint_list})
        drawn = draw_keypoints(Image.fromarray(image_3d_array), keypoint_list, category_list,
                               drawn_name_list)
        with replacing(folder / f"{name}.png") as temporary:
            drawn.save(temporary, format="PNG", compress_level=PNG_LEVEL)
        map_3d_array = class_maps(output_4d)  # [2, 60, 10]
        best_dict = dict(zip(category_list[1:], map_3d_array.max(axis=(1, 2))))
        if options.map:
            draw_map(folder / f"{name}_map.png", drawn, image_3d_array, map_3d_array,
                     drawn_name_list)
        if options.xml:
            write_label(folder / "labelimg", name, path, width, height, keypoint_list)
        words = in_words(keypoint_list, best_dict, options.threshold)
        print(f"{number}/{len(path_list)}  {path}  {width} x {height} px  {words}")
    if options.json:
        write_json(options.json, entry_list)
    report(entry_list, len(path_list), time.perf_counter() - start_time, folder, options)


def collect_pictures(options) -> list[Path]:
    """The pictures that the user named. Raises UserError for a folder without any."""
    path_list = []
    for path in options.pictures or [options.data / "sample"]:
        is_folder = path.is_dir() or not options.pictures
        found_list = files_in(path) if is_folder else [path]
        if not found_list:
            fix = command("05_predict.py", options.data, "my_folder")
            raise UserError(f"{path}: no such folder, or no picture in it; name another: {fix}")
        path_list += found_list
    return list(dict.fromkeys(path_list))  # named twice, looked at once


def output_names(path_list: list[Path]) -> list[str]:
    """A name for what is written about each picture: a/1.jpg and b/1.jpg must stay apart.

    >>> output_names([Path("a/1.jpg"), Path("b/1.jpg"), Path("1_2.jpg")])
    ['1', '1_2', '1_2_2']
    """
    taken_set, name_list = set(), []
    for path in path_list:
        stem = "".join(letter if letter.isprintable() else "_" for letter in path.stem[:80])
        name, number = stem, 1
        # Windows and macOS take A.png and a.png for the same file, hence casefold.
        while taken_set & (file_set := {name.casefold(), f"{name}_map".casefold()}):
            number += 1
            name = f"{stem}_{number}"
        taken_set |= file_set
        name_list.append(name)
    return name_list


def refuse_to_overwrite(folder: Path, path_list: list[Path], options) -> None:
    """Raise UserError, before any work, where something of the user's might be lost."""
    if any(path.resolve().parent == folder.resolve() for path in path_list):
        raise UserError(f"{folder}: holds the pictures themselves; choose another --out")
    if options.out and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is no empty folder; choose a new one for --out")
    if options.xml and (folder / "labelimg").exists():
        raise UserError(f"{folder / 'labelimg'}: holds labels, perhaps corrected by hand; choose a "
                        "new folder with --out")
    if options.json and (options.json.exists() or options.json == options.out):
        raise UserError(f"{options.json}: is there already; choose a new file for --json")


def write_label(folder: Path, name: str, path: Path, width: int, height: int,
                keypoint_list: list[dict]) -> None:
    """A copy of the picture and its XML side by side, as 01_prepare_data.py --source reads them."""
    suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".jpg"  # 01 looks for these
    with replacing(folder / f"{name}{suffix}") as temporary:
        shutil.copyfile(path, temporary)
    write_labelimg_xml(folder / f"{name}.xml", f"{name}{suffix}", width, height, keypoint_list)


def report(entry_list: list[dict], picture_count: int, seconds: float, folder: Path,
           options) -> None:
    """Say what was done and what comes next. Raises UserError if a picture was bad."""
    keypoint_count = sum(len(entry["keypoints"]) for entry in entry_list)
    print(f"{keypoint_count} keypoints in {len(entry_list)} of {picture_count} pictures, "
          f"{seconds:.1f} s; look at {folder}")
    step = command("06_model_analysis.py", options.data)
    if options.xml:
        labels = folder / "labelimg"
        step = (f"correct {labels} in LabelImg, then "
                + command("01_prepare_data.py", Path("NEW"), "--source", labels))
    print(f"next: {step}")
    if bad_count := picture_count - len(entry_list):
        raise UserError(f"{bad_count} of {picture_count} pictures are bad: see the lines above")


# ---------------------------------------------------------------- the service
# This is about HTTP, not about pictures, and can be skipped.

class Handler(http.server.BaseHTTPRequestHandler):
    """One request of one client. http.server reads its head and calls do_GET or do_POST."""

    timeout = PATIENCE
    protocol_version = default_request_version = "HTTP/1.1"  # in 1.0 curl waits a second to send
    disable_nagle_algorithm = True  # or a body waits until the client has confirmed its head

    def do_GET(self) -> None:
        content_dict, path = self.server.content_dict, self.path.split("?")[0]
        if path in content_dict:  # all of it is in memory: no request reaches a file
            self.answer(200, *content_dict[path])
        else:
            self.answer(404, {"error": "there are GET /, GET /health and POST /predict"})

    def do_POST(self) -> None:
        try:
            self.answer(*self.predict())
        except OSError:  # the client went away, or is too slow
            raise
        except Exception:
            self.answer(500, {"error": "a mistake of the service; its terminal says which"})
            raise  # http.server prints it there; the other clients notice nothing

    def predict(self) -> tuple[int, dict]:
        """POST /predict?threshold=0.3 with a picture: HTTP status, and answer or what is wrong."""
        path, _, query = self.path.partition("?")
        if path != "/predict":
            return 404, {"error": "a picture goes to POST /predict"}
        asked_list = urllib.parse.parse_qs(query).get("threshold", [self.server.threshold])
        try:
            threshold, length = float(asked_list[0]), int(self.headers["Content-Length"])
        except (ValueError, TypeError):  # TypeError: there is no Content-Length
            threshold = length = -1
        if not (0 <= threshold <= 1 and length > 0):
            return 400, {"error": "threshold must be 0 to 1, Content-Length the picture's bytes"}
        if length > MAX_BODY:
            return 413, {"error": f"{length:,} bytes are more than {MAX_BODY:,}; shrink it"}
        body = self.rfile.read(length)
        with self.server.at_work:  # waits while MOST_AT_WORK others are at it
            try:
                image_3d_array = read_image(io.BytesIO(body), MAX_SERVED_PIXELS)
            except UserError as error:
                return 415, {"error": f"{error}; send its bytes: curl --data-binary @a.jpg"}
            keypoint_list = model.find_keypoints(self.server.network, self.server.about_dict,
                                                 image_3d_array, threshold)
        return 200, {"image": "upload", "keypoints": keypoint_list}

    def answer(self, status: int, content, content_type: str = "application/json") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # one request a connection keeps it simple
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client went away, or is too slow
            super().handle()
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read(65536):  # to hang up on who still sends would lose the answer
                pass


def make_server(address: tuple, network, about_dict: dict, threshold: float, sample_folder: Path):
    """A server with a thread for each client; what they share hangs on it."""
    server = http.server.ThreadingHTTPServer(address, Handler)
    server.daemon_threads = False  # so that server_close waits for them
    server.network, server.about_dict, server.threshold = network, about_dict, threshold
    server.at_work = threading.BoundedSemaphore(MOST_AT_WORK)
    sample_list = [path.read_bytes() for path in files_in(sample_folder)]
    health_dict = {"status": "ok", "classes": about_dict["category_list"][1:],
                   "threshold": threshold, "max_bytes": MAX_BODY, "samples": len(sample_list)}
    server.content_dict = {"/": (PAGE_PATH.read_bytes(), "text/html; charset=utf-8"),
                           "/health": (health_dict, "application/json")}
    for number, sample in enumerate(sample_list):
        server.content_dict[f"/sample/{number}"] = sample, "application/octet-stream"
    return server


def serve(network, about_dict: dict, options) -> None:
    """Serve until Ctrl-C or SIGTERM (`docker stop`); answer who is being served, then end."""
    host, _, port = options.serve.rpartition(":")
    try:
        server = make_server((host or "127.0.0.1", int(port)), network, about_dict,
                             options.threshold, options.data / "sample")
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"--serve {options.serve}: cannot serve there ({error}); give HOST:PORT, "
                        "for example 127.0.0.1:8000, or 127.0.0.1:0 for any free port") from None
    host, port = server.server_address
    print(f"serving on http://{host}:{port} without a password; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # SystemExit: run_main's for SIGTERM
        server.serve_forever()
    server.server_close()  # waits for those who are being served
    print("stopped", flush=True)


# ---------------------------------------------------------------- the command line

def main() -> None:
    parser = make_parser("Find keypoints in pictures, or serve a page.", "folder with the weights")
    parser.add_argument("pictures", type=Path, nargs="*", help="pictures and folders; without any, "
                        "those of DATA/sample")
    parser.add_argument("--out", type=Path, help="new folder to draw into; without it, "
                        "DATA/results/predictions")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="new file for the keypoints")
    parser.add_argument("--xml", action="store_true", help="write pictures with LabelImg's XML")
    parser.add_argument("--map", action="store_true", help="draw the probabilities of the cells")
    parser.add_argument("--threshold", type=float, default=0.5,
                        help="least score of a keypoint, 0 to 1")
    parser.add_argument("--serve", nargs="?", const="127.0.0.1:8000", metavar="HOST:PORT",
                        help="serve a page and POST /predict; without a place at %(const)s")
    options = parser.parse_args()
    if not 0 <= options.threshold <= 1:
        parser.error("--threshold must lie between 0 and 1")
    own_list = [options.pictures, options.out, options.json, options.xml, options.map]
    if options.serve and any(own_list):
        parser.error("--serve takes pictures from clients: only --data and --threshold go with it")
    # One core a picture: the others serve other clients. And sums come in one order: with several
    # threads the sixth digit differs now and then, and service and command line would disagree.
    torch.set_num_threads(1)
    job = serve if options.serve else predict_files
    job(*model.load_for_use(options.data), options)


if __name__ == "__main__":
    run_main(main)
