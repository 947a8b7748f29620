# Sourced by the other scripts. Creates .venv and installs the extras once; a later run finds a stamp and skips this.
# Usage: source scripts/_env.sh EXTRAS
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extras=$1
stamp=.venv/.installed-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)-${extras//,/-}

fail() { echo "$*" >&2; exit 1; }

if [[ ! -e $stamp ]]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or newer is needed: install it, or name one with PYTHON=/path/to/python3.11"
  # libp2p needs fastecdsa, which is compiled against GMP.
  if ! { command -v cc >/dev/null && "$python" - <<'PY'
import pathlib, sys, sysconfig
python_h = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
gmp = [p for root in ("/usr/include", "/usr/local/include", "/opt/homebrew/include") for p in pathlib.Path(root).glob("**/gmp.h")]
sys.exit(not (python_h.exists() and gmp))
PY
  } || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    packages="gcc libgmp-dev python3-dev python3-venv"
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
      echo "Installing $packages"
      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages >/dev/null
    else
      fail "A C compiler, GMP's and Python's headers and venv are needed: sudo apt-get install $packages"
    fi
  fi
  echo "Installing dsd-p2p and its dependencies into .venv (a few minutes the first time)"
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  # Install torch first and pinned: otherwise pip would pick a build with gigabytes of CUDA.
  .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0
  .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  rm -f .venv/.installed-*
  touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
