# What deploy/ uses of the official image python:3.12-slim. Debian's Python may be older.
ARG BASE=cdc-test/debian:bookworm
FROM ${BASE}

# pip brings authorities of its own, and would not ask the machine's.
ENV LANG=C.UTF-8 PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
CMD ["python3"]
