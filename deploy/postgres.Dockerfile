# PostgreSQL with wal2json. The base is the official image of any major: PG_MAJOR, docker-entrypoint.sh and the package
# source are its own.
ARG POSTGRES_IMAGE=postgres:15
FROM ${POSTGRES_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends "postgresql-${PG_MAJOR}-wal2json" \
    && rm -rf /var/lib/apt/lists/*

COPY deploy/postgres-entrypoint /usr/local/bin/
ENTRYPOINT ["postgres-entrypoint"]
CMD ["postgres", "-c", "wal_level=logical"]
