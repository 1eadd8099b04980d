"""``jetway clean --keep N``: frees what only older runs needed. All runs keep their numbers and charts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jetway.tasks import environment
from jetway.tasks.errors import ConfigError
from jetway.tasks.store import Store, jetway_home
from jetway.tasks.table import human_bytes
from jetway.tasks.tracking.index import KEY_TAG, MlflowStageIndex, used_keys
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import HOST_TAG, RunRecord

#: Kinds of artifacts that an older run loses in the embedded database: large, and made again by a new run.
LARGE_KINDS = ("checkpoint", "onnx", "engine", "tensors", "package")


@dataclass(frozen=True)
class CleanReport:
    """What a clean-up did. ``freed_bytes`` counts files whose last copy went."""

    kept_runs: int
    removed_files: int
    removed_entries: int
    removed_folders: int
    freed_bytes: int

    def __str__(self) -> str:
        return (
            f"freed {human_bytes(self.freed_bytes)}: {self.removed_files} files, {self.removed_entries} "
            f"recorded stages, {self.removed_folders} work folders; {self.kept_runs} runs keep all they need"
        )


def clean(keep: int, *, tracker: Tracker | None = None, store: Store | None = None) -> CleanReport:
    """Keeps what the ``keep`` newest pipeline runs of this home need, and what is in use; removes the rest.

    The runs of champions stay whole too: nights to come are held against them. Removed are store files, folders
    that a killed stage would resume from, orphaned temporary folders, and, in the embedded database, recorded
    stages and older runs' copies of their large files. A MLflow server of your own may serve others, so nothing
    there is touched: its recorded stages bring the files back.
    """
    if keep < 0:
        raise ConfigError(f"clean: --keep is {keep}; give the number of newest runs to keep, 0 or more.")
    return _Cleaning(keep, tracker or Tracker(), store or Store()).run()


class _Cleaning:
    """One clean-up: first all that must stay is known, then the rest goes."""

    def __init__(self, keep: int, tracker: Tracker, store: Store) -> None:
        self.tracker, self.store = tracker, store
        tracker.reap()
        runs = [run for run in tracker.pipeline_runs() if self._ours(run)]
        running = [run for run in runs if run.status == "RUNNING"]
        champions = {champion.run_id for champion in tracker.champions()}
        kept = [
            run
            for number, run in enumerate(runs)
            if number < keep or run in running or run.run_id in champions
        ]
        self.kept_runs = len(kept)
        self.kept = self._with_fallbacks(kept)
        self.older = self._with_fallbacks([run for run in runs if run not in kept])
        self.in_use_since_s = _oldest_s(running)
        self.freed_bytes = 0

    def run(self) -> CleanReport:
        keys = set().union(*(used_keys(self.tracker, run.run_id) for run in self.kept))
        index = MlflowStageIndex(self.tracker, self.store)
        entries = index.entries()
        kept_entries = [entry for entry in entries if self._needed(entry, keys)]
        digests = self._digests([*self.kept, *self._children(self.kept), *kept_entries])
        removed_entries = 0
        if self.tracker.embedded:
            removed_entries = self._remove_entries([e for e in entries if e not in kept_entries])
            self._remove_large_files([*self.older, *self._children(self.older)])
        return CleanReport(
            kept_runs=self.kept_runs,
            removed_files=self._remove_store_files(digests),
            removed_entries=removed_entries,
            removed_folders=self._remove_folders(),
            freed_bytes=self.freed_bytes,
        )

    def _ours(self, run: RunRecord) -> bool:
        return self.tracker.embedded or run.tags.get(HOST_TAG) == environment.host_id()

    def _needed(self, entry: RunRecord, keys: set[str]) -> bool:
        if entry.status != "FINISHED":
            return entry.status == "RUNNING"
        paths = [self.store.path_of(handle) for handle in self.tracker.files(entry.run_id).values()]
        return entry.tags.get(KEY_TAG) in keys or any(self._in_use(path) for path in paths)

    def _in_use(self, path: Path) -> bool:
        """Whether a running pipeline may have made or taken up the file."""
        return path.exists() and path.stat().st_mtime >= self.in_use_since_s

    def _with_fallbacks(self, runs: Sequence[RunRecord]) -> list[RunRecord]:
        return [*runs, *(tried for run in runs for tried in self.tracker.fallbacks(run.run_id))]

    def _children(self, runs: Iterable[RunRecord]) -> list[RunRecord]:
        return [child for run in runs for child in self.tracker.children(run.run_id)]

    def _digests(self, runs: Iterable[RunRecord]) -> set[str]:
        return {handle.sha256 for run in runs for handle in self.tracker.files(run.run_id).values()}

    def _remove_entries(self, entries: Sequence[RunRecord]) -> int:
        for entry in entries:
            folder = self.tracker.local_folder(entry.run_id)
            self.tracker.delete_run(entry.run_id)
            if folder is not None:
                self._remove_tree(folder.parent)
        return len(entries)

    def _remove_large_files(self, runs: Iterable[RunRecord]) -> None:
        for run in runs:
            folder = self.tracker.local_folder(run.run_id)
            for path, handle in self.tracker.files(run.run_id).items():
                if folder is not None and handle.kind in LARGE_KINDS:
                    self._unlink(folder / path)

    def _remove_store_files(self, digests: set[str]) -> int:
        files = [path for path in self.store.root.glob("??/*") if path.is_file()]
        unneeded = [path for path in files if path.stem not in digests and not self._in_use(path)]
        for path in unneeded:
            self._unlink(path)
        return len(unneeded)

    def _remove_folders(self) -> int:
        """A killed run that is kept may resume from its folder, so younger folders than it stay."""
        resume_since_s = min(self.in_use_since_s, _oldest_s(self.kept))
        work = [path for path in _folders(jetway_home() / "work") if path.stat().st_mtime < resume_since_s]
        scratch = [path for path in _folders(self.store.root / "tmp") if not self._in_use(path)]
        for folder in (*work, *scratch):
            self._remove_tree(folder)
        return len(work) + len(scratch)

    def _remove_tree(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                self._unlink(path)
        if folder.exists():
            folder.rmdir()

    def _unlink(self, path: Path) -> None:
        if not path.exists():
            return
        state = path.lstat()
        path.unlink()
        self.freed_bytes += state.st_size if state.st_nlink == 1 else 0


def _oldest_s(runs: Iterable[RunRecord]) -> float:
    """When the oldest of the runs began, in seconds since 1970; in a moment, if there is none."""
    return min((run.started_ms / 1000 for run in runs), default=time.time() + 1)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.glob("*") if path.is_dir()]
