"""Fetch the files of the guide's data set, from the Hugging Face Hub or from ModelScope.

A broken download goes on where it stopped, in the same run or in the next: what has arrived stays
in `<name>.partial`. The file gets its name when its size, and its sha256 where the site tells it,
are right. `HF_ENDPOINT` names a mirror of the Hub.

Left out: downloads in parallel, and private data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from minimind.checkpoint import fingerprint
from minimind.errors import UserError, bad_value, needed

HUB_NAME = "jingyaogong/minimind_dataset"
MODELSCOPE = "https://www.modelscope.cn/api/v1/datasets/gongjy/minimind_dataset/repo"
SOURCES = ("huggingface", "modelscope")
SHA256_DIGITS = 64


@dataclass
class Remote:
    """A file as a site describes it: bytes (0: not told) and sha256 as hex ("": not told)."""

    url: str
    size: int
    sha256: str = ""


def hub_file(name: str) -> Remote | None:
    """Return where the Hub (or its mirror) has a file, or None. The etag of a large one is its hash."""
    hub = needed("huggingface_hub", "course")
    try:
        found = hub.get_hf_file_metadata(hub.hf_hub_url(HUB_NAME, name, repo_type="dataset"))
    except hub.errors.EntryNotFoundError:
        return None
    etag = found.etag or ""
    return Remote(found.location, found.size or 0, etag if len(etag) == SHA256_DIGITS else "")


def hub_sizes() -> dict[str, int]:
    """Return what the data set holds on the Hub: the name of every file, and its bytes."""
    hub = needed("huggingface_hub", "course")
    entries = hub.HfApi().list_repo_tree(HUB_NAME, repo_type="dataset", recursive=True)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def modelscope_files() -> dict[str, Remote]:
    """Return what the data set holds on ModelScope, by name."""
    session = needed("huggingface_hub", "course").utils.get_session()  # any HTTP client would do
    reply = session.get(f"{MODELSCOPE}/tree?Revision=master&Root=&PageSize=1000")
    reply.raise_for_status()
    return {
        entry["Path"]: Remote(
            f"{MODELSCOPE}?Revision=master&FilePath={quote(entry['Path'])}",
            entry["Size"],
            entry.get("Sha256") or "",
        )
        for entry in reply.json()["Data"]["Files"]
        if entry["Type"] == "blob"
    }


def find(name: str, source: str) -> Remote:
    """Return where a site has a file. UserError that lists what there is, if it has no such file."""
    if source not in SOURCES:
        raise bad_value("source", source, SOURCES)
    needed("huggingface_hub", "course")
    try:
        if source == "huggingface":
            remote = hub_file(name)
            sizes = {} if remote else hub_sizes()
        else:
            files = modelscope_files()
            remote, sizes = files.get(name), {known: file.size for known, file in files.items()}
    except Exception as error:  # the hub's own errors, and those of whichever HTTP library it uses
        raise UserError(
            f"{source} does not answer for {name} ({_reason(error)}). Is there a network? HF_ENDPOINT "
            "names a mirror of the Hub, and --source modelscope is another site."
        ) from error
    if remote is None:
        listed = "\n".join(
            f"{size / 1e6:12,.1f} MB  {known}" for known, size in sorted(sizes.items())
        )
        raise UserError(f"{source} has no {name} in its data set, which holds\n{listed}")
    return remote


def download(name: str, folder: str | Path = "dataset", source: str = "huggingface") -> Path:
    """Fetch one file of the data set, and return where it is.

    Args:
        name: such as "pretrain_hq"; `.jsonl` may be left out.
        source: "huggingface" or "modelscope".

    Raises:
        UserError: no such file (what there is is listed), no connection, or what has arrived has
            another size or hash than the site says.
    """
    name = name if "." in name else f"{name}.jsonl"
    remote, path = find(name, source), Path(folder) / name
    if path.is_file() and not fault_of(path, remote):
        print(f"{path} is there already, and whole.")
        return path
    partial = path.with_name(path.name + ".partial")
    fetch(remote, partial)
    fault = fault_of(partial, remote)
    if fault:
        partial.unlink()
        raise UserError(f"What arrived as {name} {fault}. It was removed; download it again.")
    partial.replace(path)
    return path


def fetch(remote: Remote, partial: Path) -> None:
    """Append to `partial` what it still lacks. UserError if that breaks off; what came stays."""
    http_get = needed("huggingface_hub.file_download", "course").http_get
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as file:
            if not file.tell() <= remote.size:  # of another version, or nobody knows how long
                file.seek(0)
                file.truncate()
            http_get(remote.url, file, resume_size=file.tell(), expected_size=remote.size or None,
                     displayed_filename=partial.stem)  # fmt: skip
    except Exception as error:  # as in `find`; a full disk too
        have = partial.stat().st_size if partial.exists() else 0
        raise UserError(
            f"{partial.stem}: the download broke off at {have / 1e6:,.1f} of {remote.size / 1e6:,.1f} MB "
            f"({_reason(error)}). The same command goes on from there."
        ) from error


def fault_of(path: Path, remote: Remote) -> str | None:
    """Return in what a file differs from the site's, or None."""
    size = path.stat().st_size
    if remote.size and size != remote.size:
        return f"has {size:,} bytes instead of {remote.size:,}"
    if remote.sha256 and fingerprint(path) != remote.sha256:
        return f"has another sha256 than {remote.sha256}"
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
