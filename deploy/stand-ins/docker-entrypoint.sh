#!/bin/bash
# What deploy/ and the tests use of the official image's entrypoint: POSTGRES_DB, POSTGRES_PASSWORD, POSTGRES_INITDB_ARGS,
# POSTGRES_HOST_AUTH_METHOD and the SQL files in /docker-entrypoint-initdb.d, all of them only while the volume is new.
set -euo pipefail
shopt -s nullglob

[[ ${1-} == -* ]] && set -- postgres "$@"
[[ ${1-} == postgres ]] || exec "$@"

if [[ $(id -u) == 0 ]]; then
    install -d -o postgres -g postgres -m 700 "$PGDATA"
    install -d -o postgres -g postgres -m 3775 /var/run/postgresql
    exec gosu postgres "$0" "$@"
fi

if [[ ! -s $PGDATA/PG_VERSION ]]; then
    read -ra arguments <<<"${POSTGRES_INITDB_ARGS-}"
    initdb --username=postgres --pwfile=<(echo "${POSTGRES_PASSWORD:-unused}") "${arguments[@]}"
    echo "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"
    echo "host all all all ${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >>"$PGDATA/pg_hba.conf"

    # With the settings of the command, and on the socket only.
    pg_ctl start --wait --silent --options "$(printf '%q ' "${@:2}" -c listen_addresses= -p 5432)"
    database=${POSTGRES_DB:-postgres}
    [[ $database == postgres ]] || createdb --username=postgres "$database"
    for file in /docker-entrypoint-initdb.d/*.sql; do
        psql --username=postgres --dbname="$database" --set=ON_ERROR_STOP=1 --file="$file"
    done
    pg_ctl stop --wait --silent --mode=fast
fi

exec "$@"
