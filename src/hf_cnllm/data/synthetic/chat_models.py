"""Chat models to ask: any OpenAI-compatible endpoint, or a checkpoint through transformers' pipeline.

Both answer a batch of requests, each with a reply or with the reason why there is none; an endpoint's come as they are done.
"""

import argparse
import asyncio
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from threading import Thread
from typing import Any, NamedTuple, Protocol

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_PAUSE = 10  # seconds that the client waits between two tries, unless the server asks for more


class Request(NamedTuple):
    """A question; the same key is the same question of a run."""

    key: str  # `stage/number`
    prompt: str  # the one message, of the user
    max_tokens: int
    temperature: float = 0.0  # 0: the most probable tokens
    top_p: float = 1.0


class Reply(NamedTuple):
    text: str
    is_whole: bool = True  # False: `max_tokens` ended it


class Failure(NamedTuple):
    reason: str  # a word for statistics
    detail: str = ""


Outcome = Reply | Failure


class ChatModel(Protocol):
    """What answers requests, in any order."""

    name: str  # a run goes on with the same one

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Outcome]]: ...

    def close(self) -> None: ...


class Endpoint:
    """A model behind an OpenAI-compatible endpoint, by the `openai` client.

    Args:
        model: its name there.
        base_url: as `http://localhost:8000/v1`.
        key: sent as bearer token; that in `OPENAI_API_KEY` by default, if there is one.
        timeout: seconds for one try.
        retries: further tries after the first, with growing pauses.
        at_once: requests that are on their way together.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        key: str | None = None,
        timeout: float = 60,
        retries: int = 2,
        at_once: int = 4,
    ) -> None:
        from openai import AsyncOpenAI

        self.name, self.timeout = model, timeout
        key = key or os.environ.get(KEY_VARIABLE) or "none"
        self.client = AsyncOpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=retries)
        # The client's timeout is one for each read: a server that sends a byte now and then would never end.
        self.deadline = (retries + 1) * (timeout + LONGEST_PAUSE)
        self.slots = asyncio.Semaphore(at_once)
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="endpoint", daemon=True)
        self.thread.start()

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Outcome]]:
        """Raises ValueError where no request could ever succeed: the key, the model's name or the address is wrong."""
        futures = {asyncio.run_coroutine_threadsafe(self._ask(request), self.loop): request for request in requests}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()

    async def _ask(self, request: Request) -> Outcome:
        import openai

        create = self.client.chat.completions.create
        async with self.slots:
            try:
                completion = await asyncio.wait_for(
                    create(
                        model=self.name,
                        messages=[{"role": "user", "content": request.prompt}],
                        max_tokens=request.max_tokens,
                        temperature=request.temperature,
                        top_p=request.top_p,
                    ),
                    self.deadline,
                )
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ValueError(
                    f"{self.client.base_url} refuses the model {self.name!r} ({error}): see --base-url, --model and the "
                    f"key in {KEY_VARIABLE}"
                ) from error
            except (openai.APITimeoutError, asyncio.TimeoutError):  # Python 3.10 has two of them
                return Failure("timeout", f"--timeout is {self.timeout:g} s")
            except openai.APIConnectionError as error:
                return Failure("connection", str(error.__cause__ or error))
            except openai.APIStatusError as error:
                return Failure(f"http_{error.status_code}", str(error))
            except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON, or no UTF-8
                return Failure("junk", str(error))
        return _read_completion(completion)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.client.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def _read_completion(completion: Any) -> Outcome:
    """The client takes any JSON for a completion, and other texts as they are."""
    try:
        choice = completion.choices[0]
        text, reason = choice.message.content, choice.finish_reason
    except (AttributeError, TypeError, LookupError):
        text = None
    if not isinstance(text, str):
        return Failure("junk", f"no chat completion: {str(completion)[:80]}")
    return Reply(text, reason != "length")


class Local:
    """A checkpoint on this machine, by `pipeline("text-generation")`; one request at a time, each with a seed of its own, so
    that a reply does not depend on what was asked before."""

    def __init__(self, model: str, seed: int = 0) -> None:
        from transformers import pipeline

        import hf_cnllm  # noqa: F401  registers the families

        from ...hub.places import check_is_checkpoint
        from ...training.sampling import tokens_out_of_place
        from ..conversations import reply_end_ids

        check_is_checkpoint(model, "--model")
        self.name, self.seed = model, seed
        self.pipe = pipeline("text-generation", model=model)
        self.ends = reply_end_ids(self.pipe.tokenizer, self.pipe.model.generation_config)
        self.suppressed = tokens_out_of_place(self.pipe.model, self.ends)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Outcome]]:
        from transformers import set_seed

        for request in requests:
            set_seed(zlib.crc32(f"{self.seed} {request.key}".encode()))
            yield request, self._ask(request)

    def _ask(self, request: Request) -> Reply:
        from transformers import GenerationConfig

        tokenizer = self.pipe.tokenizer
        chat = [{"role": "user", "content": request.prompt}]
        asked: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=request.max_tokens,
            eos_token_id=self.ends,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0],
            suppress_tokens=self.suppressed,
            **(sampling if request.temperature else {"do_sample": False}),
        )
        found: Any = self.pipe(chat, return_tensors=True, generation_config=config)
        new = found[0]["generated_token_ids"][len(asked) :]
        return Reply(tokenizer.decode(new, skip_special_tokens=True).strip(), new[-1] in self.ends)

    def close(self) -> None:
        pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what says which model is asked."""
    group = parser.add_argument_group("the model that is asked")
    group.add_argument("--model", required=True, help="a checkpoint; with --base-url, the model's name there")
    group.add_argument(
        "--base-url", help=f"an OpenAI-compatible endpoint, as http://localhost:8000/v1; its key is in {KEY_VARIABLE}"
    )
    group.add_argument("--timeout", type=float, default=60, help="seconds for one try (default: 60)")
    group.add_argument("--retries", type=int, default=2, help="further tries of a request that fails (default: 2)")
    group.add_argument("--at-once", type=int, default=4, help="requests on their way together (default: 4)")


MODEL_ARGUMENTS = ("model", "base_url", "timeout", "retries", "at_once")


def without_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The other arguments."""
    return {name: value for name, value in vars(arguments).items() if name not in MODEL_ARGUMENTS}


def opened(arguments: argparse.Namespace, seed: int = 0) -> "closing[Endpoint | Local]":
    """The model that the arguments name, for a `with` block.

    Args:
        seed: that a checkpoint samples with.

    Raises:
        ValueError: an argument is not as it must be, or the checkpoint has no chats.
        ImportError: the client is not installed.
    """
    if arguments.base_url is None:
        return closing(Local(arguments.model, seed))
    if not arguments.base_url.startswith(("http://", "https://")):
        raise ValueError(f"--base-url {arguments.base_url}: expected an address that begins with http:// or https://")
    if not arguments.timeout > 0 or arguments.retries < 0 or arguments.at_once < 1:
        raise ValueError("--timeout must be a number above 0, --retries at least 0 and --at-once at least 1")
    options = {name: getattr(arguments, name) for name in MODEL_ARGUMENTS}
    return closing(Endpoint(**options))
