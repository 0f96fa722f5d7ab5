#!/bin/sh
# The virtual environment with the package and all extras, once: whoever comes second waits for the first to be done.
# Usage: set_up.sh PYTHON VENV CONSTRAINTS [WHAT COMES AFTER]
set -eu
python=$1 venv=$2 constraints=$3 next=${4:-}
echo "== set-up: a virtual environment in $venv, FFmpeg where it is missing, torch and all other packages (some GB)."
echo "   3 minutes with a fast network; nothing is shown while a step goes on.${next:+ Then $next.}"
mkdir -p "$venv"
if command -v flock >/dev/null 2>&1; then
    exec 9>"$venv/.lock"
    flock -n 9 || { echo "   another make sets this clone up: waiting for it"; flock 9; }
fi
installed=$venv/.installed
if [ "$installed" -nt pyproject.toml ] && [ "$installed" -nt "$constraints" ]; then
    echo "   done by another make meanwhile"
    exit 0
fi
echo "   1/4 Python and FFmpeg"
sh .ci/system_packages.sh "$python"
echo "   2/4 virtual environment"
"$python" -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check -c $constraints"
echo "   3/4 torch"
$pip torch
echo "   4/4 all other packages"
$pip -e ".[dev]"
touch "$installed"
