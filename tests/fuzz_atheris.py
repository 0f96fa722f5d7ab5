"""Coverage-guided fuzzing of the parsers with atheris (libFuzzer), for as long as one likes:

    pip install atheris
    python tests/fuzz_atheris.py {log,tar,mp4,video} [CORPUS_FOLDER] -max_total_time=300

A finding is an exception other than the documented one, a run of more than `-timeout` seconds, or memory beyond
`-rss_limit_mb`; libFuzzer prints it and leaves the input in `crash-*`. The corpus of the tests is where it begins.
Python code is followed (our modules, tarfile, gzip); FFmpeg is not instrumented, so that `video` is blind there.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vjepa_ac_hf.recordings", "vjepa_ac_hf.building", "tarfile", "gzip"]):
    import gzip
    import tarfile  # noqa: F401

    from vjepa_ac_hf.recordings.log import RecordingError, parse_recording
    from vjepa_ac_hf.recordings.mp4 import check_mp4
    from vjepa_ac_hf.recordings.shards import list_shards, read_pairs
    from vjepa_ac_hf.recordings.video import VideoError, VideoReader

_FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def fuzz_log(data: bytes) -> None:
    with contextlib.suppress(RecordingError):
        parse_recording(data, "rec.jsonl", recorder_version="6.8")


def fuzz_tar(data: bytes) -> None:
    path = _FOLDER / "fuzzed.tar"
    path.write_bytes(data)
    for shard in list_shards([str(path)]):
        for _ in read_pairs(shard):
            pass


def fuzz_mp4(data: bytes) -> None:
    try:
        check_mp4(io.BytesIO(data))
    except ValueError as error:
        if type(error) is not ValueError:
            raise


def fuzz_video(data: bytes) -> None:
    with contextlib.suppress(VideoError):
        reader = VideoReader(data, "rec.mp4")
        reader.frames([0, reader.num_frames - 1])


def seeds(target: str) -> list[bytes]:
    import corpus
    from test_fuzz import small_tar

    if target == "log":
        return [case.log[:8000] for case in corpus.log_cases()]
    if target == "tar":
        return [small_tar()[0], gzip.compress(small_tar()[0])] + [case.data for case in corpus.shard_cases()]
    return [case.video for case in corpus.video_cases()]


def main() -> None:
    targets = {"log": fuzz_log, "tar": fuzz_tar, "mp4": fuzz_mp4, "video": fuzz_video}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(__doc__)
    target, arguments = sys.argv[1], sys.argv[2:]
    if not any(not argument.startswith("-") for argument in arguments):
        folder = _FOLDER / "seeds"
        folder.mkdir()
        for index, data in enumerate(seeds(target)):
            if len(data) <= 200_000:
                (folder / f"{index:04d}").write_bytes(data)
        arguments = [str(folder), *arguments]
    atheris.Setup([sys.argv[0], "-timeout=20", "-rss_limit_mb=3000", "-max_len=200000", *arguments], targets[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
