"""Uploads of a run: models go to the hub in the background, in the order of domains, and no failure ends the run."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from das_ds.config import RunConfig
from das_ds.errors import RunFolderError, first_line
from das_ds.progress import say
from das_ds.run_dir import RunDir
from das_ds.training.hub_upload import HubRecord, check_hub_names, hub_target, push_model

logger = logging.getLogger(__name__)

RETRY_SECONDS = (10.0, 60.0)
"""Waits between attempts; afterwards the next domain, or the next start of the run, tries again."""
POLL_SECONDS = 0.5


class HubUploads:
    """Uploads the models of a run on a thread of rank 0; nothing is done where `export.push_to_hub` is off.

    What was uploaded is recorded in the folder of each domain, so that a later start uploads what is missing. Models go
    in the order of domains: the main branch of a repository ends with the newest.

    Args:
        config: of the run.
        run_dir: of the run.

    Raises:
        ConfigError: the hub does not allow the name of a repository.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        self._config = config
        self._run_dir = run_dir
        self._is_enabled = config.export.push_to_hub
        self._waiting: deque[tuple[int, str]] = deque()
        """Index and name of stages."""
        self._queued: set[tuple[int, str]] = set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        if self._is_enabled:
            check_hub_names(config)

    def add(self, num_domains: int) -> None:
        """Upload the models of the first domains that are not on the hub yet."""
        if not self._is_enabled:
            return
        with self._lock:
            for stage in list(enumerate(self._config.stage_names))[:num_domains]:
                if stage not in self._queued and self._is_missing(*stage):
                    self._queued.add(stage)
                    self._waiting.append(stage)
            if self._waiting and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hub uploads", daemon=True)
                self._thread.start()

    def wait(self, is_stopped: Callable[[], bool]) -> bool:
        """Wait until every model is uploaded, or was given up; False: a stop was requested before.

        Args:
            is_stopped: asked twice a second; once it is true the remaining models are left to the next start.
        """
        while (thread := self._thread) is not None:
            thread.join(POLL_SECONDS)
            if thread.is_alive() and is_stopped():
                self._warn("the run was asked to stop")
                return False
        return True

    def _is_missing(self, index: int, name: str) -> bool:
        folder = self._run_dir.model(index, name)
        if not folder.is_dir():
            # Moved away by its user.
            return False
        path = self._run_dir.hub_record(index, name)
        try:
            return not (path.exists() and HubRecord.read(path).is_of(hub_target(self._config, name), folder))
        except (RunFolderError, OSError):
            return True

    def _run(self) -> None:
        for number, wait in enumerate((0.0, *RETRY_SECONDS)):
            time.sleep(wait)
            try:
                self._upload_all()
            # The client passes on any error of its HTTP and upload libraries.
            except Exception as error:
                if number < len(RETRY_SECONDS):
                    logger.warning("upload to the hub failed and is tried again: %s", first_line(error))
                else:
                    self._warn(first_line(error))
            else:
                return
        with self._lock:
            # Left to the next call of `add`.
            self._queued.difference_update(self._waiting)
            self._waiting.clear()
            self._thread = None

    def _upload_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                stage = self._waiting[0]
            self._upload(*stage)
            with self._lock:
                self._waiting.popleft()

    def _upload(self, index: int, name: str) -> None:
        target = hub_target(self._config, name)
        message = f"{self._config.output_dir.name}: after {name}"
        folder = self._run_dir.model(index, name)
        record = push_model(folder, target, message, private=self._config.export.hub_private_repo)
        record.write(self._run_dir.hub_record(index, name))
        say(f"uploaded {name} to {target.url}")

    def _warn(self, reason: str) -> None:
        """Say what is not uploaded, and how to do it by hand."""
        for index, name in list(self._waiting):
            folder = self._run_dir.model(index, name)
            commands = hub_target(self._config, name).commands(folder, private=self._config.export.hub_private_repo)
            logger.warning(
                "%s is not on the hub (%s); the model is in the run folder, and the next start of this command tries "
                "again; by hand: %s",
                name,
                reason,
                commands,
            )
