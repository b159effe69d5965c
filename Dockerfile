# One image that serves and trains. Build: docker build -t manyhats .
# With the base model baked in instead of fetched to a volume: docker build --build-arg BAKE_BASE=1 -t manyhats .
FROM python:3.11-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/manyhats
ENV PATH=/opt/manyhats/bin:$PATH
WORKDIR /src
COPY pyproject.toml LICENSE README.md ./
COPY adapters_store adapters_store
COPY server server
COPY training training
RUN pip install .
ARG BAKE_BASE=0
RUN mkdir -p /bake/.cache/manyhats \
    && if [ "$BAKE_BASE" = 1 ]; then HOME=/bake python -m adapters_store.bases smollm2-135m; fi

FROM python:3.11-slim-bookworm
# torch's and Numba's threads share one OpenMP runtime
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1=12.* && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin manyhats \
    && install -d -o manyhats -g manyhats /data /cache /cache/numba
COPY --from=build /opt/manyhats /opt/manyhats
COPY --from=build --chown=manyhats:manyhats /bake/.cache/manyhats /cache
ENV PATH=/opt/manyhats/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/cache/numba \
    MANYHATS_HOST=0.0.0.0 \
    MANYHATS_DATA=/data \
    MANYHATS_CACHE=/cache
USER 10001
WORKDIR /data
VOLUME ["/data", "/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
ENTRYPOINT ["manyhats"]
CMD ["serve"]
