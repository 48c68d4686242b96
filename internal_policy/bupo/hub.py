"""A trained model on the hub: what is uploaded, and one clear line for what the hub refuses."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from internal_policy.bupo.card import CARD, write_card
from internal_policy.bupo.results import MANIFEST, Run
from internal_policy.utils.errors import UserError, counted, is_http_error, shorten
from internal_policy.utils.logging import status

UPLOADED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", CARD),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken", "preprocessor_config.json", "*.py"),
)
"""What transformers loads a model from. All else stays here: an optimiser's state, a trainer's pickled arguments."""

_REFUSED_CARD = f"Invalid metadata in {CARD}"
"""How the hub's client begins to tell of a card's metadata, in an exception without a type of its own."""


def push_to_hub(
    run: Run, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None
) -> str:
    """Upload the trained model with its card to the hub; neither checkpoints nor the optimiser's state.

    Args:
        run: the run.
        repo_id: the repository, ``name`` or ``owner/name``; made where it does not exist.
        private: make it private, where it is made.
        token: of the hub; the one of ``HF_TOKEN`` or ``hf auth login`` where not given.
        revision: branch to upload to; made where it does not exist.

    Returns:
        The repository's address.

    Raises:
        UserError: the run has not ended, its model is gone, or the hub refuses or cannot be reached.
    """
    if not (run.path / MANIFEST).is_file():
        raise UserError(f"{run.path}: holds a run that has not ended (no {MANIFEST}); repeat its command, then push it")
    if not any(run.model_dir.glob("*.safetensors")):
        raise UserError(f"{run.model_dir}: holds no model (*.safetensors); train again with --overwrite, then push it")
    token = _checked(token)
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="internal_policy")
    with status(f"pushing {run.model_dir} to {repo_id}"):
        with _told_in_one_line(run, repo_id, token):
            made = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        write_card(run, made.repo_id)
        with _told_in_one_line(run, repo_id, token):
            if revision is not None:
                api.create_branch(made.repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=run.model_dir,
                revision=revision,
                allow_patterns=list(UPLOADED),
                commit_message=f"{run.label}, {counted(len(run.history), 'step')}",
            )
    return str(made)


def _checked(token: str | None) -> str | None:
    """Refuse a token that cannot stand in a request's header: the client's own message would show it."""
    if token is None:
        return None
    # What is read from a file ends in a line break.
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        what = "has characters that no token has" if token else "is empty"
        raise UserError(
            f"token= {what}; copy it again from the hub's settings, or leave it out and use `hf auth login`"
        )
    return token


@contextmanager
def _told_in_one_line(run: Run, repo_id: str, token: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into one line, which never has the token."""
    from huggingface_hub import errors as hub

    try:
        yield
    except Exception as error:
        # Of the client's own checks, of its upload's threads and Rust code, and of the network.
        if not isinstance(error, (hub.HfHubHTTPError, OSError, ValueError, RuntimeError)) and not is_http_error(error):
            raise
        line = _line(error, run, repo_id, _masked(str(error), token))
        chain = "".join(traceback.format_exception(error))
        # A traceback shows what an exception was raised from.
        raise UserError(line) from (error if _masked(chain, token) == chain else None)


def _line(error: Exception, run: Run, repo_id: str, text: str) -> str:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.OfflineModeIsEnabled):
        return f"{repo_id}: cannot be pushed while HF_HUB_OFFLINE is set; unset it, and push again"
    said = shorten(text.strip().split("\n")[0]) or type(error).__name__
    if isinstance(error, hub.HFValidationError):
        return f"{repo_id}: is no name of a repository ({said}); give owner/name"
    if isinstance(error, ValueError) and text.startswith(_REFUSED_CARD):
        said = shorten(" ".join(text.removeprefix(_REFUSED_CARD).split()).lstrip(".- ")) or "no reason given"
        return f"{run.model_dir / CARD}: the hub refuses its metadata ({said}); mend it, then push again"
    response = getattr(error, "response", None)
    refused = getattr(response, "status_code", None) in (401, 403) or isinstance(error, hub.LocalTokenNotFoundError)
    todo = (
        "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        if refused
        else "check the network and the name, then push again: what is uploaded already is not sent twice"
    )
    return f"{repo_id}: cannot be pushed ({said}); {todo}"


def _masked(text: str, token: str | None) -> str:
    """Leave out the token that was given, and whatever looks like one of the environment."""
    text = text.replace(token, "***") if token else text
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}|(?<=\bBearer )[^\s'\"]+", "***", text)
