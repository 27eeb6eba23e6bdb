#!/usr/bin/env bash
# Every node of a `ray up` cluster: a virtual environment with the project, versions as in constraints.txt.
#   bash node.sh [EXTRAS]       EXTRAS of pyproject.toml, such as `aws,head`
# Takes minutes on a new node; an image of your own that holds ~/venv saves them.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x ~/venv/bin/python ]; then
    python3 -c 'import ensurepip' 2>/dev/null || {
        sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
        sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y python3-venv
    }
    python3 -m venv ~/venv
fi
~/venv/bin/python -m pip install -q -c cluster/constraints.txt -e ".${1:+[$1]}"

# Ray runs each command in a login shell of its own, which reads ~/.bashrc.
grep -qs bimask-node ~/.bashrc ||
    echo 'export PATH="$HOME/venv/bin:$PATH" RAY_AUTH_MODE=token  # bimask-node' >> ~/.bashrc
chmod 600 ~/.ray/auth_token
