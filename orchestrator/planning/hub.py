"""Whether the Hugging Face Hub, or its cache on this disk, has a model: one request, at most 3 seconds.

A benchmark must not hang before its first line because a firewall drops packets. huggingface_hub's timeouts
limit each socket read, but neither the DNS lookup nor the total; so the request is made in a daemon thread,
which is abandoned at the deadline.
"""

import queue
import threading
from collections.abc import Callable

from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from orchestrator.errors import BadInput

DEADLINE_S = 3.0

# A cached config.json alone proves nothing: transformers fetches it before it asks for any weights.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

OTHER_SOURCES = "a local folder, a GGUF file or random:NAME"


def is_hub_id(text: str) -> bool:
    """Whether `text` could be a model id `org/name`; makes no request."""
    try:
        hf_hub_url(text, "config.json")
    except HFValidationError:
        return False
    return "/" in text


def require_hub_model(hub_id: str) -> None:
    """Return if the model `org/name` is in the Hub's cache on disk or on the Hub.

    Otherwise raises `BadInput` within 3 s; its text distinguishes an unreachable Hub from a refusal.
    """
    if _is_cached(hub_id):
        return
    if is_offline_mode():
        problem = "no such folder or file, not in the Hub's cache, and HF_HUB_OFFLINE is set"
        raise BadInput("--model", hub_id, problem, f"Unset HF_HUB_OFFLINE, or pass {OTHER_SOURCES}")
    failure = _ask_within(DEADLINE_S, lambda: _ask_hub(hub_id))
    if failure is not None:
        raise BadInput("--model", hub_id, *_explain(failure)) from failure


def _is_cached(hub_id: str) -> bool:
    def has(filename: str) -> bool:
        return isinstance(try_to_load_from_cache(hub_id, filename), str)

    return has("config.json") and any(map(has, WEIGHT_FILES))


def _ask_hub(hub_id: str) -> None:
    """HEAD of the model's config.json: one request, no retries."""
    get_hf_file_metadata(hf_hub_url(hub_id, "config.json"))


def _ask_within(limit_s: float, ask: Callable[[], None]) -> Exception | None:
    """What `ask` raised, None if it returned, or a TimeoutError after `limit_s` seconds."""
    answers: queue.Queue[Exception | None] = queue.Queue()

    def put_answer() -> None:
        try:
            ask()
        except Exception as failure:
            answers.put(failure)
        else:
            answers.put(None)

    threading.Thread(target=put_answer, name="ask-hub", daemon=True).start()
    try:
        return answers.get(timeout=limit_s)
    except queue.Empty:
        return TimeoutError(f"no answer within {limit_s:g} s")


def _explain(failure: Exception) -> tuple[str, str]:
    """The problem and the fix, as arguments of `BadInput`."""
    match failure:
        case GatedRepoError():
            problem = "a gated model on the Hub, and this account has no access"
            return problem, "Accept the terms on its page, then log in with `hf auth login` or set HF_TOKEN"
        case EntryNotFoundError():
            problem = "on the Hub, but without a config.json, so transformers can't load it"
            return problem, "Pass the id of the model in transformers format"
        case RepositoryNotFoundError() | HfHubHTTPError(response=object(status_code=404)):
            problem = "no such model on the Hub, or it is private"
            return problem, f"Check the spelling, set HF_TOKEN if it is private, or pass {OTHER_SOURCES}"
        case HfHubHTTPError(response=response):
            problem = f"the Hub answered with HTTP status {response.status_code}"
        case _:
            reason = str(failure) or type(failure).__name__
            problem = f"no such folder or file, and the Hub can't be reached ({reason})"
    return problem, f"Try again later, or pass {OTHER_SOURCES}"
