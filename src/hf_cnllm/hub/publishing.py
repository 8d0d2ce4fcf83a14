"""What is saved and uploaded beside the weights: who can read it, and how.

transformers knows two of the model types here as nobody's and one, "glm", as another model's. Without this package a saved
folder must therefore end in an error that names it, and `auto_map`, the one key that transformers looks at before all else,
says so. It leads to no code: what it names cannot be a repository. See docs/publishing.md.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from .._compat import IS_COPY, HTTPError, PublishingHooks
from .saving import is_first_process

NEEDED = "This needs hf_cnllm: `pip install hf-cnllm`, then `import hf_cnllm` before loading (trust_remote_code does not help)"

REFUSALS = {
    401: "The Hub does not know the token (401). Run `hf auth login`, set HF_TOKEN, or pass token=…",
    403: "The token may not write to {repo_id} (403): it is for reading only, or the name is somebody else's. Pass a token that "
    "may write, or a name of your own",
    409: "{repo_id} has changed while this was uploaded (409). Upload it again",
}


def needs_package(auto_class: str) -> Any:
    """The `auto_map` of files that need this package. A copy of it has its own, which transformers writes."""
    reference = f"{NEEDED}--hf_cnllm.{auto_class}"
    return None if IS_COPY else {auto_class: [reference, None] if auto_class == "AutoTokenizer" else reference}


class PublishingMixin(PublishingHooks):
    """Put in front of `PreTrainedModel` or a tokenizer: the keyword `remote_code` of `save_pretrained` and `push_to_hub`, which
    puts the code beside the files, so that `trust_remote_code=True` loads them without this package; and the model card."""

    writes_code = IS_COPY

    def save_pretrained(self, save_directory, *args, remote_code: bool | None = None, **kwargs):
        if os.path.isfile(save_directory):  # transformers logs that and goes on
            raise NotADirectoryError(f"{save_directory} is a file: name a folder to save into.")
        with self._writing_code(remote_code), _refusals_in_a_sentence(kwargs.get("repo_id", save_directory)):
            saved = super().save_pretrained(save_directory, *args, **kwargs)
            if is_first_process() and kwargs.get("is_main_process", True):
                self.finish(Path(save_directory))
        return saved

    def push_to_hub(self, repo_id: str, *args, remote_code: bool | None = None, **kwargs):
        with self._writing_code(remote_code), _refusals_in_a_sentence(repo_id):
            return super().push_to_hub(repo_id, *args, **kwargs)

    def before_upload(self, folder: Path, repo_id: str) -> None:
        self.finish(folder, repo_id)

    def finish(self, folder: Path, repo_id: str | None = None) -> None:
        """Completes a saved folder, the second time to no effect."""
        from .finish import finish_model

        finish_model(self, folder, repo_id)

    @contextmanager
    def _writing_code(self, remote_code: bool | None) -> Iterator[None]:
        if remote_code is None:
            yield
            return
        if remote_code:
            from .finish import check_copyable

            check_copyable(self)
        self.writes_code = remote_code
        try:
            yield
        finally:
            del self.writes_code


@contextmanager
def _refusals_in_a_sentence(repo_id: Any) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        if (sentence := REFUSALS.get(error.response.status_code)) is None:
            raise
        message = f"{sentence.format(repo_id=repo_id)}. Nothing was uploaded."
        raise type(error)(message, response=error.response) from error
    except HTTPError as error:
        raise ConnectionError(f"The connection to the Hub broke off ({error}): push to {repo_id} again.") from error


class TokenizerPublishingMixin(PublishingMixin):
    """The same in front of a tokenizer."""

    @property
    def _auto_map(self) -> dict[str, Any] | None:
        return needs_package("AutoTokenizer")

    def finish(self, folder: Path, repo_id: str | None = None) -> None:
        from .finish import finish_tokenizer

        finish_tokenizer(self, folder, repo_id)
