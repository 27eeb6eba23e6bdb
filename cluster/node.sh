#!/usr/bin/env bash
# Every node of a `ray up` cluster: a virtual environment with the project, versions as in constraints.txt.
#   bash node.sh [EXTRAS]       EXTRAS of pyproject.toml, such as `aws,head`
# Takes minutes on a new node. BIMASK_VENV, an environment that holds all packages already, saves them.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${BIMASK_VENV:-$HOME/venv}
if [ -z "${BIMASK_VENV:-}" ]; then
    if [ ! -x "$venv/bin/python" ]; then
        python3 -c 'import ensurepip' 2>/dev/null || {
            sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
            sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y python3-venv
        }
        python3 -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install -q -c cluster/constraints.txt -e ".[study${1:+,$1}]"
fi

# Ray runs each command in a login shell of its own, which reads ~/.bashrc. Its exporters of metrics answer
# without a token and on all interfaces, so none is started; the dashboard does without them. Its memory
# monitor is off since its kills end a study, and the kernel's do not (study/search/__init__.py).
grep -qs bimask-node ~/.bashrc || cat >> ~/.bashrc <<RC
export PATH="$venv/bin:\$PATH" RAY_AUTH_MODE=token  # bimask-node
export RAY_memory_monitor_refresh_ms=0 RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
RC
chmod 600 ~/.ray/auth_token
