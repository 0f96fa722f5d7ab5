"""Which recordings there are to download: index files, data sets on the Hub, filters (docs/data.md, "Downloading")."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx2
import msgspec
from huggingface_hub import HfApi, hf_hub_url, parse_hf_uri
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, http_backoff

from ..recordings.names import recorder_version_of, recording_id_of, version_order
from ..recordings.shards import LOG_SUFFIX, VIDEO_SUFFIX, is_recording_file

OPTIONS_SUFFIX = "-options.json"
HUB_PREFIX = "hf://"

_INDEX_TIMEOUT = 60.0
_NUM_NAMED = 5


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server; `size` (bytes) and `sha256` (hexadecimal) are None where the index does not tell them."""

    url: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class RemoteRecording:
    """A recording to download.

    Attributes:
        relpath: path below the index's base, without suffix; files go to the same place below the output.
        files: by suffix, `.jsonl`, `.mp4` and `-options.json`. A data set on the Hub tells what is missing; an index
            file does not, so that all three are there and the server is asked.
    """

    relpath: str
    files: dict[str, RemoteFile]

    @property
    def recorder_version(self) -> str | None:
        return recorder_version_of(self.relpath)


@dataclass(frozen=True)
class RecordingIndex:
    """All recordings of an index, in its order (of the Hub: sorted).

    Attributes:
        source: where it was read from.
        entries: what it lists, each relpath once.
        repeated: entries left out because the same relpath comes before them.
        headers: HTTP headers that its files need (the Hub's token).
    """

    source: str
    entries: list[RemoteRecording]
    repeated: int = 0
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def recordings(self) -> list[RemoteRecording]:
        """Each recording once: of one under several recorder versions the newest."""
        return newest_versions(self.entries)[0]

    @property
    def doubled(self) -> int:
        """Entries that `recordings` leaves out."""
        return self.repeated + len(newest_versions(self.entries)[1])


@dataclass(frozen=True)
class Selection:
    """What is to be downloaded.

    Attributes:
        recordings: in the index's order.
        left_out: how many of the index's other entries each filter has left out.
        doubled: those that are the same recording under another recorder version: relpath, and the one taken instead.
    """

    recordings: list[RemoteRecording]
    left_out: dict[str, int]
    doubled: dict[str, str]


class _IndexFile(msgspec.Struct):
    basedir: str
    relpaths: list[str]


def read_index(source: str, *, endpoint: str | None = None) -> RecordingIndex:
    """Read an index file or list a data set on the Hub.

    Args:
        source: path or http(s) URL of a JSON file `{"basedir": ..., "relpaths": [...]}` as OpenAI publishes them
            (relpaths with or without `.mp4`), or `hf://datasets/ORG/NAME[@revision][/folder]`.
        endpoint: URL of the Hub; None: huggingface.co, or what `HF_ENDPOINT` says.

    Raises:
        ValueError: an index that cannot be read or is malformed, a relpath that would leave the output folder.
        OSError: a local file that cannot be read.
        httpx2.TransportError: a server that cannot be reached.
    """
    if source.startswith(HUB_PREFIX):
        return _list_hub_data_set(source, endpoint)
    if source.startswith(("http://", "https://")):
        return _parse_index(_get_index(source), source)
    return _parse_index(Path(source).read_bytes(), source)


def newest_versions(
    recordings: Sequence[RemoteRecording],
) -> tuple[list[RemoteRecording], list[tuple[RemoteRecording, RemoteRecording]]]:
    """Each recording once, by its name: of several recorder versions the newest, of equal ones the first.

    Returns:
        Those to take, in order, and the others, each with the one taken instead.
    """
    taken: dict[str, RemoteRecording] = {}
    for recording in recordings:
        known = taken.get(name := recording_id_of(recording.relpath))
        if known is None or version_order(recording.recorder_version) > version_order(known.recorder_version):
            taken[name] = recording
    chosen = [(recording, taken[recording_id_of(recording.relpath)]) for recording in recordings]
    kept = [recording for recording, newest in chosen if recording is newest]
    return kept, [(recording, newest) for recording, newest in chosen if recording is not newest]


def select_recordings(
    index: RecordingIndex,
    *,
    recorder_versions: Sequence[str] | None = None,
    match: str | None = None,
    limit: int | None = None,
) -> Selection:
    """Filter an index; its order stays.

    Args:
        index: what there is.
        recorder_versions: keep recordings below one of these folders, such as `6.8`; None keeps all.
        match: keep recordings whose relpath, without suffix, matches this glob (`*` matches `/` too, case counts).
        limit: keep that many of those that pass the other filters, the first ones.

    Raises:
        ValueError: filters that leave nothing; the message has counts.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    left_out = {"doubled": index.repeated, "recorder_version": 0, "match": 0, "limit": 0}
    kept = index.entries
    if recorder_versions is not None:
        kept = [recording for recording in kept if recording.recorder_version in recorder_versions]
        left_out["recorder_version"] = len(index.entries) - len(kept)
    if match is not None:
        before, kept = kept, [recording for recording in kept if fnmatch.fnmatchcase(recording.relpath, match)]
        left_out["match"] = len(before) - len(kept)
    if not kept:
        found = sorted({recording.recorder_version or "none" for recording in index.entries})
        first = index.entries[0].relpath if index.entries else "none"
        raise ValueError(
            f"{index.source}: no recording is left of {len(index.entries)}: recorder versions asked for "
            f"{recorder_versions and list(recorder_versions)}, found {found}; match {match!r}, first relpath {first!r}"
        )
    kept, doubled = newest_versions(kept)
    left_out["doubled"] += len(doubled)
    left_out["limit"] = len(kept) - len(kept[:limit])
    taken = {recording.relpath: newest.relpath for recording, newest in doubled}
    return Selection(kept[:limit], left_out, taken)


# ---------------------------------------------------------------------------------------------------- index files


def _get_index(url: str) -> bytes:
    try:
        response = http_backoff("GET", url, timeout=_INDEX_TIMEOUT)
        response.raise_for_status()
    except (httpx2.HTTPStatusError, HfHubHTTPError) as error:
        raise ValueError(f"{url}: cannot get the index: HTTP {error.response.status_code}") from error
    return response.content


def _parse_index(content: bytes, source: str) -> RecordingIndex:
    try:
        index = msgspec.json.decode(content, type=_IndexFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        expected = '{"basedir": URL, "relpaths": [...]}'
        raise ValueError(f"{source}: not an index file, expected {expected}: {error}") from error
    base = _base_url(index.basedir, source)
    stems = [relpath.removesuffix(VIDEO_SUFFIX).removesuffix(LOG_SUFFIX) for relpath in index.relpaths]
    _refuse_unsafe(stems, source)
    unique = list(dict.fromkeys(stems))
    recordings = [
        RemoteRecording(
            stem,
            {
                suffix: RemoteFile(f"{base}/{quote(stem)}{suffix}")
                for suffix in (LOG_SUFFIX, VIDEO_SUFFIX, OPTIONS_SUFFIX)
            },
        )
        for stem in unique
    ]
    return RecordingIndex(source, recordings, repeated=len(stems) - len(unique))


def _base_url(basedir: str, source: str) -> str:
    try:
        url = httpx2.URL(basedir)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{source}: field 'basedir': expected an http(s) URL, found {basedir!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ValueError(f"{source}: field 'basedir': expected an http(s) URL without query, found {basedir!r}")
    return basedir.rstrip("/")


def _refuse_unsafe(relpaths: Sequence[str], source: str) -> None:
    """An index comes from elsewhere and decides where files are written: nowhere but below the output folder."""
    unsafe = [relpath for relpath in relpaths if not _is_safe(relpath)]
    if unsafe:
        raise ValueError(
            f"{source}: {len(unsafe)} of {len(relpaths)} relpaths are refused, expected folder/name below the output "
            "folder (no absolute path, no '..', no backslash, no control character, not hidden, not 'manifest'), "
            f"found {unsafe[:_NUM_NAMED]}{' ...' if len(unsafe) > _NUM_NAMED else ''}"
        )


def _is_safe(relpath: str) -> bool:
    parts = relpath.split("/")
    return (
        is_recording_file(relpath + LOG_SUFFIX)  # what nothing here would read is not worth getting
        and not any(part in ("", ".", "..") for part in parts)
        and not re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", relpath)
        and not re.match(r"[A-Za-z]:", relpath)
    )


# ---------------------------------------------------------------------------------------------------- the Hub


def _list_hub_data_set(source: str, endpoint: str | None) -> RecordingIndex:
    """Recordings of a data set at one commit, which is fixed here: what is pushed meanwhile is not mixed in."""
    place = parse_hf_uri(source)
    if place.type != "dataset":
        raise ValueError(f"{source}: expected hf://datasets/ORG/NAME[@revision][/folder], found a {place.type}")
    api = HfApi(endpoint=endpoint)
    try:
        commit = api.repo_info(place.id, repo_type="dataset", revision=place.revision).sha
        entries = list(
            api.list_repo_tree(
                place.id, place.path_in_repo or None, recursive=True, revision=commit, repo_type="dataset"
            )
        )
    except HfHubHTTPError as error:
        raise ValueError(f"{source}: cannot list the data set: {' '.join(str(error).split())}") from error
    found: dict[str, dict[str, RemoteFile]] = {}
    options: dict[str, RemoteFile] = {}
    for entry in sorted((entry for entry in entries if isinstance(entry, RepoFile)), key=lambda entry: entry.path):
        url = hf_hub_url(place.id, entry.path, repo_type="dataset", revision=commit, endpoint=endpoint)
        file = RemoteFile(url, entry.size, entry.lfs.sha256 if entry.lfs else None)
        for suffix in (VIDEO_SUFFIX, LOG_SUFFIX):
            if is_recording_file(entry.path) and entry.path.endswith(suffix):
                found.setdefault(entry.path.removesuffix(suffix), {})[suffix] = file
        if entry.path.endswith(OPTIONS_SUFFIX):
            options[entry.path.removesuffix(OPTIONS_SUFFIX)] = file
    _refuse_unsafe(list(found), source)
    for stem in options.keys() & found.keys():
        found[stem][OPTIONS_SUFFIX] = options[stem]
    recordings = [RemoteRecording(stem, files) for stem, files in sorted(found.items())]
    return RecordingIndex(source, recordings, headers=build_hf_headers())
