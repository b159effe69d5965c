# One image that serves and trains: docker build -t manyhats .
#   --build-arg BAKE_BASE=1             the base and compiled kernels in the image, not fetched to a volume at first start
#   --build-arg PIP_EXTRA_INDEX_URL=... an index with CPU builds of torch (PyPI's for Linux on x86 brings CUDA: gigabytes)
FROM python:3.11-slim-bookworm AS runtime
# Numba's threads need the system's OpenMP. The home holds every cache: of bases, of the hub, of compiled kernels.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1=12.* && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin manyhats \
    && install -d -o manyhats -g manyhats /data /home/manyhats/.cache
ENV PATH=/opt/manyhats/bin:$PATH \
    NUMBA_CACHE_DIR=/home/manyhats/.cache/numba

FROM runtime AS build
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/manyhats
WORKDIR /src
# What others made is a layer of its own: a change of ours does not fetch torch again.
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['train'], sep='\n')" \
    > requirements.txt && pip install -r requirements.txt
COPY LICENSE ./
COPY adapters_store adapters_store
COPY server server
COPY training training
RUN pip install --no-deps . && ln -s lib/python3.11/site-packages/adapters_store/examples /opt/manyhats/examples
ARG BAKE_BASE=0
# Away from the sources: what is compiled is the installed package.
WORKDIR /
# Numba compiles again where the kernels' file time differs, and a layer keeps whole seconds only: so it gets a whole one.
RUN if [ "$BAKE_BASE" = 1 ]; then \
        export HOME=/home/manyhats && model=/opt/manyhats/lib/python3.11/site-packages/server/model \
        && touch -d 2026-01-01 "$model"/backends/cpu/*.py "$model"/backends/codes.py "$model"/row_adapters.py \
        && python -m compileall -q "$model"/backends/cpu/*.py "$model"/backends/codes.py "$model"/row_adapters.py \
        && python -m adapters_store.base.resolve smollm2-135m \
        && python -m server.cli.kernels; \
    fi

FROM runtime
COPY --from=build /opt/manyhats /opt/manyhats
COPY --from=build --chown=manyhats:manyhats /home/manyhats/.cache /home/manyhats/.cache
ENV PYTHONUNBUFFERED=1 \
    MANYHATS_HOST=0.0.0.0 \
    MANYHATS_DATA=/data
USER 10001
WORKDIR /data
VOLUME ["/data", "/home/manyhats/.cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('MANYHATS_PORT', 8000)}/health/live\", timeout=2)"]
ENTRYPOINT ["manyhats"]
CMD ["serve"]
