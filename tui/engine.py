"""The model behind the chat: opened when needed, switched between answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import common
from .roles import wanted

if TYPE_CHECKING:
    from steersman.core.decode.events import Event
    from steersman.core.model import Model
    from steersman.core.profile import Profile
    from steersman.core.roles import Roles

Opener = Callable[..., "Model"]


class ChatEngine:
    """The open models of all roles and the caches of one conversation, for one answer at a time.

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
        self._lock = threading.RLock()  # one answer, or one change of models, at a time

    @cached_property
    def roles(self) -> Roles:
        """What is open. Made when first needed, since it imports NumPy."""
        from steersman.core.roles import Roles

        return Roles(opener=self._opener)

    @property
    def models(self) -> Mapping[str, Model]:
        """The open models by role; none before the first answer."""
        return self.roles.models if "roles" in self.__dict__ else {}

    @property
    def model(self) -> Model | None:
        """What answers, once it is open."""
        return self.models.get("target")

    def choose(self, **changes: Any) -> None:
        """Use another model or backend from the next answer on."""
        self.args = replace(self.args, **changes)

    def ready(self, profile: Profile) -> bool:
        """Whether everything that ``profile`` needs is open, or nothing is yet and it needs little.

        A first model alone is opened when it first answers.
        """
        asked = wanted(self.args, profile, all_known=True)
        return self.roles.ready(asked) or (self.model is None and len(asked) == 1)

    def prepare(
        self,
        profile: Profile,
        *,
        opening: Callable[[str, str], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Model:
        """Return the model that speaks; the models of all roles are opened if need be.

        What no role needs any more is freed. When it fails or is cancelled, all stays as it was.
        """
        with self._lock:  # an answer that is being cancelled may still hold the caches
            asked = wanted(self.args, profile, all_known=True)
            self.roles.prepare(profile, asked, opening=opening, cancelled=cancelled)
            return self.roles.target

    def settle(self, profile: Profile) -> None:
        """Free what only an earlier profile needed, unless the engine is at work: then, later.

        Only for a profile that is :meth:`ready`; raises as :meth:`prepare` does.
        """
        if self.model is not None and self._lock.acquire(blocking=False):
            try:
                self.prepare(profile)
            finally:
                self._lock.release()

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

        with self._lock:
            model = self.prepare(profile)
            yield from stream(
                model,
                messages,
                profile=profile,
                session=self.roles.sessions,
                models=self.roles.models,
                cancel=cancel,
                **options,
            )

    @property
    def context(self) -> tuple[int, int]:
        """Tokens in the cache, and how many fit; (0, 0) before a model is open."""
        if self.model is None:
            return 0, 0
        return self.roles.sessions.used, self.roles.sessions.context

    def close(self) -> None:
        """Free the models, after the running answer has stopped."""
        with self._lock:
            if self.models:
                self.roles.close()
