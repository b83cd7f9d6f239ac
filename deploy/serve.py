"""The detector as a network service, without PyTorch: a page, and POST /predict.

    python deploy/serve.py    # data/keypoints.onnx on http://127.0.0.1:8000
    python deploy/serve.py --model my_data/keypoints.onnx --host 0.0.0.0 --port 80
"""

import argparse
import asyncio
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.requests import ClientDisconnect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is there
from common import DATA_FOLDER, UserError, command, pad_image, read_image, resize_image, run_main

MAX_BYTES, MAX_PIXELS = 12_000_000, 16_000_000  # of an image; a pixel costs 30 bytes of memory
MAX_WAITING, MAX_HELD = 200, 400_000_000  # images that wait, and their bytes; beyond it: 503
PATIENCE, CORES = 30, os.cpu_count() or 1  # s for an image to arrive; images looked at at once
DEFAULT_MODEL = Path(os.environ.get("KEYPOINTS_MODEL", DATA_FOLDER / "keypoints.onnx"))


def load_model(path: Path) -> tuple[onnxruntime.InferenceSession, dict]:
    """The exported network, and what it knows of its data. Raises UserError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a core for each image; the others have images of their own
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options)
        return session, json.loads(session.get_modelmeta().custom_metadata_map["about"])
    except Exception as error:  # damaged bytes can raise nearly anything
        why = getattr(error, "strerror", None) or "not what export_onnx.py writes"
        raise UserError(f"{path}: {why}; run " + command("export_onnx.py", path.parent)) from None


def find_keypoints(session, about_dict: dict, file, threshold: float = 0.5) -> list[dict]:
    """Each keypoint's class, x, y, score and box, in px of the image in `file`: path or open."""
    scale = about_dict["scale"]
    image_3d_array = read_image(file, int(MAX_PIXELS / max(1, scale) ** 2))
    resized_3d_array = resize_image(image_3d_array, scale)
    size, own_size = (array.shape[1::-1] for array in (resized_3d_array, image_3d_array))  # x, y
    result = session.run(None, {"image": pad_image(resized_3d_array)[None],
                                "threshold": np.array(threshold, np.float32)})
    half, keypoint_list = np.divide(about_dict["box_size"], 2), []
    for place, class_id, score in zip(*result):
        xy_2d_array = np.array([place, place - half, place + half])  # and two corners of the box
        # What lies in the padding with all of its box is no keypoint. Rounding comes last.
        if (xy_2d_array[1] < np.subtract(size, 1)).all() and (xy_2d_array[2] > 1).all():
            x, y, *box = (xy_2d_array * own_size / size).flatten().round(3).tolist()
            keypoint_list.append({"class": about_dict["category_list"][class_id], "x": x, "y": y,
                                  "score": round(float(score), 6), "box": box})
    return keypoint_list


async def predict(request: Request, threshold: float = Query(0.5, ge=0, le=1)) -> JSONResponse:
    """The keypoints of one image, sent as it is or as the only file of a form."""
    if unknown := set(request.query_params) - {"threshold"}:
        raise HTTPException(400, f"{unknown.pop()}: no such parameter; there is only threshold")
    state, held_dict, body = request.app.state, request.app.state.held_dict, bytearray()
    size = min(int(request.headers.get("content-length", MAX_BYTES)), MAX_BYTES)
    if len(held_dict) >= CORES + MAX_WAITING or sum(held_dict.values()) + size > MAX_HELD:
        raise HTTPException(503, "too many images are waiting; try again", {"Retry-After": "2"})
    held_dict[request] = size  # bytes
    try:
        async with asyncio.timeout(PATIENCE):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BYTES:  # whatever the client said before
                    raise HTTPException(413, f"more than {MAX_BYTES:,} bytes; shrink the image")
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            request._body = bytes(body)  # form() takes it from here
            part_list = [part for _, part in (await request.form()).multi_items()]
            if len(part_list) != 1 or isinstance(part_list[0], str):
                raise HTTPException(400, "a form must hold one file and nothing else")
            body = await part_list[0].read()
        keypoint_list = await asyncio.get_running_loop().run_in_executor(
            state.pool, find_keypoints, *state.model, io.BytesIO(body), threshold)
    except (TimeoutError, asyncio.CancelledError):  # the latter when the service ends
        raise HTTPException(408, "the image came too late", {"Connection": "close"}) from None
    finally:
        del held_dict[request]
    return JSONResponse({"image": "upload", "keypoints": keypoint_list},
                        headers={"Keypoint-Classes": json.dumps(state.health_dict["classes"])})


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Whatever is wrong is told in JSON and one sentence."""
    status, sentence = getattr(error, "status_code", 415), getattr(error, "detail", str(error))
    if isinstance(error, RequestValidationError):
        status, sentence = 400, f"threshold: {error.errors()[0]['msg']}"
    return JSONResponse({"error": sentence}, status, getattr(error, "headers", None))


def create_app(path: Path = DEFAULT_MODEL) -> FastAPI:
    """The service; it keeps nothing but the model."""
    app = FastAPI(title="Keypoints", exception_handlers=dict.fromkeys(
        [StarletteHTTPException, UserError, RequestValidationError, ClientDisconnect], refuse))
    state, samples, page = app.state, path.parent / "sample", Path(__file__).with_name("page.html")
    state.model, state.pool, state.held_dict = load_model(path), ThreadPoolExecutor(CORES), {}
    state.health_dict = {"status": "ok", "classes": state.model[1]["category_list"][1:],
                         "max_bytes": MAX_BYTES, "samples": [p.name for p in samples.glob("*.jpg")]}
    options_dict = {"methods": ["GET", "HEAD"], "include_in_schema": False}
    app.add_api_route("/", lambda: FileResponse(page), **options_dict)
    app.add_api_route("/health", lambda: state.health_dict, **options_dict)
    app.add_api_route("/predict", predict, methods=["POST"], openapi_extra={"requestBody": {
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}})
    app.mount("/sample", StaticFiles(directory=samples, check_dir=False))
    return app


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="export_onnx.py's file")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: to be reached from elsewhere")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    options = vars(parser.parse_args())
    uvicorn.run(create_app(options.pop("model")), **options, timeout_graceful_shutdown=2)  # s


if __name__ == "__main__":
    run_main(main)
