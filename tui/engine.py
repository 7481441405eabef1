"""The model behind the chat: opened when needed, switched between answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from steersman.core.decode.events import Event
    from steersman.core.decode.sessions import Sessions
    from steersman.core.model import Model
    from steersman.core.profile import Profile

Opener = Callable[..., "Model"]


class ChatEngine:
    """One open model and one conversation cache, used by one answer at a time.

    Choosing another model or engine takes effect with the next answer; until the new one is open
    the old one stays, so that a wrong name costs nothing.

    Parameters
    ----------
    args : ModelArgs
        What to open first.
    opener : callable
        ``steersman.core.load``, or a stand-in with the same parameters.
    """

    def __init__(self, args: common.ModelArgs, *, opener: Opener | None = None) -> None:
        self.args = args
        self._opener = opener
        self._opened: dict[str, Any] | None = None
        self._sessions: Sessions | None = None
        self._lock = threading.Lock()
        self.model: Model | None = None

    def choose(self, **changes: Any) -> None:
        """Use another model or backend from the next answer on."""
        self.args = replace(self.args, **changes)

    def prepare(self, profile: Profile) -> Model:
        """Return the model that ``profile`` and the choices so far ask for, opened if need be."""
        from steersman.core import load, open_session

        wanted = self.args.resolve(profile)
        if self.model is None or wanted != self._opened:
            model = (self._opener or load)(**wanted)
            self._release()
            self.model, self._opened = model, wanted
            self._sessions = open_session(model)
        return self.model

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        profile: Profile,
        *,
        cancel: threading.Event,
        **options: Any,
    ) -> Iterator[Event]:
        """Yield the events of ``steersman.core.stream``. Call from a worker thread."""
        from steersman.core import stream

        with self._lock:  # an answer that is being cancelled may still hold the cache
            model = self.prepare(profile)
            yield from stream(
                model, messages, profile=profile, session=self._sessions, cancel=cancel, **options
            )

    @property
    def context(self) -> tuple[int, int]:
        """Tokens in the cache, and how many fit; (0, 0) before a model is open."""
        if self._sessions is None:
            return 0, 0
        return self._sessions.used, self._sessions.context

    def _release(self) -> None:
        if self._sessions is not None:
            self._sessions.close()
        if self.model is not None:
            self.model.close()
        self._sessions = self.model = None

    def close(self) -> None:
        """Free the model, after the running answer has stopped."""
        with self._lock:
            self._release()
