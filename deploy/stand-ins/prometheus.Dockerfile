# What docker-compose.yml uses of the official image prom/prometheus.
ARG BASE=cdc-test/debian:bookworm
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* /etc/prometheus/* \
    && install --directory --owner=nobody --group=nogroup /prometheus
VOLUME /prometheus
WORKDIR /prometheus
USER nobody
EXPOSE 9090
ENTRYPOINT ["prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
