# Sourced by scripts/demo and scripts/test: one virtual environment in .venv, installed once per state of pyproject.toml.
# Usage: ensure_venv EXTRAS      e.g. ensure_venv dev; leaves $PYTHON pointing into it.

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "$1"
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "zepad-mm needs Python 3.11 or newer; none was found. Set PYTHON=/path/to/python3.11 and run again."
}

ensure_venv() {
  local extras="$1" stamp wanted log free
  stamp=.venv/zepad-installed-${extras:-base}
  wanted=$(cat pyproject.toml | cksum)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    free=$(df -Pk . | awk 'NR == 2 {print $4}')
    [ "$free" -gt 9000000 ] || [ -d .venv ] ||
      fail "installing takes about 8 GB and $((free / 1000000)) GB are free here; make room and run again."
    local python
    python=$(find_python) || exit 1
    [ -x .venv/bin/python ] || "$python" -m venv .venv || fail "could not make a virtual environment in .venv; see above."
    say "installing zepad-mm${extras:+[$extras]} into .venv (some minutes the first time; log in .venv/install.log) ..."
    log=.venv/install.log
    .venv/bin/python -m pip install --disable-pip-version-check -q -e ".${extras:+[$extras]}" >"$log" 2>&1 || {
      tail -n 5 "$log" >&2
      fail "the installation failed: is the package registry reachable and the disk not full? Whole log: $log. Run again."
    }
    printf '%s' "$wanted" >"$stamp"
  fi
  PYTHON=.venv/bin/python
}
