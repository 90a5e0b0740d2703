# The encoder as a container:
#   docker build -t finetuner .
#   docker run -p 127.0.0.1:8080:8080 -v ~/.finetuner:/home/finetuner/.finetuner:ro finetuner
# The port speaks gRPC and asks for no token: publish it to 127.0.0.1 or to a Flow's own network.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    JINA_OPTOUT_TELEMETRY=1

WORKDIR /app
COPY requirements.txt .
RUN pip install -r requirements.txt
COPY pyproject.toml README.md ./
COPY finetuner finetuner
RUN pip install --no-deps .
COPY executors executors
COPY config.yml .

RUN useradd --create-home finetuner
USER finetuner

EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["jina", "ping", "executor", "127.0.0.1:8080"]
ENTRYPOINT ["jina", "executor", "--uses", "config.yml"]
# a Flow that runs this image gives a port of its own
CMD ["--port", "8080"]
