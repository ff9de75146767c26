# What deploy/ uses of the official image postgres:15, and the tests of others.
ARG BASE=cdc-test/debian:bookworm
FROM ${BASE}

ARG PG_MAJOR=15
ENV PG_MAJOR=$PG_MAJOR PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
ENV PATH=$PATH:/usr/lib/postgresql/$PG_MAJOR/bin
ARG RELEASE=bookworm-security

RUN useradd --system --user-group --uid 999 --home-dir /var/lib/postgresql --shell /bin/bash postgres \
    && mkdir -p /etc/postgresql-common /docker-entrypoint-initdb.d \
    && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        --target-release "$RELEASE" "postgresql-$PG_MAJOR" gosu \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o postgres -g postgres -m 1777 "$PGDATA"

VOLUME /var/lib/postgresql/data
COPY docker-entrypoint.sh /usr/local/bin/
ENTRYPOINT ["docker-entrypoint.sh"]
STOPSIGNAL SIGINT
EXPOSE 5432
CMD ["postgres"]
