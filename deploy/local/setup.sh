#!/usr/bin/env bash
# Makes .venv from the hashed locks. Needs Python 3.11 or newer; on Debian it also fetches python3-venv.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-}
for candidate in "$python" python3 python3.14 python3.13 python3.12 python3.11; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
  python=
done
if [ -z "$python" ]; then
  echo "Python 3.11 or newer is needed; install it, or name it: make setup PYTHON=/path/to/python3" >&2
  exit 1
fi

if [ ! -x .venv/bin/pip ]; then
  rm -rf .venv
  if ! "$python" -m venv .venv 2>/dev/null; then
    # Debian and Ubuntu have venv in a separate package.
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    sudo=$([ "$(id -u)" = 0 ] || echo "sudo -n")
    install_venv() { $sudo apt-get install -y --no-install-recommends "python$version-venv" >/dev/null; }
    if ! command -v apt-get >/dev/null ||
      ! { install_venv || { $sudo apt-get update >/dev/null && install_venv; }; }; then
      echo "$python cannot make virtual environments; install its venv module (Debian: python3-venv)" >&2
      exit 1
    fi
    rm -rf .venv
    "$python" -m venv .venv
  fi
fi

echo "Installing into .venv"
install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
"${install[@]}" --require-hashes -r requirements-dev.lock
"${install[@]}" --no-deps --no-build-isolation --editable .
touch .venv/.installed
