"""A trained model on the hub: what is uploaded, and one clear line for what the hub refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from internal_policy.bupo.card import CARD, write_card
from internal_policy.bupo.results import MANIFEST
from internal_policy.errors import UserError
from internal_policy.models.lookup import first_line
from internal_policy.progress import status

if TYPE_CHECKING:
    from internal_policy.bupo.results import Run

UPLOADED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", CARD),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken", "preprocessor_config.json", "*.py"),
)
"""What transformers loads a model from. All else stays here: an optimiser's state, a trainer's pickled arguments."""


def push(
    run: Run, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None
) -> str:
    """Upload a run's model with a fresh card; see ``Run.push_to_hub``.

    Args:
        run: the run.
        repo_id: ``name`` or ``owner/name``.
        private: make it private, where it is made.
        token: of the hub.
        revision: branch to upload to.

    Returns:
        The repository's address.

    Raises:
        UserError: nothing whole to push, or the hub refuses or cannot be reached.
    """
    if not (run.path / MANIFEST).is_file():
        raise UserError(f"{run.path}: holds a run that has not ended (no {MANIFEST}); repeat its command, then push it")
    if not any(run.model_dir.glob("*.safetensors")):
        raise UserError(f"{run.model_dir}: holds no model (*.safetensors); train again with --overwrite, then push it")
    with _told_in_one_line(repo_id), status(f"pushing {run.model_dir} to {repo_id}"):
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="internal_policy")
        made = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        write_card(run, made.repo_id)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=run.model_dir,
            revision=revision,
            allow_patterns=list(UPLOADED),
            commit_message=f"{run.label}, {len(run.history)} steps",
        )
    return str(made)


@contextmanager
def _told_in_one_line(repo_id: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    import httpx
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id}: cannot be pushed while HF_HUB_OFFLINE is set; unset it, and push again") from error
    except hub.HFValidationError as error:
        raise UserError(f"{repo_id}: is no name of a repository ({first_line(error)}); give owner/name") from error
    except (hub.HfHubHTTPError, hub.LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        response = getattr(error, "response", None)
        refused = getattr(response, "status_code", None) in (401, 403) or isinstance(error, hub.LocalTokenNotFoundError)
        todo = (
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
            if refused
            else "check the network and the name, then push again: what is uploaded already is not sent twice"
        )
        raise UserError(f"{repo_id}: cannot be pushed ({first_line(error)}); {todo}") from error
