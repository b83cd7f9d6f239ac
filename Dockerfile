# The service of 05_predict.py: a page and POST /predict on port 8000. (podman and buildah: add --format docker to the build,
# or they leave the health check out.)
#
#   docker build -t keypoints .
#   docker run --rm -p 8000:8000 keypoints                              # the weights that come with the repository
#   docker run --rm -p 8000:8000 -v "$PWD/my_data:/app/data:ro" keypoints    # your own: my_data/weights.pt
#   docker run --rm -p 8000:8000 --read-only --cap-drop ALL --memory 2g keypoints    # if others can reach it

FROM python:3.11-slim

# Logs appear at once; nothing is written to the disk, so the container can run read-only.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /app

# Requirements first: they change seldom, and Docker keeps this layer. The service needs no matplotlib.
# On x86 the usual PyTorch for Linux carries CUDA, gigabytes that a CPU does not need. For the small one give pip the index
# of CPU builds that the install page of pytorch.org names: docker build --build-arg PIP_EXTRA_INDEX_URL=... -t keypoints .
ARG PIP_EXTRA_INDEX_URL=""
COPY requirements.txt .
RUN grep -v matplotlib requirements.txt > service.txt && pip install --no-cache-dir -r service.txt && rm service.txt

COPY common.py 02_model.py 05_predict.py ./
COPY docs/page.html docs/
COPY data/ data/

# Whoever breaks in is nobody: no root, no home, no shell, and the program's files are not theirs to change.
RUN useradd --system --no-create-home --shell /usr/sbin/nologin service
USER service

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4).read()"]

# As a list, not a line: without a shell in between, `docker stop` reaches Python, which ends at once.
CMD ["python", "05_predict.py", "--serve", "0.0.0.0:8000"]
