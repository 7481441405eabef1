"""Steer how a local language model decodes.

>>> from steersman.core import load, stream
>>> model = load("smollm2")
>>> for event in stream(model, "Once upon a time", profile="balanced", seed=0):
...     print(getattr(event, "text", ""), end="")

Names are imported when first used, so that importing this package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Generation as Generation
    from .api import Score as Score
    from .api import generate as generate
    from .api import load as load
    from .api import open_session as open_session
    from .api import score as score
    from .api import stream as stream
    from .errors import SteersmanError as SteersmanError
    from .profile import Profile as Profile
    from .profile import list_profiles as list_profiles
    from .profile import load_profile as load_profile
    from .reranking import rerank as rerank
    from .retrieval import build_index as build_index
    from .retrieval import open_index as open_index
    from .retrieval import search as search
    from .roles import load_roles as load_roles

_HOMES = {
    "Generation": "api",
    "Score": "api",
    "generate": "api",
    "load": "api",
    "open_session": "api",
    "score": "api",
    "stream": "api",
    "SteersmanError": "errors",
    "Profile": "profile",
    "list_profiles": "profile",
    "load_profile": "profile",
    "load_roles": "roles",
    "rerank": "reranking",
    "build_index": "retrieval",
    "open_index": "retrieval",
    "search": "retrieval",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
