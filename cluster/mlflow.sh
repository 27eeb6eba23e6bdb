#!/usr/bin/env bash
# MLflow on the head, for `ray up` clusters.
#   bash mlflow.sh start [ARTIFACTS]    ARTIFACTS: s3://..., gs://... or a folder
#   bash mlflow.sh stop
#
# It listens on loopback alone and asks for a password; look at it through ssh, as the README says. The
# driver on the head is its one client, and passes artifacts on through it, so no other node needs a key to
# them. Runs go to PostgreSQL where that runs (a socket file, no port, no password: the system says who
# you are), else to a SQLite file. The password is made here, once, and stays in ~/.bimask/mlflow.env (0600).
set -euo pipefail
umask 077
home=$HOME/.bimask
port=5000

prepare() {
    mkdir -p "$home"
    if [ ! -f "$home/mlflow.env" ]; then
        cat > "$home/mlflow.env" <<ENV
export MLFLOW_TRACKING_URI=http://127.0.0.1:$port
export MLFLOW_TRACKING_USERNAME=admin
export MLFLOW_TRACKING_PASSWORD=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')
ENV
        head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$home/flask"
    fi
    # Without the cache the password is hashed anew in every request.
    cat > "$home/auth.ini" <<INI
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///$home/auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 300
INI
    echo "${1:-$home/artifacts}" > "$home/artifacts.uri"
    if [ -S /var/run/postgresql/.s.PGSQL.5432 ]; then
        sudo -u postgres psql -qtc "SELECT 1 FROM pg_roles WHERE rolname = '$(id -un)'" | grep -q 1 ||
            sudo -u postgres createuser "$(id -un)"
        sudo -u postgres psql -qtc "SELECT 1 FROM pg_database WHERE datname = 'mlflow'" | grep -q 1 ||
            sudo -u postgres createdb --owner "$(id -un)" mlflow
        echo 'postgresql+psycopg2:///mlflow?host=/var/run/postgresql' > "$home/store.uri"
    else
        echo "sqlite:///$home/mlflow.db" > "$home/store.uri"
    fi
    grep -qs bimask-mlflow ~/.bashrc || echo '. ~/.bimask/mlflow.env  # bimask-mlflow' >> ~/.bashrc
}

serve() {
    # shellcheck source=/dev/null
    . "$home/mlflow.env"
    export MLFLOW_AUTH_ADMIN_PASSWORD=$MLFLOW_TRACKING_PASSWORD
    export MLFLOW_AUTH_CONFIG_PATH=$home/auth.ini
    MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$home/flask")
    export MLFLOW_FLASK_SERVER_SECRET_KEY
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
    exec mlflow server --host 127.0.0.1 --port "$port" --workers 1 --app-name basic-auth \
        --allowed-hosts 'localhost:*,127.0.0.1:*' \
        --backend-store-uri "$(cat "$home/store.uri")" \
        --artifacts-destination "$(cat "$home/artifacts.uri")"
}

healthy() { curl -fs -o /dev/null "http://127.0.0.1:$port/health"; }

start() {
    prepare "$@"
    healthy && return
    if [ -d /run/systemd/system ]; then
        sudo systemd-run --quiet --collect --unit=bimask-mlflow --uid="$(id -un)" \
            --property=Restart=always --property=RestartSec=5 \
            --setenv=HOME="$HOME" --setenv=PATH="$PATH" bash "$(realpath "$0")" serve
    else
        nohup setsid bash "$0" serve > "$home/mlflow.log" 2>&1 < /dev/null &
        echo $! > "$home/mlflow.pid"
    fi
    for _ in $(seq 180); do
        healthy && return
        sleep 1
    done
    echo "MLflow did not start within three minutes; see $home/mlflow.log or journalctl -u bimask-mlflow" >&2
    exit 1
}

stop() {
    if [ -d /run/systemd/system ]; then
        sudo systemctl stop bimask-mlflow
    elif [ -f "$home/mlflow.pid" ]; then
        kill -- "-$(cat "$home/mlflow.pid")" || true # a group of its own, by setsid
        rm "$home/mlflow.pid"
    fi
}

case ${1:-} in
start | stop | serve) "$@" ;;
*)
    echo "usage: bash mlflow.sh start [ARTIFACTS] | stop" >&2
    exit 2
    ;;
esac
