"""Download VPT recordings (docs/data.md, "Downloading").

    python dataset_scripts/download_vpt.py --index FILE_OR_URL --output DIR [--limit N] [--match PATTERN]

Gets `<name>.mp4`, `<name>.jsonl` and, where there is one, `<name>-options.json` of every recording of the index, checks
that they are whole and belong together, and keeps the index's folders. The same command continues a run that was
stopped, from the bytes that are there, and transfers nothing of what is finished. What became of every recording is in
DIR/manifest.jsonl, what this run did in DIR/download_report.json. Exit status 0 only if everything selected is there
and verified (--allow_missing, --allow_rejected: but for that), 130 after an interrupt.
"""

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from vjepa_ac_hf.console import Parser


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--index", required=True, help="index file: path, http(s) URL, or hf://datasets/ORG/NAME[@revision][/folder]")
    add("--output", type=Path, required=True, help="folder of the recordings")
    add("--limit", type=int, metavar="N", help="the first N of those that pass the other filters")
    add("--match", metavar="PATTERN", help='glob on the relpath without suffix, such as "*/silly-*"; * matches / too')
    add("--recorder_version", nargs="+", metavar="V", help="only recordings below a folder of this name, such as 6.8")
    add("--no_options", action="store_true", help="leave out -options.json")
    add("--num_workers", type=int, default=8, help="recordings at a time (default: %(default)s)")
    add("--max_retries", type=int, default=8, help="a file, without progress (default: %(default)s)")
    add("--timeout", type=float, default=60.0, help="seconds without a byte (default: %(default)s)")
    add("--retry_rejected", action="store_true", help="download again what an earlier run rejected")
    add("--allow_missing", action="store_true", help="exit 0 although the server lacks recordings (404)")
    add("--allow_rejected", action="store_true", help="exit 0 although recordings are rejected")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import httpx2
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vjepa_ac_hf.downloading.index import RecordingIndex, Selection, read_index, select_recordings
from vjepa_ac_hf.downloading.recordings import (
    REPORT_NAME,
    DownloadError,
    DownloadOptions,
    DownloadReport,
    download_recordings,
)
from vjepa_ac_hf.downloading.transfer import TransferOptions
from vjepa_ac_hf.records import write_json

INTERRUPTED = 130


def download_options(arguments: argparse.Namespace) -> DownloadOptions:
    return DownloadOptions(
        num_workers=arguments.num_workers,
        with_options=not arguments.no_options,
        retry_rejected=arguments.retry_rejected,
        transfer=TransferOptions(max_retries=arguments.max_retries, read_timeout=arguments.timeout),
    )


async def transfer(
    selection: Selection, index: RecordingIndex, options: DownloadOptions, output: Path, report: DownloadReport
) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    total = len(selection.recordings)
    with tqdm(desc=f"0/{total} recordings", unit="B", unit_scale=True) as progress, logging_redirect_tqdm():
        num_done = 0

        def show_recording() -> None:
            nonlocal num_done
            num_done += 1
            progress.set_description(f"{num_done}/{total} recordings", refresh=False)

        await download_recordings(
            selection.recordings,
            output,
            report,
            options=options,
            headers=index.headers,
            on_bytes=progress.update,
            on_recording=show_recording,
        )


def download(arguments: argparse.Namespace) -> int:
    options, report = download_options(arguments), DownloadReport()
    index = read_index(arguments.index)
    selection = select_recordings(
        index, recorder_versions=arguments.recorder_version, match=arguments.match, limit=arguments.limit
    )
    left_out = ", ".join(f"{count} by {name}" for name, count in selection.left_out.items() if count) or "none"
    print(f"{len(selection.recordings)} of {len(index.entries)} recordings selected; left out: {left_out}")
    if selection.doubled:
        older, newer = next(iter(selection.doubled.items()))
        print(
            f"{len(selection.doubled)} recordings stand under several recorder versions, of which the newest is taken: "
            f"{newer}, not {older}"
        )
    interrupted = False
    try:
        asyncio.run(transfer(selection, index, options, arguments.output, report))
    except asyncio.CancelledError:
        interrupted = True
    finally:
        if report.selected and arguments.output.is_dir():
            filters = {"index": arguments.index, "indexed": len(index.entries), "left_out": selection.left_out}
            filters["doubled"] = selection.doubled
            write_json(arguments.output / REPORT_NAME, {**filters, **report.to_dict()})
    print(f"{report.summary()}; {arguments.output}")
    if interrupted:
        print("interrupted: the same command continues", file=sys.stderr)
        return INTERRUPTED
    complete = report.is_complete(allow_missing=arguments.allow_missing, allow_rejected=arguments.allow_rejected)
    return 0 if complete else 1


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # A job that is terminated ends like one that is interrupted, while the index is read too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse_arguments()
    try:
        return download(arguments)
    except httpx2.HTTPError as error:
        raise DownloadError(f"{arguments.index}: {error or type(error).__name__}") from error
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
