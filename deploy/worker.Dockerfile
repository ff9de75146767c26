# cdc-worker, installed from its wheel, for a user without rights.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY cdc_worker cdc_worker
COPY schema schema
RUN python3 -m venv /opt/cdc-worker \
    && /opt/cdc-worker/bin/pip wheel --no-cache-dir --no-deps --wheel-dir dist . \
    && /opt/cdc-worker/bin/pip install --no-cache-dir dist/*.whl

FROM ${PYTHON_IMAGE}
# A home, because libpq looks there for .pgpass and certificates; and where recordings go, a new volume has its owner from.
RUN useradd --create-home --uid 10001 cdc-worker \
    && install --directory --mode=700 --owner=cdc-worker /var/lib/cdc-worker
COPY --from=build /opt/cdc-worker /opt/cdc-worker
ENV PATH=/opt/cdc-worker/bin:$PATH
USER cdc-worker
WORKDIR /home/cdc-worker
ENTRYPOINT ["cdc-worker"]
CMD ["run"]
