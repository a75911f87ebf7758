"""Named contents -> a folder that appears at once and whole, with a manifest; and back, verified.

A folder is made under a temporary name beside its place: files are written and synced, the manifest last,
then the folder is synced, renamed, and its parent synced. Whatever interrupts this, a reader finds the folder
whole or not at all. The manifest holds size and sha256 of each file, and ends with its own sha256: that of
its content without this field, as canonical JSON.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cllm_spheres.checkpoint.disk import Disk, remove_tree
from cllm_spheres.errors import InputError, shown

MANIFEST = "manifest.json"
FORMAT = 1  # raised when a reader of today could not understand a checkpoint of tomorrow
CHUNK = 1 << 20  # bytes: written while still in the cache from hashing
MANIFEST_BYTES = 1 << 16  # a real one has about 700

TEMPORARY = re.compile(r"\.tmp-([0-9]{1,10})-([0-9]{1,20})-[0-9]+")  # process, its start in ticks, number
_numbers = itertools.count()
_in_use: set[str] = set()  # temporary names that this process is busy with


class Damaged(InputError):
    """A checkpoint is not what was written: `reason` names the file, what was expected and what was found."""

    def __init__(self, path: Path, reason: str) -> None:
        self.what = f"The checkpoint {path} is damaged: {reason}."
        super().__init__(f"{self.what} Choose another with --checkpoint; --resume takes the newest good one.")
        self.path = path
        self.reason = reason


class NewFolder:
    """A folder in the making. Exactly one of `publish`, `place` and `discard` ends it."""

    def __init__(self, parent: Path, disk: Disk) -> None:
        self.disk = disk
        self.path = temporary(parent)
        self.files: dict[str, dict[str, Any]] = {}
        self._exchanged = False  # `path` holds what had the target's name before
        try:
            disk.create_folder(self.path)
        except BaseException:
            release(self.path)
            raise

    def write(self, name: str, chunks: Iterable[memoryview]) -> None:
        """One synced file, and its entry for the manifest. Chunks must not change meanwhile."""
        path, size, digest = self.path / name, 0, hashlib.sha256()
        descriptor = self.disk.create(path)
        try:
            for chunk in chunks:
                for start in range(0, len(chunk), CHUNK):
                    piece = chunk[start : start + CHUNK]
                    digest.update(piece)
                    self.disk.write(descriptor, path, piece)
                    size += len(piece)
            self.disk.sync(descriptor, path)
        finally:
            os.close(descriptor)
        self.files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def publish(self, target: Path, step: int) -> None:
        """Write the manifest and give the folder its name; what had that name before is removed."""
        content = {"format": FORMAT, "step": step, "files": dict(sorted(self.files.items()))}
        self.write(MANIFEST, [memoryview(seal(content))])
        self.place(target)

    def place(self, target: Path) -> None:
        """Give the folder its name as it is; what had that name before is removed."""
        self.disk.sync_folder(self.path)
        if not target.exists():
            self.disk.rename(self.path, target)
            self.disk.sync_folder(target.parent)
        else:
            old = self._exchange(target)
            try:
                self.disk.sync_folder(target.parent)
                with contextlib.suppress(OSError):  # the new one is safe; the next save tries again
                    remove_tree(old, self.disk)
            finally:
                release(old)
        release(self.path)

    def _exchange(self, target: Path) -> Path:
        try:
            self.disk.exchange(self.path, target)
            self._exchanged = True
            return self.path
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        # Some network file systems cannot swap: between these two renames the step does not exist. Whoever
        # dies there leaves it whole under a temporary name, and Store.tidy gives it its own back.
        old = temporary(target.parent)
        try:
            self.disk.rename(target, old)
            try:
                self.disk.rename(self.path, target)
            except OSError:
                with contextlib.suppress(OSError):
                    self.disk.rename(old, target)
                raise
        except BaseException:
            release(old)
            raise
        return old

    def discard(self) -> None:
        """Remove what was made so far; what cannot be removed is left to `tidy`."""
        with contextlib.suppress(OSError):
            if self._exchanged:  # not synced yet: after a power cut it could have its name again
                self.disk.sync_folder(self.path.parent)
            remove_tree(self.path, self.disk)
        release(self.path)


def remove_whole(path: Path, disk: Disk) -> None:
    """Remove a folder so that no part of it is ever seen under its name, power cuts included."""
    aside = temporary(path.parent)
    try:
        disk.rename(path, aside)
        disk.sync_folder(path.parent)
        remove_tree(aside, disk)
    finally:
        release(aside)


def sync_whole(path: Path, disk: Disk) -> None:
    """A folder that somebody else wrote, and its files: synced, because its writer may have died before that."""
    for entry in sorted(path.iterdir()):
        descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            disk.sync(descriptor, entry)
        finally:
            os.close(descriptor)
    disk.sync_folder(path)


def temporary(parent: Path) -> Path:
    """A free name that says whose it is; `release` ends its use."""
    name = f".tmp-{os.getpid()}-{_start_of(os.getpid()) or 0}-{next(_numbers)}"
    _in_use.add(name)
    return parent / name


def release(path: Path) -> None:
    _in_use.discard(path.name)


def leftovers(parent: Path) -> list[Path]:
    """The temporary entries of dead processes, and those that this one has given up; never those in use."""
    found = []
    for entry in sorted(parent.iterdir()):
        match = TEMPORARY.fullmatch(entry.name)
        if match is not None and entry.name not in _in_use:
            pid, start = int(match[1]), int(match[2])
            if pid == os.getpid() or not _alive(pid, start):
                found.append(entry)
    return found


def _alive(pid: int, start: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    found = _start_of(pid)
    return found is None or start in (found, 0)


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: a process number alone may be used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in b"ZX" else int(fields[19])  # a zombie is dead
    except (OSError, ValueError, IndexError):
        return None


def seal(content: dict[str, Any]) -> bytes:
    """The bytes of a manifest."""
    own = hashlib.sha256(canonical(content)).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1).encode() + b"\n"


def canonical(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The verified manifest of a folder, without looking at the files themselves. Raises Damaged."""
    data = read_bytes(path, MANIFEST, MANIFEST_BYTES)
    content = parse(path, MANIFEST, data)
    content.pop("sha256", None)
    try:
        sealed = seal(content)
    except (ValueError, RecursionError):  # NaN, or nested too deeply
        sealed = b""
    if data != sealed:  # any other spelling of the same content is a changed byte too
        raise Damaged(path, f"{MANIFEST} does not match its own sha256")
    if content.get("format") != FORMAT:
        raise Damaged(path, f"{MANIFEST} has format {shown(content.get('format'))}, this version reads {FORMAT}")
    files = content.get("files")
    if type(content.get("step")) is not int or content["step"] < 0 or not isinstance(files, dict):
        raise Damaged(path, f"{MANIFEST} names no step and files")
    for name, entry in files.items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            raise Damaged(path, f"{MANIFEST} gives no size for {shown(name)}")
    return content


def verify(path: Path, name: str, entry: dict[str, Any], contents: bool = True) -> None:
    """A file has the size, and unless `contents` is off the sha256, of its manifest entry. Raises Damaged."""
    with _open(path, name) as descriptor:
        size = _fstat_size(descriptor)
        if size != entry["bytes"]:
            raise Damaged(path, f"{name} has {size:,} bytes, its manifest says {entry['bytes']:,}")
        if not contents:
            return
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        while count := os.readv(descriptor, [buffer]):
            digest.update(buffer[:count])
    if digest.hexdigest() != entry.get("sha256"):
        expected = str(entry.get("sha256"))[:16]
        raise Damaged(path, f"{name} has sha256 {digest.hexdigest()[:16]}..., its manifest says {expected}...")


def read_bytes(path: Path, name: str, limit: int) -> bytes:
    """A whole small file. Raises Damaged where it cannot be read or has more than `limit` bytes."""
    with _open(path, name) as descriptor:
        size = _fstat_size(descriptor)
        if size > limit:
            raise Damaged(path, f"{name} has {size:,} bytes, at most {limit:,} were expected")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)


def parse(path: Path, name: str, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises Damaged."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Damaged(path, f"{name} holds no JSON object")
    return value


@contextlib.contextmanager
def _open(path: Path, name: str) -> Iterator[int]:
    """A regular file for reading; whatever fails, at opening or at reading, is Damaged."""
    try:
        descriptor = os.open(path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo must not block
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Damaged(path, f"{name} is not a file")
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise Damaged(path, f"{name} is missing") from None
    except OSError as error:
        raise Damaged(path, f"{name} cannot be read: {error.strerror}") from None


def _fstat_size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size
