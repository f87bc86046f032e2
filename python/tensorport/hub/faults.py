"""What huggingface_hub raises, told apart and in our words: what was found, and what to do."""

from typing import Final

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tensorport.errors import CheckpointError
from tensorport.hub.ids import HubId
from tensorport.reports import printable

__all__ = ["HUB_FAULTS", "explained", "is_transient", "words_of"]

HUB_FAULTS: Final[tuple[type[Exception], ...]] = (OSError, HfHubHTTPError.__bases__[0])
"""What its calls raise. Faults of the network are no OSErrors but those of the HTTP library below it, of which there
have been three; the second is their base in that one, as the base of answers with an error status."""

# Statuses of a server that may do better a moment later.
_TRANSIENT_STATUSES: Final = (408, 429, 500, 502, 503, 504)


def _unwrapped(fault: Exception) -> Exception:
    """What lies below "not in the cache either"."""
    cause = fault.__cause__
    return cause if isinstance(fault, LocalEntryNotFoundError) and isinstance(cause, Exception) else fault


def is_transient(fault: Exception) -> bool:
    """Whether another try may help: faults of the network and of the server, but not those of the local system."""
    fault = _unwrapped(fault)
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in _TRANSIENT_STATUSES
    if isinstance(fault, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return False
    if isinstance(fault, OSError):
        return fault.errno is None or isinstance(fault, ConnectionError | TimeoutError)
    return True


# What the hub refuses, the first that fits; a gated repository is to huggingface_hub one that is not found.
_REFUSALS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (
        GatedRepoError,
        "a gated repository, expected access to it: accept its terms at {hub}/{repo}, then log in with `hf auth login` "
        "or set HF_TOKEN",
    ),
    (
        RepositoryNotFoundError,
        "no such file or folder, and no repository {repo} at {hub}, expected a path or an id; a private repository "
        "needs `hf auth login` or HF_TOKEN",
    ),
    (RevisionNotFoundError, "no revision {revision!r} of {repo} at {hub}, expected a branch, a tag or a commit"),
    (EntryNotFoundError, "404 for a file that {repo} lists at {hub}, expected the file"),
    (DisabledRepoError, "that {hub} has disabled {repo}, expected one that can be read"),
)
_NO_ACCESS: Final = (
    "{status} at {hub}, expected access to {repo}: log in with `hf auth login` or set HF_TOKEN, with a token that may "
    "read it"
)


def explained(hub_id: HubId, fault: Exception) -> Exception:
    """The exception to raise for a fault that stays; faults of the local system are what they are."""
    fault = _unwrapped(fault)
    hub, repo, cache = constants.ENDPOINT, hub_id.repo, constants.HF_HUB_CACHE
    if isinstance(fault, HfHubHTTPError):
        status, revision = fault.response.status_code, hub_id.revision or constants.DEFAULT_REVISION
        refusal = next((text for kind, text in _REFUSALS if isinstance(fault, kind)), None)
        if refusal is None and status in (401, 403):
            refusal = _NO_ACCESS
        if refusal is not None:
            found = refusal.format(hub=hub, repo=repo, revision=revision, status=status)
            return CheckpointError(printable(f"{hub_id}: found {found}"))
    if isinstance(fault, OfflineModeIsEnabled):
        return ConnectionError(
            f"{hub_id}: found no such file or folder, and no whole copy of {repo} in {cache}, expected one: "
            "HF_HUB_OFFLINE is set; without it, the repository is downloaded"
        )
    if isinstance(fault, OSError) and not isinstance(fault, HfHubHTTPError) and not is_transient(fault):
        return fault
    return ConnectionError(
        f"{hub_id}: found no such file or folder, no whole copy of {repo} in {cache}, and no good answer from {hub} "
        f"({words_of(fault)}), expected one of them: what came so far is kept, and goes on where it stopped"
    )


def words_of(fault: Exception) -> str:
    """What a fault says, on one line."""
    return printable(" ".join(str(_unwrapped(fault)).split())) or type(fault).__name__
