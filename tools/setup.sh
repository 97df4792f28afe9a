#!/bin/sh
# Makes or brings up to date the virtual environment of a clone: tools/setup.sh PYTHON VENV REQUIREMENTS
#
# Needs nothing but a Python >= 3.11 with its venv module, and the registry that pip is configured for. Every package is
# pinned and hashed, the build backend too, so nothing is resolved and nothing unknown is fetched.
set -eu
python=$1 venv=$2 requirements=$3

fail() {
    echo "setup: $*" >&2
    exit 1
}
is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

started=$(date +%s)
if ! "$venv/bin/python" -c '' 2>/dev/null; then # absent, or its interpreter is gone
    command -v "$python" >/dev/null || fail "'$python' is not there: install Python >= 3.11, or name one with 'make PYTHON=/path/to/python3'"
    is_supported "$python" || fail "'$python' is $("$python" --version 2>&1 | head -n 1): shardlab needs Python >= 3.11; name one with 'make PYTHON=/path/to/python3'"
    echo "setup: $venv from $("$python" --version 2>&1)"
    "$python" -m venv --clear "$venv" || fail "'$python' cannot make virtual environments (Debian: apt install python3-venv)"
fi
is_supported "$venv/bin/python" || fail "$venv holds $("$venv/bin/python" --version 2>&1): shardlab needs Python >= 3.11; remove the folder and try again"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null ||
    fail "$venv has no pip: remove the folder and try again"

echo "setup: $(grep -c '==' "$requirements") pinned packages of $requirements, which pip fetches where they are not there yet"
# --no-deps: the pins are complete, so pip need not resolve. --no-compile: Python compiles what is imported when it first
# is, about 4 s once, where compiling every file of every package costs 20 s and more.
install="$venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile"
$install --require-hashes --only-binary :all: -r "$requirements" || fail "pip could not install $requirements (see above)"
$install --no-build-isolation --editable . || fail "pip could not install shardlab itself (see above)"
# pip may have kept a package of another version's dependencies; a venv that contradicts itself must not pass for one that stands.
"$venv/bin/python" -m pip check >/dev/null || { "$venv/bin/python" -m pip check || fail "the packages in $venv do not fit each other (see above)"; }
echo "setup: $venv stands, $(($(date +%s) - started)) s"
