#!/bin/sh
# Make sure that this machine has Python's venv module and FFmpeg's shared libraries, which torchcodec loads.
# Installs with apt as root, else says what to do. Usage: system_packages.sh PYTHON
set -eu
python=${1:-python3}
missing=""
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "Python 3.11 or newer is needed, '$python' is $("$python" --version 2>&1 || true). Use make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
# FFmpeg 4 to 8: libavutil.so.56 to 60
ldconfig -p 2>/dev/null | grep -Eq 'libavutil\.so\.(5[6-9]|60)' || missing="$missing ffmpeg"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing with apt:$missing"
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "These system packages are missing:$missing. Install them first, for example: sudo apt-get install$missing" >&2
    echo "(with conda: conda install -c conda-forge 'ffmpeg<9')" >&2
    exit 1
fi
